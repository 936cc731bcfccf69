"""The operator's commands around the interface's life: before and after it comes up and goes down.

A list of words each, run without a shell, one after the other, beside the reconciler's steps: nobody's
grant or end waits for them. The guard does not depend on them either.

A ``pre_up`` that fails keeps the interface down, as it would with wg-quick: it is where an operator puts
what has to be so before the first packet. What has succeeded is not run again for the same link; what
failed is tried again. All others are logged when they fail, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog

from agent import clock, config
from agent.errors import DeviceError

_log = structlog.get_logger(__name__)

AGAIN: Final = 10.0
"""Seconds after which a ``pre_up`` that failed is tried again."""
_STOP: Final = 5.0
"""Seconds that commands may go on for when the agent stops."""
_KILLED: Final = 1.0
"""Seconds in which a killed program is expected to be gone; one that waits for a dead disk may not be."""
_SHOWN: Final = 1000
"""Characters of a command's output that are told, the last ones."""
_KEPT: Final = 4096
"""Bytes of it that are kept."""
_PIPE: Final = 1 << 16
"""Bytes that a pipe holds (pipe(7)), and that are read of it before it is somebody else's turn."""
_PERCENT: Final = re.compile(r"%([%i])")
# What `wg showconf` and UAPI print, public keys among them: they can't be told apart.
_KEYS: Final = re.compile(r"[A-Za-z0-9+/]{43}=|\b[0-9A-Fa-f]{64}\b")
# What systemd has to say to the agent alone, and where its secrets are.
_NOT_FOR_COMMANDS: Final = frozenset(
    {"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID"}
)


class When(StrEnum):
    """When a command runs; the keys of the section [hooks]."""

    PRE_UP = "pre_up"
    POST_UP = "post_up"
    PRE_DOWN = "pre_down"
    POST_DOWN = "post_down"


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments; ``number`` counts from 1 within its list."""

    when: When
    number: int
    argv: tuple[str, ...]

    def __str__(self) -> str:
        """Without the arguments: there may be a secret among them."""
        return f"hooks.{self.when}, command {self.number} ({self.argv[0]})"


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of a command that did not end well, and the end of what it printed."""

    command: Command
    reason: str
    output: str = ""

    def __str__(self) -> str:
        return f"{self.command} {self.reason}" + (f": {self.output}" if self.output else "")


class Hooks:
    """The commands of one interface. ``done`` is called when the interface may be able to go on."""

    def __init__(
        self, commands: config.Hooks, interface: str, done: Callable[[], None] = lambda: None
    ) -> None:
        self._interface = interface
        self._timeout = commands.timeout
        self._commands = {
            when: tuple(
                Command(when, number, tuple(_expanded(word, interface) for word in argv))
                for number, argv in enumerate(getattr(commands, when), 1)
            )
            for when in When
        }
        self._done = done
        self._waiting: deque[Command] = deque()
        self._task: asyncio.Task[None] | None = None
        self._link: int | None = None
        """The link that ``pre_up`` was asked for last."""
        self._was_up: int | None = None
        """The link that has been up: it has had its commands, or came up in an earlier life of the agent."""
        self._failure: Failure | None = None
        """Why the link may not come up."""
        self._again_at = 0.0

    @property
    def commands(self) -> list[Command]:
        """All of them, as they will be run."""
        return [command for commands in self._commands.values() for command in commands]

    # Up: by the link, from within the reconciler's steps.

    def found_up(self, link: int) -> None:
        """The link of this index is up, whoever brought it up: there is nothing to run for it any more."""
        if link != self._was_up:
            self._drop()
            self._link = self._was_up = link

    def may_come_up(self, link: int) -> bool:
        """Whether the link, which is down, may come up; False while what has to run before is under way.

        One that has been up, and that somebody took down, may: its commands have run. Raises DeviceError
        as long as a ``pre_up`` fails.
        """
        if link == self._was_up:
            return True
        if link != self._link:
            self._begin(link)
        if clock.monotonic() >= self._again_at:
            self._go_on()
        if self._failure is not None:
            raise DeviceError(
                f"{self._interface} stays down: {self._failure.command} {self._failure.reason}",
                f"it is tried again every {AGAIN:.0f} s; the log has what it printed",
            )
        return self._task is None

    def came_up(self) -> None:
        """The link that ``may_come_up`` was asked about has come up."""
        if self._was_up == self._link:
            return
        self._was_up = self._link
        self._waiting.extend(self._commands[When.POST_UP])
        self._go_on()

    def _begin(self, link: int) -> None:
        """The life of a link begins. If one was up before it, that has gone without its ``post_down``."""
        self._drop()
        if self._was_up is not None:
            self._waiting.extend(self._commands[When.POST_DOWN])
        self._waiting.extend(self._commands[When.PRE_UP])
        self._link, self._was_up = link, None

    def _drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._waiting.clear()
        self._failure, self._again_at = None, 0.0

    def _go_on(self) -> None:
        if self._waiting and self._task is None:
            self._task = asyncio.create_task(self._work_off(), name="hooks")
            # Also of a task that is cancelled before it has begun.
            self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._done()

    async def _work_off(self) -> None:
        while self._waiting:
            failure = await self._run_and_tell(self._waiting[0])
            if failure is not None and failure.command.when is When.PRE_UP:
                self._failure, self._again_at = failure, clock.monotonic() + AGAIN
                return
            self._failure = None
            self._waiting.popleft()

    async def close(self) -> None:
        """Give what is under way a moment, then end it."""
        task = self._task
        if task is None:
            return
        await asyncio.wait({task}, timeout=_STOP)
        if not task.done():
            _log.warning("commands ended with the agent", unfinished=[str(one) for one in self._waiting])
            task.cancel()
            await asyncio.wait({task}, timeout=_KILLED)

    # Down: by whoever takes the interface down.

    async def run(self, when: When) -> list[Failure]:
        """Run these commands, each whatever became of the one before; return what failed."""
        task = self._task
        self._drop()
        if task is not None:
            await asyncio.wait({task})
        if when is When.POST_DOWN:
            self._link = self._was_up = None
        failures = [await run(command, self._timeout, os.environ) for command in self._commands[when]]
        return [failure for failure in failures if failure is not None]

    async def _run_and_tell(self, command: Command) -> Failure | None:
        began = clock.monotonic()
        failure = await run(command, self._timeout, os.environ)
        about = {
            "hook": command.when.value,
            "command": command.number,
            "program": command.argv[0],
            "seconds": round(clock.monotonic() - began, 2),
        }
        if failure is None:
            _log.info("command done", **about)
        else:
            _log.error("command failed", **about, reason=failure.reason, output=failure.output)
        return failure


