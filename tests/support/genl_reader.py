"""A program that reads a WireGuard interface over and over, and says how long a read had to wait.

    python3 -I genl_reader.py INTERFACE

It stands for whatever else on the host needs the kernel's network lock. Every tenth of a second it prints
a line: monotonic time, reads, the longest read, and by how much the longest pause was overslept (which is
the machine's doing, not the lock's). It imports next to nothing and goes before all ordinary processes,
so that what it waits for is the lock. It ends once nobody reads what it prints.
"""

import contextlib
import os
import socket
import struct
import sys
import time

_HEADER = struct.Struct("=IHHIIBBH")  # nlmsghdr, genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_REQUEST, _DUMP = 1, 0x300
_ERROR, _DONE = 2, 3
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_GET_DEVICE, _IFNAME = 0, 2
PAUSE = 0.005
LINE = 0.1


def _request(kind: int, flags: int, command: int, attribute: int, value: str) -> bytes:
    raw = value.encode() + b"\0"
    body = _ATTRIBUTE.pack(4 + len(raw), attribute) + raw + bytes(-len(raw) % 4)
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0, command, 1, 0) + body


def _family(sock: socket.socket) -> int:
    sock.send(_request(_CONTROL, 0, _GET_FAMILY, _FAMILY_NAME, "wireguard"))
    reply = sock.recv(65536)
    at = _HEADER.size
    while at < len(reply):
        size, kind = _ATTRIBUTE.unpack_from(reply, at)
        if kind == _FAMILY_ID:
            return int(struct.unpack_from("=H", reply, at + 4)[0])
        at += (size + 3) & ~3
    raise OSError("the kernel has no WireGuard")


def _read(sock: socket.socket, request: bytes) -> None:
    sock.send(request)
    while True:
        reply = sock.recv(65536)
        at = 0
        while at < len(reply):
            length, kind = struct.unpack_from("=IH", reply, at)
            if kind == _ERROR:
                raise OSError("the interface can't be read")
            if kind == _DONE:
                return
            at += (length + 3) & ~3


def main(interface: str) -> None:
    """Read until nobody listens any more."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
    sock.bind((0, 0))
    request = _request(_family(sock), _DUMP, _GET_DEVICE, _IFNAME, interface)
    clock, sleep = time.monotonic, time.sleep
    reads, longest, overslept = 0, 0.0, 0.0
    line_at = clock() + LINE
    while True:
        began = clock()
        _read(sock, request)
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
        main(sys.argv[1])
