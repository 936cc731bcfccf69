"""Word from the kernel that somebody changed a table of nftables: a flush, another program's rules."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from agent.errors import GuardError

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER: Final = 12
_SOL_NETLINK, _ADD_MEMBERSHIP, _DROP_MEMBERSHIP = 270, 1, 2
_GROUP_NFTABLES: Final = 7
_SUBSYSTEM_NFTABLES: Final = 10
_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN = 0, 2, 3, 5
_NEWRULE, _DELRULE, _NEWSET, _DELSET = 6, 8, 9, 11
_DESTROYTABLE, _DESTROYCHAIN, _DESTROYRULE, _DESTROYSET = 26, 27, 28, 29
STRUCTURAL: Final = frozenset(
    (
        *(_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWSET, _DELSET),
        *(_DESTROYTABLE, _DESTROYCHAIN, _DESTROYRULE, _DESTROYSET),
    )
)
"""Changes of a table itself. Those of elements are left out: the agent makes them all the time."""

_HEADER: Final = struct.Struct("=IHHII4x")  # nlmsghdr, then nfgenmsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_TABLE: Final = 1  # of every kind of message that names one
_CHUNK: Final = 1 << 17
_BUFFER: Final = 1 << 20


def changed_tables(data: bytes) -> Iterator[str]:
    """Yield the names of the tables whose structure the messages in a datagram say was changed."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        end = at + length
        if length < _HEADER.size or end > len(data):
            return
        if kind >> 8 == _SUBSYSTEM_NFTABLES and kind & 0xFF in STRUCTURAL:
            yield from _table(data, at + _HEADER.size, end)
        at += (length + 3) & ~3


def _table(data: bytes, at: int, end: int) -> Iterator[str]:
    while at + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if size < _ATTRIBUTE.size or at + size > end:
            return
        if kind & 0x3FFF == _TABLE:
            yield data[at + _ATTRIBUTE.size : at + size].rstrip(b"\0").decode("ascii", "replace")
            return
        at += (size + 3) & ~3


class Watch:
    """A subscription to what happens to one table, from its making on; raises GuardError."""

    def __init__(self, table: str) -> None:
        self._table = table
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
                _NETLINK_NETFILTER,
            )
        except OSError as error:
            raise _deaf(error) from None
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, 1 << (_GROUP_NFTABLES - 1)))
        except OSError as error:
            self._socket.close()
            raise _deaf(error) from None

    async def changed(self) -> None:
        """Return once the table's structure was changed, or may have been while word was lost."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(self._socket, _CHUNK)
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return
                raise _deaf(error) from None
            if self._table in changed_tables(data):
                return

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Hear nothing in this block: for a large change of our own. Look at the table afterwards."""
        self._socket.setsockopt(_SOL_NETLINK, _DROP_MEMBERSHIP, _GROUP_NFTABLES)
        try:
            yield
        finally:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NFTABLES)

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()


def _deaf(error: OSError) -> GuardError:
    reason = os.strerror(error.errno or 0)
    return GuardError(f"nftables' notifications can't be had: {reason}", "run as root or with CAP_NET_ADMIN")
