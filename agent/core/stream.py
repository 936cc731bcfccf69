"""The framing of the change stream: server-sent events, from bytes, in bounded memory.

Source: the HTML standard, section 9.2.6 «Interpreting an event stream». Two differences. An event
without an id has none, instead of the previous event's: with that it would pass for an event that
is already held, and an unreadable change must not be skipped. And an event is given out even without
data, whatever its lines say (but for a lone ``retry``), for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from agent.errors import InvalidMessage

EVENT_SIZE: Final = 1024 * 1024
"""The most bytes that one event may have. An event holds one peer or one location, so a core that
sends more is broken; ``core.max_body`` bounds a whole list of peers and would be no bound here."""


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """An event as framed: ``data`` is as it came, its lines joined by newlines."""

    type: str
    id: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A comment line: core is there."""


class EventParser:
    """Takes a stream apart; one parser a connection."""

    def __init__(self, event_size: int = EVENT_SIZE) -> None:
        self._limit = event_size
        self._pending = bytearray()  # the line that has not ended yet
        self._after_cr = False
        self._at_start = True
        self._reset()

    def _reset(self) -> None:
        self._type = b""
        self._id = b""
        self._data: list[bytes] = []
        self._says_something = False
        self._size = 0

    def feed(self, chunk: bytes) -> list[ServerEvent | Heartbeat]:
        """Return what the chunk completes. Raises InvalidMessage for an event over the limit."""
        found: list[ServerEvent | Heartbeat] = []
        if not chunk:
            return found
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        lines = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for ended in lines[:-1]:
            if self._pending:
                ended = bytes(self._pending) + ended  # noqa: PLW2901 - the line's first part
                self._pending.clear()
            if self._at_start:
                ended = ended.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901 - a byte order mark
                self._at_start = False
            if (item := self._line(ended)) is not None:
                found.append(item)
        self._pending += lines[-1]
        self._bound(len(self._pending))
        return found

    def _bound(self, more: int) -> None:
        if self._size + more > self._limit:
            raise InvalidMessage(
                f"an event of core's change stream has more than {self._limit} bytes",
                "core does not keep to the API",
            )

    def _line(self, line: bytes) -> ServerEvent | Heartbeat | None:
        if not line:
            return self._dispatch()
        if line[0] == 0x3A:  # a colon
            return Heartbeat()
        self._bound(len(line))
        self._size += len(line)
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        self._says_something |= field != b"retry"
        match field:
            case b"event":
                self._type = value
            case b"data":
                self._data.append(value)
            case b"id":
                self._id = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        event = None
        if self._says_something:
            event = ServerEvent(
                self._type.decode("utf-8", "replace"),
                self._id.decode("utf-8", "replace"),
                b"\n".join(self._data),
            )
        self._reset()
        return event
