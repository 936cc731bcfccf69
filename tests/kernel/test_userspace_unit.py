import asyncio
import os
import subprocess
import time

import pytest

from agent.wireguard.interface import (
    Backend,
    Ensured,
    ensure_interface,
    find_backend,
    remove_interface,
)
from tests.support.netns import interface_name

pytestmark = pytest.mark.systemd


def test_under_systemd_the_program_is_a_unit_of_its_own_and_goes_with_the_interface() -> None:
    assert "INVOCATION_ID" in os.environ  # this test runs in a unit
    name = interface_name()
    unit = f"wg-agent-userspace-{name}.service"
    made = asyncio.run(ensure_interface(name, "userspace"))
    try:
        assert made == Ensured(Backend.USERSPACE, created=True)
        assert _state(unit) == "active"
        assert asyncio.run(find_backend(name)) is Backend.USERSPACE
    finally:
        assert asyncio.run(remove_interface(name)) is True
    for _ in range(100):
        if _state(unit) == "inactive":
            break
        time.sleep(0.05)
    assert _state(unit) == "inactive"


def _state(unit: str) -> str:
    return subprocess.run(
        ["systemctl", "is-active", unit], capture_output=True, text=True, check=False
    ).stdout.strip()
