import asyncio
import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from agent.errors import DeviceError
from agent.wireguard import userspace
from agent.wireguard.interface import (
    Backend,
    ensure_interface,
    find_backend,
    remove_interface,
)
from agent.wireguard.userspace import UserspaceDevice, socket_path
from tests.contract.inside import inside
from tests.contract.interface_behaviours import BEHAVIOURS, Behaviour, run
from tests.support.netns import Namespace, Network, interface_name

pytestmark = pytest.mark.userspace


@pytest.mark.parametrize("check", BEHAVIOURS, ids=lambda check: check.__name__)
def test_a_userspace_interface(check: Behaviour) -> None:
    with Network() as net:
        space = net.namespace("gateway")
        inside(space, run(check, space, Backend.USERSPACE))


def program_of(space: Namespace) -> int:
    (pid,) = [pid for pid in space.pids() if b"wireguard-go" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def test_the_program_outlives_the_agent_and_knows_nothing_of_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WG_AGENT_CORE__TOKEN", "secret")
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    with Network() as net:
        space = net.namespace("gateway")
        name = interface_name()
        made = inside(space, ensure_interface(name, "userspace"))
        assert (made.created, made.warning) == (True, "")
        pid = program_of(space)
        assert os.getsid(pid) != os.getsid(0)
        assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        # On another loop, as after a restart of the agent.
        assert inside(space, ensure_interface(name)).created is False
        assert inside(space, remove_interface(name)) is True
        assert not socket_path(name).exists()
        assert space.pids() == []


def test_inside_a_unit_that_can_start_no_other_it_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    # The namespace is not init's: a unit of systemd's would be in the wrong one.
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    with Network() as net:
        space = net.namespace("gateway")
        name = interface_name()
        made = inside(space, ensure_interface(name, "userspace"))
        assert made.created
        assert "will not survive" in made.warning
        assert inside(space, remove_interface(name)) is True


def test_after_the_program_died_the_interface_is_made_anew() -> None:
    with Network() as net:
        space = net.namespace("gateway")
        name = interface_name()
        inside(space, ensure_interface(name, "userspace"))
        os.kill(program_of(space), signal.SIGKILL)

        async def lost() -> None:
            device = UserspaceDevice(name)
            for _ in range(500):
                if await find_backend(name) is None:
                    break
                await asyncio.sleep(0.01)
            with pytest.raises(DeviceError) as caught:
                await device.read()
            assert caught.value.errno == errno.ENODEV

        inside(space, lost())
        assert socket_path(name).exists()
        assert inside(space, ensure_interface(name, "userspace")).created is True
        assert inside(space, remove_interface(name)) is True


def test_the_same_name_in_another_namespace_is_refused_and_left_alone() -> None:
    with Network() as net:
        one, other = net.namespace("one"), net.namespace("other")
        name = interface_name()
        inside(one, ensure_interface(name, "userspace"))
        with pytest.raises(DeviceError, match="not here") as caught:
            inside(other, ensure_interface(name, "userspace"))
        assert caught.value.errno == errno.EEXIST
        assert name not in other.links()
        assert inside(one, find_backend(name)) is Backend.USERSPACE
        assert inside(one, remove_interface(name)) is True


def test_a_missing_program_is_named() -> None:
    with Network() as net:
        space = net.namespace("gateway")
        with pytest.raises(DeviceError, match="no-such-program") as caught:
            inside(space, ensure_interface(interface_name(), "userspace", "no-such-program"))
        assert caught.value.errno == errno.ENOENT
        assert "userspace_program" in caught.value.hint


def test_a_program_that_fails_is_quoted(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho first >&2\necho no device for $1 >&2\nexit 1\n")
    program.chmod(0o755)
    with Network() as net:
        space = net.namespace("gateway")
        name = interface_name()
        with pytest.raises(DeviceError, match=f"no device for {name}") as caught:
            inside(space, ensure_interface(name, "userspace", str(program)))
        assert "--foreground" in caught.value.hint


def test_a_program_that_stays_in_the_foreground_is_kept(tmp_path: Path) -> None:
    program = tmp_path / "foreground"
    program.write_text(f"#!/bin/sh\nexec {shutil.which('wireguard-go')} --foreground $1\n")
    program.chmod(0o755)
    with Network() as net:
        space = net.namespace("gateway")
        name = interface_name()
        assert inside(space, ensure_interface(name, "userspace", str(program))).created
        assert inside(space, find_backend(name)) is Backend.USERSPACE
        assert inside(space, remove_interface(name)) is True
        userspace._IN_FRONT.pop().wait(5)


def test_a_program_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userspace, "_START_TIMEOUT", 0.3)
    program = tmp_path / "silent"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with Network() as net:
        space = net.namespace("gateway")
        with pytest.raises(DeviceError, match="did not start"):
            inside(space, ensure_interface(interface_name(), "userspace", str(program)))
        assert space.pids() == []
