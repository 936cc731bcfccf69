"""A mail server that keeps what it receives as files, for the demo and for tests.

Each message becomes ``NNNNNN.eml`` in the folder, complete when it appears.
"""

from __future__ import annotations

import argparse
import asyncio
import email
import email.policy
import re
import signal
import time
from pathlib import Path
from typing import Any, Final, Self

from aiosmtpd.smtp import SMTP, Envelope, Session

from agent.sandbox import program
from agent.sandbox.config import split_address

_CODE: Final = re.compile(r"\bis ([0-9]{6})\b")


class _Keeper:
    """aiosmtpd's handler."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._number = len(list(folder.glob("*.eml")))

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        self._number += 1
        content = envelope.content or b""
        raw = content.encode() if isinstance(content, str) else content
        to = ", ".join(envelope.rcpt_tos)
        whole = f"X-Envelope-To: {to}\r\n".encode() + raw
        part = self._folder / f"{self._number:06}.part"
        part.write_bytes(whole)
        part.rename(part.with_suffix(".eml"))
        return "250 OK"


class MailServer:
    """An SMTP server in the running event loop.

    ``port`` is the port it listens on after ``start``; ``folder`` holds the messages.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.folder = folder
        self.host = host
        self.port = port
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        keeper = _Keeper(self.folder)

        def protocol() -> Any:
            return SMTP(keeper, hostname="localhost", loop=loop)

        self._server = await loop.create_server(protocol, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


def messages(folder: Path) -> list[Path]:
    """Return the stored messages, oldest first."""
    return sorted(folder.glob("*.eml"))


def code_in(message: Path) -> str | None:
    """Return the code in a stored message, None if there is none."""
    parsed = email.message_from_bytes(message.read_bytes(), policy=email.policy.default)
    body = parsed.get_body(("plain",))
    found = _CODE.search(body.get_content() if body is not None else "")
    return found[1] if found else None


def wait_for_code(folder: Path, *, after: int = 0, timeout: float = 5.0) -> str:
    """Block until the folder has more than ``after`` messages; return the newest one's code.

    Raises TimeoutError after ``timeout`` seconds.
    """
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        stored = messages(folder)
        if len(stored) > after:
            code = code_in(stored[-1])
            if code is not None:
                return code
        time.sleep(0.02)
    raise TimeoutError(f"no code arrived in {folder} within {timeout:g} s")


async def _serve(host: str, port: int, folder: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with MailServer(folder, host, port) as server:
        print(f"mail server listens on {server.host}:{server.port}", flush=True)
        await stop.wait()


def main(argv: list[str]) -> int:
    """Run ``mail --listen HOST:PORT --dir DIR`` until SIGTERM or SIGINT."""
    arguments = parser().parse_args(argv)
    host, port = split_address(arguments.listen)
    asyncio.run(_serve(host, port, arguments.dir))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mail``'s arguments."""
    made = argparse.ArgumentParser(prog=program("mail"), description=main.__doc__)
    made.add_argument("--listen", default="127.0.0.1:2525", metavar="HOST:PORT")
    made.add_argument("--dir", required=True, type=Path, help="where messages are kept")
    return made
