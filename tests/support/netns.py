"""Network namespaces for tests: made with unique names, taken down with all that runs in them.

    with Network() as net:
        gateway, client = net.namespace("gateway"), net.namespace("client")
        net.link(gateway, "192.0.2.1/24", client, "192.0.2.2/24")
        with Pinger(client, "192.0.2.1") as ping:
            ping.wait_reply()
            ...
        assert ping.lost == 0

Needs root and iproute2; ``Pinger`` needs iputils-ping.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from agent.wireguard.userspace import SOCKETS


def _sh(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


_BRIDGE = "bridge"


def interface_name() -> str:
    """A new name for a WireGuard interface.

    Sockets of userspace implementations lie in one folder for all namespaces, so equal names in
    two namespaces collide.
    """
    return f"wg{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Namespace:
    """One namespace; ``name`` is what ``ip netns`` knows it by."""

    name: str

    @property
    def path(self) -> Path:
        """For ``setns`` and ``nsenter --net=``."""
        return Path("/run/netns") / self.name

    def argv(self, *argv: str) -> list[str]:
        """``argv`` made to run in here; it replaces ``ip``, so its pid is the command's."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(
        self, *argv: str, check: bool = True, stdin: str | None = None, timeout: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in here to its end; a failing one raises with what it printed."""
        done = subprocess.run(
            self.argv(*argv),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        if check and done.returncode:
            printed = (done.stdout + done.stderr).strip()
            raise RuntimeError(f"{' '.join(argv)} in {self.name}: {done.returncode}: {printed}")
        return done

    def popen(
        self,
        *argv: str,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a command in here; what the test does not end, the network's teardown kills."""
        return subprocess.Popen(self.argv(*argv), stdin=stdin, stdout=stdout, stderr=stderr, env=env)

    def ip(self, *argv: str) -> str:
        return _sh("ip", "-n", self.name, *argv)

    def links(self) -> list[str]:
        return [link["ifname"] for link in json.loads(_sh("ip", "-n", self.name, "-j", "link"))]

    def pids(self) -> list[int]:
        return [int(pid) for pid in _sh("ip", "netns", "pids", self.name, check=False).split()]


class Network:
    """Namespaces and the cables between them; leaving the block takes all of it down."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(3)
        self._spaces: list[Namespace] = []
        self._cables: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def namespace(self, role: str) -> Namespace:
        """A new namespace with its loopback up, named after ``role``."""
        space = Namespace(f"wga-{self._token}-{role}")
        _sh("ip", "netns", "add", space.name)
        self._spaces.append(space)
        space.ip("link", "set", "lo", "up")
        return space

    def link(self, one: Namespace, one_address: str, other: Namespace, other_address: str) -> tuple[str, str]:
        """Join two namespaces by a veth pair with these addresses (CIDR); the two ends' names."""
        names = self._end(one), self._end(other)
        _sh("ip", "link", "add", names[0], "netns", one.name, "type", "veth", *_peer(names[1], other))
        ends = zip((one, other), names, (one_address, other_address), strict=True)
        for space, name, address in ends:
            # nodad: an IPv6 address is usable at once.
            nodad = ("nodad",) if ":" in address else ()
            space.ip("address", "add", address, "dev", name, *nodad)
            space.ip("link", "set", name, "up")
        return names

    def switch(self, role: str) -> Namespace:
        """A new namespace with nothing but a bridge, to plug others into."""
        space = self.namespace(role)
        space.ip("link", "add", _BRIDGE, "type", "bridge")
        space.ip("link", "set", _BRIDGE, "up")
        return space

    def plug(self, space: Namespace, address: str, switch: Namespace) -> str:
        """Join a namespace to a switch, with this address (CIDR); the port's name at the switch."""
        name, port = self._end(space), self._end(switch)
        _sh("ip", "link", "add", name, "netns", space.name, "type", "veth", *_peer(port, switch))
        space.ip("address", "add", address, "dev", name)
        space.ip("link", "set", name, "up")
        switch.ip("link", "set", port, "master", _BRIDGE, "up")
        return port

    def _end(self, space: Namespace) -> str:
        number = self._cables.get(space.name, 0)
        self._cables[space.name] = number + 1
        return f"eth{number}"

    def close(self) -> None:
        """Kill what runs in the namespaces and delete them; nothing happens a second time."""
        while self._spaces:
            space = self._spaces.pop()
            userspace = _links(space, "tun")
            _kill_all(space)
            _remove_sockets(userspace)
            _drop_peers(space)
            _sh("ip", "netns", "delete", space.name, check=False)


def _peer(name: str, space: Namespace) -> tuple[str, ...]:
    return ("peer", "name", name, "netns", space.name)


def _kill_all(space: Namespace) -> None:
    for _ in range(50):
        pids = space.pids()
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _drop_peers(space: Namespace) -> None:
    """Deleting a kernel's link that still has peers takes it 17 ms for each.

    Not by ``wg show interfaces``: that names the userspace interfaces of every namespace.
    """
    for name in _links(space, "wireguard"):
        space.run("wg", "syncconf", name, "/dev/null", check=False)


