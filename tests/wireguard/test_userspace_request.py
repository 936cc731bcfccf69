"""An agent that may start no units asks for the program by a file; systemd's part is played here.

For the real one see tests/packaging/test_installed.py.
"""

import asyncio
from pathlib import Path

import pytest

from agent.errors import DeviceError
from agent.wireguard import userspace

PROGRAM = "true"  # nothing of this name is to be run


@pytest.fixture
def request_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An agent in its unit, whose sockets are in a folder of the test's."""
    file = tmp_path / "userspace"
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    monkeypatch.setenv("USERSPACE_REQUEST", str(file))
    monkeypatch.setattr(userspace, "SOCKETS", tmp_path)
    monkeypatch.setattr(userspace, "_shares_network_with_init", lambda: True)
    return file


async def serve_once_asked(file: Path, name: str, times: int = 1) -> asyncio.Server:
    for time in range(times):
        while not file.exists():  # noqa: ASYNC110, ASYNC240 (as systemd's inotify would)
            await asyncio.sleep(0.01)
        if time < times - 1:
            file.unlink()  # noqa: ASYNC240
    return await asyncio.start_unix_server(lambda _, writer: writer.close(), userspace.socket_path(name))


def test_the_program_is_asked_for_by_the_units_file_and_waited_for(request_file: Path) -> None:
    async def ask() -> bool:
        serving = asyncio.create_task(serve_once_asked(request_file, "wg7"))
        outlives = await userspace.start("wg7", PROGRAM)
        (await serving).close()
        return outlives

    assert asyncio.run(ask()) is True
    assert request_file.read_text() == "wg7\n"


def test_a_request_that_was_not_seen_is_made_again(
    request_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userspace, "_ASK_AGAIN", 0.1)

    async def ask() -> bool:
        serving = asyncio.create_task(serve_once_asked(request_file, "wg7", times=3))
        outlives = await userspace.start("wg7", PROGRAM)
        (await serving).close()
        return outlives

    assert asyncio.run(ask()) is True


def test_a_request_that_nobody_answers_names_the_units_to_look_at(
    request_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userspace, "_ASK_AGAIN", 0.1)
    monkeypatch.setattr(userspace, "_START_TIMEOUT", 0.1)

    with pytest.raises(DeviceError, match=r"wg-agent-userspace@wg7\.service does not run") as caught:
        asyncio.run(userspace.start("wg7", PROGRAM))

    assert "systemctl status wg-agent-userspace@wg7.path" in caught.value.hint


def test_a_request_that_can_not_be_written_says_where(
    request_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_file.mkdir()

    with pytest.raises(DeviceError, match="can't be asked for") as caught:
        asyncio.run(userspace.start("wg7", PROGRAM))

    assert str(request_file) in caught.value.message


def test_in_a_network_namespace_of_its_own_it_does_not_ask(
    request_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systemd's unit would make the interface in another one."""
    monkeypatch.setattr(userspace, "_shares_network_with_init", lambda: False)

    with pytest.raises(DeviceError):
        asyncio.run(userspace.start("wg7", "false"))

    assert not request_file.exists()
