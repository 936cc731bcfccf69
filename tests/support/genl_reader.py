"""A program that reads a WireGuard interface over and over, in one of two ways.

    python3 -I genl_reader.py waits INTERFACE

says how long a read had to wait. It stands for whatever else on the host needs the kernel's network lock.
Every tenth of a second it prints a line: monotonic time, reads, the longest read, and by how much the
longest pause was overslept (which is the machine's doing, not the lock's).

    python3 -I genl_reader.py peers INTERFACE

says what is on it. Every tenth of a second it prints a line: monotonic time, peers, IPv4 prefixes on them,
and 1 if the look was whole, 0 if somebody changed the interface meanwhile. ``wg show`` begins anew then, and
would say nothing until all changes are over; it is asked only where the kernel has no such interface.

It imports next to nothing and goes before ordinary processes, so that what it waits for is the lock. It
ends once nobody reads what it prints.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

_HEADER = struct.Struct("=IHHIIBBH")  # nlmsghdr, genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_REQUEST, _DUMP, _DUMP_INTR = 1, 0x300, 0x10
_ERROR, _DONE = 2, 3
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_GET_DEVICE, _IFNAME = 0, 2
_KEY = _ATTRIBUTE.pack(36, 1)  # WGPEER_A_PUBLIC_KEY
_INET = struct.pack("=HHH", 6, 1, socket.AF_INET)  # WGALLOWEDIP_A_FAMILY
PAUSE = 0.005
LINE = 0.1


def _request(kind: int, flags: int, command: int, attribute: int, value: str) -> bytes:
    raw = value.encode() + b"\0"
    body = _ATTRIBUTE.pack(4 + len(raw), attribute) + raw + bytes(-len(raw) % 4)
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0, command, 1, 0) + body


class _Interface:
    """One interface in the kernel; raises OSError where there is none."""

    def __init__(self, name: str) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
        self._sock.bind((0, 0))
        self._dump = _request(self._family(), _DUMP, _GET_DEVICE, _IFNAME, name)

    def _family(self) -> int:
        self._sock.send(_request(_CONTROL, 0, _GET_FAMILY, _FAMILY_NAME, "wireguard"))
        reply = self._sock.recv(65536)
        at = _HEADER.size if _HEADER.unpack_from(reply)[1] != _ERROR else len(reply)
        while at < len(reply):
            size, kind = _ATTRIBUTE.unpack_from(reply, at)
            if kind == _FAMILY_ID:
                return int(struct.unpack_from("=H", reply, at + 4)[0])
            at += (size + 3) & ~3
        raise OSError("the kernel has no WireGuard")

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """The flags and the whole of each message of one dump."""
        self._sock.send(self._dump)
        while True:
            reply = self._sock.recv(65536)
            at = 0
            while at < len(reply):
                length, kind, flags = struct.unpack_from("=IHH", reply, at)
                if kind == _ERROR:
                    raise OSError("the interface can't be read")
                yield flags, b"" if kind == _DONE else reply[at : at + length]
                if kind == _DONE:
                    return
                at += (length + 3) & ~3

    def peers(self) -> tuple[int, int, bool]:
        """How many peers, how many IPv4 prefixes on them, and whether nothing changed meanwhile.

        Counted by the attributes' heads: to walk them takes a second where the kernel is emulated.
        """
        messages = list(self.messages())
        raw = b"".join(message for _, message in messages)
        return raw.count(_KEY), raw.count(_INET), not any(flags & _DUMP_INTR for flags, _ in messages)


def _shown(interface: str) -> tuple[int, int, bool]:
    argv = ["wg", "show", interface, "allowed-ips"]
    shown = subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout
    return shown.count(b"\n"), shown.count(b".") // 3, True


def _look(name: str) -> Callable[[], tuple[int, int, bool]]:
    try:
        interface = _Interface(name)
        interface.peers()
    except OSError:
        return lambda: _shown(name)
    return interface.peers


def peers(name: str) -> None:
    """Say what is on the interface until nobody listens any more."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    look = _look(name)
    while True:
        peers, prefixes, whole = look()
        os.write(1, f"{time.monotonic():.4f} {peers} {prefixes} {whole:d}\n".encode())
        time.sleep(LINE)


def waits(name: str) -> None:
    """Say how long a read had to wait until nobody listens any more."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    interface = _Interface(name)
    clock, sleep = time.monotonic, time.sleep
    reads, longest, overslept = 0, 0.0, 0.0
    line_at = clock() + LINE
    while True:
        began = clock()
        for _ in interface.messages():
            pass
        ended = clock()
        sleep(PAUSE)
        woke = clock()
        reads += 1
        longest = max(longest, ended - began)
        overslept = max(overslept, woke - ended - PAUSE)
        if woke >= line_at:
            os.write(1, f"{woke:.4f} {reads} {longest:.4f} {overslept:.4f}\n".encode())
            reads, longest, overslept = 0, 0.0, 0.0
            line_at = woke + LINE


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        {"waits": waits, "peers": peers}[sys.argv[1]](sys.argv[2])
