"""Netlink attributes, plainly written and read: what the codec is held against."""

import struct
from collections.abc import Iterator

NESTED = 0x8000


def attribute(kind: int, *values: bytes) -> bytes:
    value = b"".join(values)
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def nest(kind: int, *values: bytes) -> bytes:
    return attribute(kind | NESTED, *values)


def parse(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each attribute's type, with its NESTED flag, and its value."""
    while data:
        length, kind = struct.unpack_from("=HH", data)
        assert 4 <= length <= len(data)
        yield kind, data[4:length]
        data = data[length + (-length % 4) :]


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and what follows the generic-netlink header, of each netlink message."""
    while data:
        length, kind, flags = struct.unpack_from("=IHH", data)
        yield kind, flags, data[20:length]
        data = data[length + (-length % 4) :]
