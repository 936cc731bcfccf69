"""The programs that the demo runs, each a process of its own, and what is to be read from them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from agent.sandbox.demo.faults import StepFailed

_POLL: Final = 0.02
# What the operator's own agent may have been told is not for the demo's.
_NOT_INHERITED: Final = (
    "CREDENTIALS_DIRECTORY",
    "INVOCATION_ID",
    "NOTIFY_SOCKET",
    "RUNTIME_DIRECTORY",
    "STATE_DIRECTORY",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)


def _environment() -> Mapping[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED and not k.startswith("WG_AGENT_")}
    # Read as it is written, and without translations.
    return {**kept, "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"}


async def until(holds: Callable[[], bool], within: float, otherwise: str, *logs: str) -> None:
    """Return once something holds. Raises StepFailed after ``within`` seconds."""
    end = time.monotonic() + within
    while not holds():
        if time.monotonic() >= end:
            raise StepFailed(f"{otherwise} within {within:g} s", *logs)
        await asyncio.sleep(_POLL)


class Program:
    """A process with its output in files: ``NAME.out`` and ``NAME.log`` (stderr, appended to)."""

    def __init__(self, name: str, argv: list[str], folder: Path, *, stdin: bool = False) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._out = folder / f"{name}.out"
        with self._out.open("wb") as out, self.log.open("ab") as log:
            # No asyncio: nothing can come between the start and the record of it. A session of its
            # own: Ctrl-C on the terminal is for the demo alone.
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(encoding="utf-8", errors="replace")

    def send(self, line: str) -> None:
        """Write a line to its standard input, the last one."""
        if self._process.stdin is not None:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.close()

    async def printed(self, text: str, within: float) -> None:
        """Return once it has printed ``text``. Raises StepFailed."""
        await until(
            lambda: text in self.output or not self.running,
            within,
            f"{self.name} did not print {text!r}",
            self.name,
        )
        if text not in self.output:
            raise StepFailed(f"{self.name} ended with {self._process.returncode}", self.name)

    async def ended(self, within: float) -> int:
        """Return its exit code. Raises StepFailed if it still runs after ``within`` seconds."""
        await until(lambda: not self.running, within, f"{self.name} did not end", self.name)
        return self._process.returncode

    async def kill(self) -> None:
        """SIGKILL; return once it is gone."""
        self._process.kill()
        await self.ended(5)

    async def stop(self, number: int = signal.SIGTERM, within: float = 5) -> None:
        """End it by a signal, and by SIGKILL if it is still there after ``within`` seconds."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        if self.running:
            self._process.send_signal(number)
        try:
            await self.ended(within)
        except StepFailed:
            self._process.kill()
            self._process.wait()


_SENT: Final = re.compile(r"^(\d+) packets transmitted", re.MULTILINE)
_REPLY: Final = re.compile(r"^\[([0-9.]+)\] \d+ bytes from .* icmp_seq=(\d+) ", re.MULTILINE)


class Pinger:
    """``ping`` while the block is entered; times are Unix seconds at which a reply came in."""

    def __init__(self, run: Callable[[], Program]) -> None:
        """``run`` starts ``ping -D``."""
        self._run = run
        self._program: Program | None = None

    def start(self) -> Self:
        """Begin."""
        self._program = self._run()
        return self

    async def stop(self) -> None:
        """End; the replies stay."""
        if self._program is not None:
            await self._program.stop(signal.SIGINT)

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def replies(self) -> dict[int, float]:
        """Return the replies so far: sequence number to time. (A demo sends fewer than 65,536.)"""
        if self._program is None:
            return {}
        found = _REPLY.findall(self._program.output)
        return {int(number): float(at) for at, number in found}

    @property
    def sent(self) -> int:
        """How many requests were sent; known once stopped, 0 before."""
        found = None if self._program is None else _SENT.search(self._program.output)
        return 0 if found is None else int(found[1])

    @property
    def last(self) -> float:
        """When the last reply came in, 0 if none did."""
        return max(self.replies().values(), default=0.0)

    def lost(self) -> int:
        """Return how many requests before the last answered one had no answer."""
        answered = self.replies()
        return max(answered, default=0) - len(answered)

    async def reply(self, since: float = 0.0) -> float:
        """Return when the first reply after ``since`` came in. Raises StepFailed."""
        within = 5 + max(0.0, since - time.time())
        await until(lambda: self.last > since, within, "ping got no reply", "agent", "client")
        return min(at for at in self.replies().values() if at > since)

    async def flowing(self, seconds: float) -> None:
        """Let pings flow for so long; return with a reply. Raises StepFailed."""
        await self.reply(since=time.time() + seconds)
