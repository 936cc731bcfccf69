from pathlib import Path

import pytest

from tests.reconciler.harness import World
from tests.support.recording_guard import RecordingGuard


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def guard(world: World) -> RecordingGuard:
    world.guard = RecordingGuard(world.host)
    return world.guard
