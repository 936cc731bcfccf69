"""Who looks on while the agent works: another interface's reader, and an observer of the agent's own."""

import subprocess
import sys
import threading
import time
from itertools import takewhile
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


class _Watcher:
    """A reader of an interface in a namespace, whose lines are taken until the block is left."""

    def __init__(self, space: Namespace) -> None:
        self._space = space
        self._began = threading.Event()

    def _watch(self, mode: str, interface: str) -> None:
        argv = (sys.executable, "-I", str(Path(genl_reader.__file__)), mode, interface)
        self._process = self._space.popen(*argv, stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._follow, name=f"{mode} {interface}", daemon=True)
        self._thread.start()
        # Under emulation the program alone takes seconds to start; what is looked at does not wait for it.
        if not self._began.wait(60):
            raise TimeoutError(f"nothing was read of {interface} within a minute")

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._take(line.split())
            self._began.set()

    def _take(self, fields: list[bytes]) -> None:
        raise NotImplementedError

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


class Bystander(_Watcher):
    """Reads a WireGuard interface of its own in a namespace, in a tight loop, until the block is left.

    Needs WireGuard in the kernel.
    """

    def __init__(self, space: Namespace) -> None:
        super().__init__(space)
        self._interface = interface_name()
        self._reads: list[Reads] = []

    def __enter__(self) -> Self:
        self._space.ip("link", "add", self._interface, "type", "wireguard")
        self._space.ip("link", "set", self._interface, "up")
        self._watch("waits", self._interface)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._space.ip("link", "delete", self._interface)

    def _take(self, fields: list[bytes]) -> None:
        at, reads, longest, overslept = fields
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
    """How many peers an interface had at ``at`` (monotonic) or somewhat earlier, and IPv4 prefixes on them.

    What was changed meanwhile may be missing from one that is not whole.
    """

    at: float
    peers: int
    prefixes: int
    whole: bool


class Onlooker(_Watcher):
    """Looks at an interface from outside, ten times a second, until the block is left."""

    def __init__(self, space: Namespace, interface: str) -> None:
        super().__init__(space)
        self._interface = interface
        self._looks: list[Look] = []

    def __enter__(self) -> Self:
        self._watch("peers", self._interface)
        return self

    def _take(self, fields: list[bytes]) -> None:
        at, peers, prefixes, whole = fields
        self._looks.append(Look(float(at), int(peers), int(prefixes), whole == b"1"))

    def removed(self, left: int, since: float) -> float | None:
        """When so many peers were left, at the first whole look that says so; None if none does yet."""
        looks = (look for look in list(self._looks) if look.at >= since and look.whole)
        return next((look.at for look in looks if look.peers == left), None)

    def cut(self, left: int, removed: float) -> float:
        """From when on no look, also one that is not whole, saw allowed IPs on more than so many peers.

        Each is to have one IPv4 prefix.
        """
        before = [look for look in list(self._looks) if look.at <= removed]
        return [look.at for look in takewhile(lambda look: look.prefixes <= left, reversed(before))][-1]
