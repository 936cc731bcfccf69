"""What came from core, as it came: the material that the judges are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.core.stream import Heartbeat, ServerEvent
from agent.fence import Position

_MOMENT: Final = 10
"""The most seconds of a Retry-After that are waited for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a request; ``status`` is 0 if there was none, and ``error`` says why.

    With a status, ``error`` says what was wrong with the body, which is empty then.
    ``headers`` by lower-case name, ``body`` unpacked. ``sent`` and ``received`` are wall and boot
    time in seconds when the request was sent and when the answer was whole.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    error: str = ""
    hint: str = ""
    sent_wall: float = 0.0
    sent: float = 0.0
    received: float = 0.0

    @property
    def media_type(self) -> str:
        """The Content-Type without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def moment(self) -> int | None:
        """The seconds after which core asks to be asked again (429 or 503), if it will be short."""
        wait = self.headers.get("retry-after", "")
        asks = self.status in {429, 503} and wait.isascii() and wait.isdecimal()
        return int(wait) if asks and int(wait) <= _MOMENT else None

    def __str__(self) -> str:
        """What to say of it in one phrase."""
        return self.error or f"core answered {self.status}"


@dataclass(slots=True)
class StreamRecord:
    """One connection to the change stream: what was asked for, and what came when.

    Times are monotonic, in seconds. ``ended`` is None while it is open; ``let_go`` says that it was
    closed on this side. ``current``: it was opened from what had just been core's own position.
    """

    asked: str
    began: float
    current: bool = False
    head: Answer | None = None
    items: list[tuple[float, ServerEvent | Heartbeat]] = field(default_factory=list)
    ended: float | None = None
    let_go: bool = False
    fault: str = ""

    @property
    def events(self) -> list[ServerEvent]:
        """The events without the heartbeats."""
        return [item for _, item in self.items if isinstance(item, ServerEvent)]

    @property
    def is_open(self) -> bool:
        """Whether core has opened it with 200."""
        return self.head is not None and self.head.status == 200


@dataclass(frozen=True, slots=True)
class Step:
    """A change that core was made to make, about these public keys."""

    action: str
    keys: tuple[str, ...] = ()


def show(position: Position | None) -> str:
    """EPOCH:REVISION, or that there is none."""
    return "no position" if position is None else str(position)