def _links(space: Namespace, kind: str) -> list[str]:
    shown = _sh("ip", "-n", space.name, "-j", "link", "show", "type", kind, check=False)
    return [link["ifname"] for link in json.loads(shown or "[]") if "ifname" in link]


def _remove_sockets(links: Iterable[str]) -> None:
    """A killed wireguard-go leaves its socket in a folder that is every namespace's."""
    for path in (SOCKETS / f"{link}.sock" for link in links):
        with socket.socket(socket.AF_UNIX) as asked, contextlib.suppress(FileNotFoundError):
            try:
                asked.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


@dataclass(frozen=True, slots=True)
class Gap:
    """A time without replies: monotonic seconds."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


_REPLY = re.compile(rb"icmp_seq=(\d+) .*time=")
_SUMMARY = re.compile(rb"(\d+) packets transmitted")


class Pinger:
    """``ping`` running in a namespace, every ``interval`` seconds, until the block is left.

    Times are monotonic seconds at which a reply was read, so that a stepped wall clock does not
    matter. ``lost`` counts what was never answered before the last reply; what was sent after it
    is ``unanswered``.
    """

    def __init__(
        self, space: Namespace, target: str, *, source: str = "", interval: float = 0.01, size: int = 56
    ) -> None:
        self._lock = threading.Condition()
        self._replies: list[tuple[int, float]] = []
        self._seen: set[int] = set()
        self._sent: int | None = None
        self.started = time.monotonic()
        sender = ("-I", source) if source else ()
        argv = ("ping", "-n", "-O", "-i", str(interval), "-s", str(size), *sender, target)
        self._process = space.popen(*argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._thread = threading.Thread(target=self._read, name=f"ping {target}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        highest = 0
        for line in stdout:
            now = time.monotonic()
            if reply := _REPLY.search(line):
                number = int(reply[1])
                while number < highest - 0x8000:  # the field has 16 bits
                    number += 0x10000
                highest = max(highest, number)
                with self._lock:
                    if number not in self._seen:
                        self._seen.add(number)
                        self._replies.append((number, now))
                    self._lock.notify_all()
            elif summary := _SUMMARY.search(line):
                self._sent = int(summary[1])
        with self._lock:
            self._lock.notify_all()

    def stop(self) -> None:
        """End ping and wait for its summary; nothing happens a second time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(5)
        if self._process.stdout is not None:
            self._process.stdout.close()

    @property
    def received(self) -> int:
        with self._lock:
            return len(self._replies)

    @property
    def sent(self) -> int:
        """How many were sent; known once stopped."""
        if self._sent is None:
            raise RuntimeError("ping printed no summary: stop it first, and see that it started")
        return self._sent

    @property
    def lost(self) -> int:
        """Unanswered requests with an answered one after them."""
        with self._lock:
            return max(self._seen, default=0) - len(self._seen)

    def losses(self) -> list[str]:
        """What was never answered before the last reply, each with when its turn was, in the log's time."""
        ahead = time.time() - time.monotonic()
        with self._lock:
            when = dict(self._replies)
        told = []
        for number in sorted(set(range(1, max(when, default=0))) - when.keys()):
            before = max((n for n in when if n < number), default=None)
            moment = self.started if before is None else when[before]
            told.append(f"no. {number}, after {datetime.fromtimestamp(ahead + moment, UTC):%H:%M:%S.%f}")
        return told

    @property
    def unanswered(self) -> int:
        """Requests sent after the last answered one; known once stopped."""
        with self._lock:
            return self.sent - max(self._seen, default=0)

    def replies(self) -> list[tuple[int, float]]:
        """Number and monotonic time of each reply so far, as they came."""
        with self._lock:
            return list(self._replies)

    @property
    def last_reply(self) -> float | None:
        with self._lock:
            return self._replies[-1][1] if self._replies else None

    def gaps(self, longer_than: float) -> Sequence[Gap]:
        """The times between two replies that were longer than so many seconds."""
        with self._lock:
            times = [moment for _, moment in self._replies]
        pairs = itertools.pairwise(times)
        return [Gap(a, b) for a, b in pairs if b - a > longer_than]

    def wait_reply(self, timeout: float = 10.0) -> float:
        """Wait for a reply to come from now on; its time. Raises ``TimeoutError``."""
        with self._lock:
            before = len(self._replies)
            if not self._lock.wait_for(lambda: len(self._replies) > before, timeout):
                raise TimeoutError(f"no reply to ping within {timeout} s")
            return self._replies[-1][1]

    def wait_silence(self, quiet: float = 0.5, timeout: float = 10.0) -> float:
        """Wait until no reply came for ``quiet`` seconds; the last reply's time (or the start).

        Raises ``TimeoutError`` when replies still come after ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            last = self.last_reply or self.started
            now = time.monotonic()
            if now - last >= quiet:
                return last
            if now > end:
                raise TimeoutError(f"ping is still answered after {timeout} s")
            time.sleep(min(quiet - (now - last) + 0.001, 0.1))
