"""Word from the kernel that somebody changed a table of nftables: a flush, another program's rules.

The kernel tells who made a change by the netlink port that it came from, and tells when word was lost. So
what was read once need not be read again while nobody else has changed it (``stats_tick_10k``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar, Final, NamedTuple

from agent.errors import GuardError

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER: Final = 12
_SOL_NETLINK, _ADD_MEMBERSHIP, _DROP_MEMBERSHIP = 270, 1, 2
_GROUP_NFTABLES: Final = 7
_SUBSYSTEM_NFTABLES: Final = 10
_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN = 0, 2, 3, 5
_NEWRULE, _DELRULE, _NEWSET, _DELSET = 6, 8, 9, 11
_DESTROYTABLE, _DESTROYCHAIN, _DESTROYRULE, _DESTROYSET = 26, 27, 28, 29
_NEWSETELEM, _DELSETELEM, _DESTROYSETELEM = 12, 14, 30
_STRUCTURAL: Final = frozenset(
    (
        *(_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWSET, _DELSET),
        *(_DESTROYTABLE, _DESTROYCHAIN, _DESTROYRULE, _DESTROYSET),
    )
)
_OF_ELEMENTS: Final = frozenset((_NEWSETELEM, _DELSETELEM, _DESTROYSETELEM))

_HEADER: Final = struct.Struct("=IHHII4x")  # nlmsghdr, then nfgenmsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_TABLE: Final = 1  # of every kind of message that names one
_CHUNK: Final = 1 << 17
_BUFFER: Final = 1 << 20


class Change(NamedTuple):
    """What a message tells: of which table, by which port, and whether it is the table itself.

    If it is not, then elements of its sets were changed.
    """

    table: str
    port: int
    structural: bool


def changes(data: bytes) -> Iterator[Change]:
    """Yield what the messages in a datagram tell of tables, sets, chains, rules and elements."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, port = _HEADER.unpack_from(data, at)
        end = at + length
        if length < _HEADER.size or end > len(data):
            return
        what = kind & 0xFF
        if kind >> 8 == _SUBSYSTEM_NFTABLES and (what in _STRUCTURAL or what in _OF_ELEMENTS):
            for table in _table(data, at + _HEADER.size, end):
                yield Change(table, port, what in _STRUCTURAL)
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
    """A subscription to what happens to one table, from its making on, in the running loop.

    ``own_port`` gives the port that the agent's own changes of elements come from; those are not heeded.
    Raises GuardError.
    """

    _open: ClassVar[weakref.WeakSet[Watch]] = weakref.WeakSet()
    """All of this process: one that listens has the kernel tell of each element, whoever else does not."""
    _lock: ClassVar = threading.Lock()

    def __init__(self, table: str, own_port: Callable[[], int | None]) -> None:
        self.touched = True
        """Whether the table may be otherwise than it was read, or made since: reset it, then read."""
        self._table = table
        self._own_port = own_port
        self._changed = asyncio.Event()
        self._fault: GuardError | None = None
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
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self.listen)
        with self._lock:
            self._open.add(self)

    @property
    def untouched(self) -> bool:
        """Whether nobody else has changed the table since ``touched`` was reset, as far as has been heard."""
        self.listen()
        return self._fault is None and not self.touched

    async def changed(self) -> None:
        """Return once the table's structure was changed, or may have been while word was lost."""
        await self._changed.wait()
        self._changed.clear()
        if self._fault is not None:
            raise self._fault

    def listen(self) -> None:
        """Take in what the kernel has said by now: all that was in force before this call."""
        while self._fault is None:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                self.touched = True
                self._changed.set()
                if error.errno != errno.ENOBUFS:
                    self._fault = _deaf(error)
                    self._loop.remove_reader(self._socket)
                continue
            for change in changes(data):
                if change.table == self._table and (change.structural or change.port != self._own_port()):
                    self.touched = True
                    if change.structural:
                        self._changed.set()

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Hear nothing in this block: for a large change of our own. Look at the table afterwards.

        So for every other watch of this process, which takes its table for changed then.
        """
        with self._lock:
            others = [watch for watch in self._open if watch is not self]
        with contextlib.ExitStack() as stack:
            for watch in others:
                stack.enter_context(watch.deafened())
            stack.enter_context(self._unsubscribed())
            yield

    @contextlib.contextmanager
    def deafened(self) -> Iterator[None]:
        """Hear nothing in this block, which is for somebody else's change; ``changed`` returns after it."""
        try:
            with self._unsubscribed():
                yield
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._changed.set)

    @contextlib.contextmanager
    def _unsubscribed(self) -> Iterator[None]:
        self._belong(_DROP_MEMBERSHIP)
        try:
            yield
        finally:
            self.touched = True
            self._belong(_ADD_MEMBERSHIP)

    def _belong(self, option: int) -> None:
        if self._socket.fileno() != -1:
            self._socket.setsockopt(_SOL_NETLINK, option, _GROUP_NFTABLES)

    def close(self) -> None:
        """End the subscription."""
        with self._lock:
            self._open.discard(self)
        self._loop.remove_reader(self._socket)
        self._socket.close()


def _deaf(error: OSError) -> GuardError:
    reason = os.strerror(error.errno or 0)
    return GuardError(f"nftables' notifications can't be had: {reason}", "run as root or with CAP_NET_ADMIN")
