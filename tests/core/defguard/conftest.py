from pathlib import Path

import pytest

from tests.reconciler.harness import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """What outlives the agent's process."""
    return World(tmp_path)
