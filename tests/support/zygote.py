"""Agents forked from a parent that has imported everything, with clocks that the test can move.

Importing takes most of a start under emulation, and crash tests start the agent hundreds of times. A
fork is the same process as a fresh one in all that matters to the agent: it runs ``wg-agent run`` from
its first line, has its own sockets, threads and files, and can be killed, stopped and waited for.

``Clocks`` are added to what the agent reads of boot time and of the wall clock (``agent.clock.read``):
a step of the wall clock moves one, a suspend moves both. The kernel's own clocks stay as they are,
which is true to a suspend for nftables' timers.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.support.netns import Namespace

_OFFSETS: Final = struct.Struct("dd")


class Clocks:
    """Seconds added to the agent's boot time and wall clock; shared with every agent of one folder."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_OFFSETS.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _OFFSETS.size)

    @property
    def boot(self) -> float:
        return float(_OFFSETS.unpack(self._map[:])[0])

    @property
    def wall(self) -> float:
        return float(_OFFSETS.unpack(self._map[:])[1])

    def set(self, *, boot: float | None = None, wall: float | None = None) -> None:
        self._map[:] = _OFFSETS.pack(self.boot if boot is None else boot, self.wall if wall is None else wall)


class ForkedProcess:
    """What tests need of ``subprocess.Popen``, for a process that is the zygote's child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def ended(self, status: int) -> None:
        """The zygote has waited for it."""
        self.returncode = status
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(["wg-agent", "run"], timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The parent, in a namespace; ``fork`` starts an agent. ``clocks`` are those of its agents."""

    def __init__(self, space: Namespace, folder: Path) -> None:
        self.clocks = Clocks(folder / "clocks")
        self._children: dict[int, ForkedProcess] = {}
        self._changed = threading.Condition()
        self._ready = threading.Event()
        self._process = space.popen(
            *(sys.executable, "-m", "tests.support.zygote", str(folder / "clocks")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._forked: list[int] = []
        self._reader = threading.Thread(target=self._read, name="zygote", daemon=True)
        self._reader.start()
        if not self._ready.wait(120):
            raise RuntimeError("the zygote did not come up")

    def fork(self, argv: list[str], log: Path) -> ForkedProcess:
        """Run ``wg-agent ARGV`` with its output appended to ``log``."""
        request = json.dumps({"argv": argv, "log": str(log)})
        assert self._process.stdin is not None
        with self._changed:
            self._process.stdin.write(f"{request}\n".encode())
            self._process.stdin.flush()
            if not self._changed.wait_for(lambda: bool(self._forked), 60):
                raise RuntimeError("the zygote did not fork")
            return self._children[self._forked.pop()]

    def close(self) -> None:
        """End the parent; its children are the caller's to end before."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said: dict[str, Any] = json.loads(line)
            with self._changed:
                if "ready" in said:
                    self._ready.set()
                elif "forked" in said:
                    self._children.setdefault(said["forked"], ForkedProcess(said["forked"]))
                    self._forked.append(said["forked"])
                else:
                    # One that ends at once may be waited for before its birth is told.
                    child = self._children.setdefault(said["ended"], ForkedProcess(said["ended"]))
                    child.ended(said["status"])
                self._changed.notify_all()


def _say(**what: object) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _requests(woken: int) -> Iterator[bytes]:
    """Lines from stdin as they come; ``woken`` is readable when a child has ended, which is told."""
    rest = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _wait_for_children()
        if 0 in readable:
            read = os.read(0, 65536)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from lines


def _wait_for_children() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(ended=pid, status=os.waitstatus_to_exitcode(status))


def _say_where(*_: object) -> None:
    """SIGUSR1: what every thread and every task of the agent is at, in its log."""
    faulthandler.dump_traceback(all_threads=True)
    with contextlib.suppress(RuntimeError):  # no loop runs
        for task in asyncio.all_tasks():
            task.print_stack(limit=6)
    sys.stderr.flush()


def _serve(clocks: Clocks) -> None:
    from agent import clock
    from agent.model import Now

    read = clock.read

    def moved() -> Now:
        now = read()
        return Now(now.boot + clocks.boot, now.wall + clocks.wall)

    # Before anything else is imported: some modules keep the function itself.
    clock.read = moved
    from agent.__main__ import main
    from agent.daemon import run  # noqa: F401  the command imports it when it runs

    # A handler alone is not enough: the signal may come just before a read that then waits for ever.
    woken, wakes = os.pipe()
    for end in (woken, wakes):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    _say(ready=True)
    for line in _requests(woken):
        request = json.loads(line)
        pid = os.fork()
        if pid:
            _say(forked=pid)
            continue
        signal.set_wakeup_fd(-1)
        os.close(woken)
        os.close(wakes)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, _say_where)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 70
        try:
            status = main(request["argv"])
        except BaseException:  # noqa: BLE001  as the interpreter does at the end of a process
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    _serve(Clocks(Path(sys.argv[1])))
