"""Elements of nftables' sets as the kernel's messages: a transaction and its outcome, and a listing.

nft's own language is for what is changed now and then. Elements come by the ten thousand, and their text
takes libnftables twenty times as long to read as the kernel takes to carry it out (``cold_sync_10k``).

Sources: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, linux/netlink.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from itertools import repeat
from typing import Final, NamedTuple

NETLINK_NETFILTER: Final = 12
_SUBSYSTEM: Final = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END, _ERROR, _DONE = 0x10, 0x11, 2, 3
_REQUEST, _ACK, _DUMP_INTR, _DUMP, _CREATE = 0x1, 0x4, 0x10, 0x300, 0x400
_GET: Final = 13  # NFT_MSG_GETSETELEM
_INET: Final = 1  # NFPROTO_INET
_NESTED: Final = 0x8000
_TABLE, _SET, _ELEMENTS = 1, 2, 3  # NFTA_SET_ELEM_LIST_*
_ELEMENT, _KEY, _VALUE, _TIMEOUT, _EXPIRATION = 1, 1, 1, 4, 5
"""NFTA_LIST_ELEM, NFTA_SET_ELEM_*, NFTA_DATA_VALUE."""

_HEADER: Final = struct.Struct("=IHHIIBBH")  # nlmsghdr, nfgenmsg
_MESSAGE: Final = struct.Struct("=IHHII")
_CODE: Final = struct.Struct("=i")
_ATTRIBUTE: Final = struct.Struct("=HH")
CATCH_ALL: Final = b""
"""Stands for the key of an element that has none: all keys match it."""
_NEST_SIZE: Final = 65_000
"""An attribute's length has 16 bits."""
_WIDTHS: Final = (4, 16)
"""Bytes of a key: an IPv4 address, or an IPv6 address or an interface's name."""
_TIMED: Final = {width: struct.Struct(f">12s{width}s4sQ") for width in _WIDTHS}
"""The element's head, its key, and its life, which nftables has in network order."""
_TIMEOUT_SIZE: Final = 12
_TIMEOUT_HEAD: Final = _ATTRIBUTE.pack(_TIMEOUT_SIZE, _TIMEOUT)
_EXPIRATION_HEAD: Final = _ATTRIBUTE.pack(_TIMEOUT_SIZE, _EXPIRATION)
_TYPE_MASK: Final = 0x3FFF
_LISTED_PLAIN: Final = {width: struct.Struct(f"=12s{width}s") for width in _WIDTHS}
_LISTED_TIMED: Final = {width: struct.Struct(f">12s{width}s4s8x4sQ") for width in _WIDTHS}
"""How the kernel lists most elements: without a time, and with a life and what is left of it."""


class Verb(IntEnum):
    """What is done with elements; the numbers are the kernel's (NFT_MSG_*SETELEM)."""

    ADD = 12
    """One that is there already stays as it is, whatever its time; newer kernels give it the new time."""
    DELETE = 14
    """One that is not there, or has expired, fails the whole transaction."""


class ElementChange(NamedTuple):
    """Elements of one set: their keys as the kernel holds them, all of 4 or all of 16 bytes.

    Each with its life in whole milliseconds, at least 1, or None for the set's own.
    """

    verb: Verb
    set: str
    elements: Mapping[bytes, int | None]


def transaction(table: str, changes: Iterable[ElementChange], sequence: int) -> tuple[bytes, int]:
    """Return the messages that carry all of it out, or none of it, in an inet table.

    They are numbered from ``sequence`` on; also returns the number of the last one, which is
    acknowledged once all is in force. That is ``sequence - 1`` if there is nothing to do.
    """
    head = _attribute(_TABLE, table.encode("ascii") + b"\0")
    bodies: list[tuple[Verb, bytes]] = []
    for verb, name, elements in changes:
        place = head + _attribute(_SET, name.encode("ascii") + b"\0")
        bodies += [
            (verb, place + _ATTRIBUTE.pack(4 + len(nest), _ELEMENTS | _NESTED) + nest)
            for nest in _nests(elements)
        ]
    messages = [_message(_BATCH_BEGIN, _REQUEST, sequence, b"", _SUBSYSTEM)]
    last = sequence + len(bodies) - 1
    for number, (verb, body) in enumerate(bodies, sequence):
        flags = _REQUEST | (_CREATE if verb is Verb.ADD else 0) | (_ACK if number == last else 0)
        messages.append(_message(_SUBSYSTEM << 8 | verb, flags, number, body))
    messages.append(_message(_BATCH_END, _REQUEST, last, b"", _SUBSYSTEM))
    return b"".join(messages), last


def outcome(data: bytes, first: int, last: int) -> int | None:
    """Return what a datagram of the kernel's says of a transaction: 0 in force, else the errno.

    None if it says nothing of the messages with these numbers.
    """
    at, acknowledged = 0, None
    while at + _MESSAGE.size <= len(data):
        length, kind, _, sequence, _ = _MESSAGE.unpack_from(data, at)
        if length < _MESSAGE.size:
            break
        if kind == _ERROR and first <= sequence <= last:
            (code,) = _CODE.unpack_from(data, at + _MESSAGE.size)
            if code:
                return -int(code)
            if sequence == last:
                acknowledged = 0
        at += (length + 3) & ~3
    return acknowledged


def listing_request(table: str, name: str, sequence: int) -> bytes:
    """Return the message that asks for all elements of a set in an inet table."""
    body = _attribute(_TABLE, table.encode("ascii") + b"\0") + _attribute(_SET, name.encode("ascii") + b"\0")
    return _message(_SUBSYSTEM << 8 | _GET, _REQUEST | _DUMP, sequence, body)