def _expanded(word: str, interface: str) -> str:
    """The word with %i and %% replaced; any other percent sign stands for itself."""
    return _PERCENT.sub(lambda found: interface if found[1] == "i" else "%", word)


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return what commands get of the agent's environment: nothing that leads to a secret."""
    return {
        name: value
        for name, value in own.items()
        if name not in _NOT_FOR_COMMANDS and not name.upper().startswith(config.ENV_PREFIX)
    }


async def run(command: Command, limit: float, own: Mapping[str, str]) -> Failure | None:
    """Run one command to its end; return what went wrong.

    After ``limit`` seconds, or when this is cancelled, it is killed with all that it has started, but
    for what has made itself a session of its own. Programs that it leaves running are no failure.
    """
    tail: _Tail | None = None
    try:
        tail = _Tail()
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=tail.write_end,
            stderr=tail.write_end,
            env=environment(own),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        return Failure(command, f"can't be started: {error.strerror}")
    except Exception as error:  # noqa: BLE001 words that are no text, no thread to wait in: it has not run
        return Failure(command, f"can't be started: {error}")
    finally:
        if tail is not None:
            tail.listen()
    try:
        async with asyncio.timeout(limit):
            status = await process.wait()
    except TimeoutError:
        await _kill(process)
        return Failure(command, f"took longer than {limit:g} s and was killed", tail.text())
    except asyncio.CancelledError:
        await _kill(process)
        raise
    return None if status == 0 else Failure(command, _ended(status), tail.text())


def _ended(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    name = signal.strsignal(-status) or "unknown"
    return f"was ended by signal {-status} ({name})"


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KILLED):
            await process.wait()


class _Tail:
    """The end of what a command prints, read as it comes: a talkative one neither waits nor fills memory.

    What the command leaves running may go on printing, to nobody, for as long as the agent runs. asyncio's
    own pipes would have the agent wait for it.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._open = True
        self._kept = b""
        self._cut = False

    def listen(self) -> None:
        """Let go of the command's end of the pipe."""
        os.close(self.write_end)
        asyncio.get_running_loop().add_reader(self._read_end, self._read)

    def text(self) -> str:
        """What has been printed last, on one line and without keys."""
        self._read()
        words = self._kept.decode("utf-8", "replace").split()
        if self._cut:
            del words[:1]  # what is left of it may be half a key
        return _KEYS.sub("(redacted)", " ".join(words))[-_SHOWN:]

    def _read(self) -> None:
        try:
            chunk = os.read(self._read_end, _PIPE) if self._open else b""
        except BlockingIOError:
            return
        if not chunk and self._open:
            asyncio.get_running_loop().remove_reader(self._read_end)
            os.close(self._read_end)
            self._open = False
        kept = self._kept + chunk
        self._cut |= len(kept) > _KEPT
        self._kept = kept[-_KEPT:]
