"""What has happened lately, in order: the audit trail behind ``wg-agent events`` and ``explain``.

It lives in memory and is bounded; the log has the same for longer. What happens to many peers in one moment
is kept by column, since ten thousand sessions may begin or end at once (``rss_10k``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from msgspec import Struct

from agent.model import PublicKey

ROOM: Final = 20_000
"""Occurrences that are kept at least, if there were so many: all of a large location's end and begin anew."""


class Kind(StrEnum):
    """What can happen."""

    STARTED = "started"
    GRANTED = "granted"
    RENEWED = "renewed"
    ENDED = "ended"
    REFUSED = "refused"
    CLEARED = "cleared"
    DRIFT = "drift"
    LOCATION = "location"
    CORE_FOUND = "core_found"
    CORE_LOST = "core_lost"
    CORE_INVALID = "core_invalid"


class Subject(NamedTuple):
    """Whom it happened to, and why.

    ``peer`` is the text that core gave where its key can't be read, None where it is about no peer.
    ``reason`` is a word of the product (of EndReason, Refusal or DriftKind), ``detail`` a sentence.
    """

    peer: PublicKey | str | None = None
    session_id: str | None = None
    reason: str = ""
    detail: str = ""


class Occurrence(NamedTuple):
    """One thing that happened: the ``number``th of this process, at ``at`` by the host's wall clock.

    ``revision`` is core's that was held then, None before the first state.
    """

    number: int
    at: float
    kind: Kind
    revision: int | None
    subject: Subject


class _Moment(Struct, frozen=True, gc=False):
    """What happened at once to several; the columns of their subjects."""

    first: int
    at: float
    kind: Kind
    revision: int | None
    peers: tuple[PublicKey | str | None, ...]
    session_ids: tuple[str | None, ...]
    reasons: tuple[str, ...] | str
    details: tuple[str, ...] | str

    @property
    def end(self) -> int:
        return self.first + len(self.peers)

    def at_index(self, index: int) -> Occurrence:
        reasons, details = self.reasons, self.details
        subject = Subject(
            self.peers[index],
            self.session_ids[index],
            reasons if isinstance(reasons, str) else reasons[index],
            details if isinstance(details, str) else details[index],
        )
        return Occurrence(self.first + index, self.at, self.kind, self.revision, subject)


class Trail:
    """The latest occurrences, numbered from 1 in their order; the oldest are dropped."""

    def __init__(self, room: int = ROOM) -> None:
        self.next = 1
        """The number of the next occurrence."""
        self._room = room
        self._moments: deque[_Moment] = deque()

    def add(self, at: float, kind: Kind, revision: int | None, subjects: Sequence[Subject]) -> None:
        """Append what happened at once to these."""
        if not subjects:
            return
        peers, session_ids, reasons, details = zip(*subjects, strict=True)
        moment = _Moment(
            self.next, at, kind, revision, peers, session_ids, _one_if_same(reasons), _one_if_same(details)
        )
        self._moments.append(moment)
        self.next = moment.end
        while self.next - self._moments[0].end >= self._room:
            self._moments.popleft()

    @property
    def oldest(self) -> int:
        """The number of the oldest occurrence that is still known; ``next`` if there is none."""
        return self._moments[0].first if self._moments else self.next

    def after(self, number: int, limit: int) -> list[Occurrence]:
        """Return the first ``limit`` occurrences behind this number that are still known, in their order."""
        found: list[Occurrence] = []
        for moment in self._moments:
            if moment.end - 1 <= number:
                continue
            for index in range(max(0, number + 1 - moment.first), len(moment.peers)):
                if len(found) == limit:
                    return found
                found.append(moment.at_index(index))
        return found

    def of(self, peer: PublicKey, limit: int) -> list[Occurrence]:
        """Return the last ``limit`` occurrences of this peer, in their order."""
        found: list[Occurrence] = []
        for occurrence in self._backwards(peer):
            if len(found) == limit:
                break
            found.append(occurrence)
        return found[::-1]

    def _backwards(self, peer: PublicKey) -> Iterator[Occurrence]:
        for moment in reversed(self._moments):
            if peer in moment.peers:
                for index in range(len(moment.peers) - 1, -1, -1):
                    if moment.peers[index] == peer:
                        yield moment.at_index(index)


def _one_if_same(column: tuple[str, ...]) -> tuple[str, ...] | str:
    return column[0] if column.count(column[0]) == len(column) else column
