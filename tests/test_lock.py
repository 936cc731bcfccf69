from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from agent.errors import ConfigError, LockHeld
from agent.lock import InterfaceLock


def test_one_agent_holds_the_lock_of_an_interface(tmp_path: Path) -> None:
    with InterfaceLock(tmp_path, "wg0"):
        with pytest.raises(LockHeld, match=rf"process {os.getpid()}\) runs on wg0"):
            InterfaceLock(tmp_path, "wg0")
        InterfaceLock(tmp_path, "wg1").close()

    InterfaceLock(tmp_path, "wg0").close()


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = InterfaceLock(tmp_path, "wg1")
        os.write(writer, b"x")
        signal.pause()
        held.close()
        os._exit(0)
    os.read(reader, 1)
    with pytest.raises(LockHeld):
        InterfaceLock(tmp_path, "wg1")

    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    InterfaceLock(tmp_path, "wg1").close()
    os.close(reader)
    os.close(writer)


def test_the_lock_and_its_folder_are_their_owners_alone(tmp_path: Path) -> None:
    runtime = tmp_path / "a" / "b"
    with InterfaceLock(runtime, "wg0"):
        assert stat.S_IMODE((runtime / "wg0.lock").stat().st_mode) == 0o600
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_or_that_others_may_write_to_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"paths\.runtime: .*can't be made"):
        InterfaceLock(tmp_path / "file", "wg0")
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        InterfaceLock(tmp_path, "wg0")


def test_the_lock_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "wg0.lock").symlink_to(tmp_path / "precious")

    with pytest.raises(ConfigError, match="remove it"):
        InterfaceLock(tmp_path, "wg0")

    assert (tmp_path / "precious").read_text() == "precious"
