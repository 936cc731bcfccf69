"""Unpacking what came compressed, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from agent.errors import InvalidMessage

PIECE: Final = 256 * 1024
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS


class Gunzip:
    """Unpacks gzip (RFC 1952, members one after another) a bounded piece at a time."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP_WINDOW)
        self._begun = False

    @property
    def complete(self) -> bool:
        """Whether what was fed is a whole number of members, and at least one."""
        return self._member.eof or not self._begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Give the unpacked pieces; raises InvalidMessage."""
        if not data:
            return
        self._begun = True
        while True:
            if self._member.eof:
                self._member = zlib.decompressobj(_GZIP_WINDOW)
            try:
                piece = self._member.decompress(data, PIECE)
            except zlib.error:
                raise InvalidMessage("core's answer is not the gzip data it says it is") from None
            yield piece
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            # A full piece with no input left may still have more to give.
            if not data and (self._member.eof or len(piece) < PIECE):
                return