class ListingInterruptedError(Exception):
    """The table changed while its elements were listed."""


class ElementListing:
    """The answer to such a request, datagram by datagram.

    ``elements`` maps keys to the seconds that are left of them, None where nothing is said of that.
    """

    def __init__(self, sequence: int) -> None:
        self.elements: dict[bytes, float | None] = {}
        self._sequence = sequence

    def feed(self, data: bytes) -> int | None:
        """Take in a datagram: None if there is more to come, 0 at the end, or the errno of a failure.

        Raises ListingInterruptedError, and ValueError for what is no listing of elements.
        """
        at = 0
        while at + _MESSAGE.size <= len(data):
            length, kind, flags, sequence, _ = _MESSAGE.unpack_from(data, at)
            end = at + length
            if length < _MESSAGE.size or end > len(data):
                raise ValueError("a message is cut off")
            if sequence == self._sequence:
                if flags & _DUMP_INTR:
                    raise ListingInterruptedError
                if kind in {_ERROR, _DONE}:
                    return -int(_CODE.unpack_from(data, at + _MESSAGE.size)[0])
                for what, start, stop in _attributes(data, at + _HEADER.size, end):
                    if what == _ELEMENTS:
                        self._take(data, start, stop)
            at += (length + 3) & ~3
        return None

    def _take(self, data: bytes, start: int, stop: int) -> None:
        if start == stop:
            return
        size = _ATTRIBUTE.unpack_from(data, start)[0]
        elements = data[start:stop]
        if not (stop - start) % size:
            for width in _WIDTHS:
                if size == _LISTED_PLAIN[width].size:
                    rows = list(_LISTED_PLAIN[width].iter_unpack(elements))
                    if {head for head, _ in rows} == {_listed_head(width, 0)}:
                        self.elements.update((key, None) for _, key in rows)
                        return
                if size == _LISTED_TIMED[width].size:
                    timed = list(_LISTED_TIMED[width].iter_unpack(elements))
                    heads = _listed_head(width, 2 * _TIMEOUT_SIZE), _TIMEOUT_HEAD, _EXPIRATION_HEAD
                    if {(one, two, three) for one, _, two, three, _ in timed} == {heads}:
                        self.elements.update((key, left / 1000) for _, key, _, _, left in timed)
                        return
        for _, first, last in _attributes(data, start, stop):
            self._take_one(data, first, last)

    def _take_one(self, data: bytes, start: int, stop: int) -> None:
        key, left = CATCH_ALL, None
        for what, first, last in _attributes(data, start, stop):
            if what == _KEY:
                for inner, begin, end in _attributes(data, first, last):
                    if inner == _VALUE:
                        key = data[begin:end]
            elif what == _EXPIRATION:
                left = int.from_bytes(data[first:last], "big") / 1000
        self.elements[key] = left


def _attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield each attribute's type and where its value starts and ends."""
    while start < end:
        if end - start < _ATTRIBUTE.size:
            raise ValueError("an attribute is cut off")
        size, kind = _ATTRIBUTE.unpack_from(data, start)
        if size < _ATTRIBUTE.size or start + size > end:
            raise ValueError("an attribute's length is wrong")
        yield kind & _TYPE_MASK, start + _ATTRIBUTE.size, start + size
        start += (size + 3) & ~3


def _nests(elements: Mapping[bytes, int | None]) -> Iterator[bytes]:
    """Yield the elements as lists that fit into an attribute; those with a time of their own come last."""
    plain = [key for key, life in elements.items() if life is None]
    for keys in _portions(plain, _plain_head):
        head = _plain_head(len(keys[0]))
        yield b"".join((head, head.join(keys)))
    timed = [key for key, life in elements.items() if life is not None]
    for keys in _portions(timed, _timed_head):
        width = len(keys[0])
        pack, lives = _TIMED[width].pack, [elements[key] for key in keys]
        yield b"".join(map(pack, repeat(_timed_head(width)), keys, repeat(_TIMEOUT_HEAD), lives))


def _portions(keys: list[bytes], head: Callable[[int], bytes]) -> Iterator[list[bytes]]:
    if keys:
        width = len(keys[0])
        size = len(head(width)) + width + (_TIMEOUT_SIZE if head is _timed_head else 0)
        most = _NEST_SIZE // size
        yield from (keys[at : at + most] for at in range(0, len(keys), most))


def _plain_head(width: int) -> bytes:
    """Return what stands before the key of an element that has the set's own life."""
    return _element_head(width, 0)


def _timed_head(width: int) -> bytes:
    return _element_head(width, _TIMEOUT_SIZE)


def _listed_head(width: int, more: int) -> bytes:
    """Return the same as the kernel writes it."""
    return _element_head(width, more, nested=0)


def _element_head(width: int, more: int, *, nested: int = _NESTED) -> bytes:
    own = 3 * _ATTRIBUTE.size + width
    return b"".join(
        (
            _ATTRIBUTE.pack(own + more, nested | _ELEMENT),
            _ATTRIBUTE.pack(own - 4, nested | _KEY),
            _ATTRIBUTE.pack(own - 8, _VALUE),
        )
    )


def _attribute(kind: int, raw: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(raw), kind) + raw + bytes(-len(raw) % 4)


def _message(kind: int, flags: int, sequence: int, body: bytes, resource: int = 0) -> bytes:
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, kind, flags, sequence, 0, _INET, 0, socket.htons(resource)) + body
