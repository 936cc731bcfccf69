"""What a userspace implementation can answer and wireguard-go can't be made to."""

import asyncio
import errno
from pathlib import Path

import pytest

from agent.errors import DeviceError
from agent.model import DeviceConfig
from agent.wireguard import userspace
from agent.wireguard.userspace import UserspaceDevice


@pytest.fixture(autouse=True)
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(userspace, "SOCKETS", tmp_path)
    return tmp_path


def ask(folder: Path, *answers: bytes | None) -> list[bytes]:
    """Configure a device whose program gives these answers (None: none); the requests it got."""
    requests: list[bytes] = []

    async def main() -> None:
        left = list(answers)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            requests.append(await reader.readuntil(b"\n\n"))
            answer = left.pop(0)
            if answer is None:
                await reader.read()
            else:
                for byte in answer:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0)
            writer.close()

        server = await asyncio.start_unix_server(serve, folder / "wg0.sock")
        async with server:
            await UserspaceDevice("wg0").configure(DeviceConfig(listen_port=51820, fwmark=1))

    asyncio.run(main())
    return requests


def test_only_what_differs_is_set(sockets: Path) -> None:
    same = b"listen_port=51820\nfwmark=1\nerrno=0\n\n"
    assert ask(sockets, same) == [b"get=1\n\n"]
    port = b"listen_port=51820\nerrno=0\n\n"
    assert ask(sockets, port, b"errno=0\n\n") == [b"get=1\n\n", b"set=1\nfwmark=1\n\n"]


def test_a_refusal_is_an_error_with_its_errno(sockets: Path) -> None:
    with pytest.raises(DeviceError, match="in use") as caught:
        ask(sockets, b"errno=0\n\n", b"errno=-98\n\n")
    assert caught.value.errno == errno.EADDRINUSE
    assert "listen_port" in caught.value.hint


@pytest.mark.parametrize("answer", [b"", b"errno=", b"errno=0\n"])
def test_a_cut_answer_is_an_error(sockets: Path, answer: bytes) -> None:
    with pytest.raises(DeviceError) as caught:
        ask(sockets, answer)
    assert caught.value.errno == errno.ECONNRESET


def test_a_program_that_hangs_is_given_up(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userspace, "_ANSWER_TIMEOUT", 0.1)
    with pytest.raises(DeviceError, match="did not answer") as caught:
        ask(sockets, None)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_very_large_answer_is_read_off_the_loop(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userspace, "_LARGE", 100)
    keys = [f"{i:064x}" for i in range(1, 50)]
    text = "".join(f"public_key={key}\n" for key in keys) + "errno=0\n\n"

    async def main() -> list[str]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\n\n")
            writer.write(text.encode())
            writer.close()

        async with await asyncio.start_unix_server(serve, sockets / "wg0.sock"):
            return [key.hex() for key in (await UserspaceDevice("wg0").read()).peers]

    assert asyncio.run(main()) == keys
