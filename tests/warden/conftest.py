from pathlib import Path

import pytest

from agent import clock as agent_clock
from tests.reconciler.harness import World
from tests.warden.harness import Gateway


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway(World(tmp_path))
    monkeypatch.setattr(agent_clock, "monotonic", gateway.monotonic)
    return gateway
