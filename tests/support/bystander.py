"""Who looks on while the agent works: another interface's reader, and an observer of the agent's own."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support import genl_reader
from tests.support.netns import Namespace, interface_name


class Reads(NamedTuple):
    """A tenth of a second of reads; ``at`` is monotonic, the rest in seconds."""

    at: float
    reads: int
    longest: float
    overslept: float


class Bystander:
    """Reads a WireGuard interface of its own in a namespace, in a tight loop, until the block is left.

    Needs WireGuard in the kernel.
    """

    def __init__(self, space: Namespace) -> None:
        self._space = space
        self._interface = interface_name()
        self._reads: list[Reads] = []

    def __enter__(self) -> Self:
        self._space.ip("link", "add", self._interface, "type", "wireguard")
        self._space.ip("link", "set", self._interface, "up")
        argv = (sys.executable, "-I", str(Path(genl_reader.__file__)), self._interface)
        self._process = self._space.popen(*argv, stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._follow, name="bystander", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(5)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._space.ip("link", "delete", self._interface)

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            at, reads, longest, overslept = line.split()
            self._reads.append(Reads(float(at), int(reads), float(longest), float(overslept)))

    def between(self, start: float, end: float) -> Reads:
        """All reads between two monotonic moments, in one; what spans them is in it too."""
        deadline = time.monotonic() + 10
        while not self._reads or self._reads[-1].at < end:
            if time.monotonic() > deadline:
                raise TimeoutError("the bystander says nothing any more")
            time.sleep(0.05)
        # A line that comes late began with the one before.
        some = [reads for reads in self._reads if reads.at >= start]
        some = some[: next(n for n, reads in enumerate(some, 1) if reads.at >= end)]
        return Reads(
            end,
            sum(reads.reads for reads in some),
            max(reads.longest for reads in some),
            max(reads.overslept for reads in some),
        )


class Look(NamedTuple):
    """What ``wg show`` said: how many peers there are, and how many have allowed IPs.

    It was read at ``at`` (monotonic) or somewhat earlier.
    """

    at: float
    peers: int
    admitted: int


class Onlooker:
    """Looks at an interface from outside, ten times a second, until the block is left."""

    def __init__(self, space: Namespace, interface: str) -> None:
        self._space = space
        self._interface = interface
        self._looks: list[Look] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="onlooker", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(60)

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            shown = self._space.run("wg", "show", self._interface, "allowed-ips").stdout
            peers = shown.count("\n")
            self._looks.append(Look(time.monotonic(), peers, peers - shown.count("(none)")))

    def first(self, condition: Callable[[Look], bool], since: float) -> Look | None:
        """The first look since a monotonic moment that is so."""
        return next((look for look in list(self._looks) if look.at >= since and condition(look)), None)
