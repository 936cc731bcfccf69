"""What has happened lately, in order: the audit trail behind ``wg-agent events`` and ``explain``.

It lives in memory and is bounded; the log has the same for longer. What happens to many peers in one moment
is kept by column, since ten thousand sessions may begin or end at once (``rss_10k``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from msgspec import Struct

from agent.model import PublicKey

ROOM: Final = 10_000
"""Occurrences that are kept at least, if there were so many."""


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

    ``peer`` is the text that core gave where its key can't be read, None where it is about no peer; ``name``
    is what core called it then. ``reason`` is a word of the product (of EndReason, Refusal or DriftKind),
    ``detail`` a sentence.
    """

    peer: PublicKey | str | None = None
    session_id: str | None = None
    reason: str = ""
    detail: str = ""
    name: str | None = None


class Occurrence(NamedTuple):
    """One thing that happened: the ``number``th of this process, at ``at`` by the host's wall clock.

    ``revision`` is core's that was held then, None before the first state.
    """

    number: int
    at: float
    kind: Kind
    revision: int | None
    subject: Subject


class Subjects(Struct, frozen=True, gc=False):
    """Those to whom something happens at once, by column; what is the same for all stands there once."""

    peers: tuple[PublicKey | str | None, ...]
    session_ids: tuple[str | None, ...] | None = None
    reasons: tuple[str, ...] | str = ""
    details: tuple[str, ...] | str = ""
    names: tuple[str | None, ...] | None = None
    revisions: tuple[int | None, ...] | None = None
    """Where they differ from each other."""

    def __len__(self) -> int:
        return len(self.peers)

    def subject(self, index: int) -> Subject:
        """Return one of them."""
        reasons, details = self.reasons, self.details
        return Subject(
            self.peers[index],
            None if self.session_ids is None else self.session_ids[index],
            reasons if isinstance(reasons, str) else reasons[index],
            details if isinstance(details, str) else details[index],
            None if self.names is None else self.names[index],
        )

    def revision(self, index: int, of_all: int | None) -> int | None:
        """Return that of one of them, ``of_all`` where it is the same for all or not known for this one."""
        own = None if self.revisions is None else self.revisions[index]
        return of_all if own is None else own


def one(subject: Subject) -> Subjects:
    """Return the columns of a single subject."""
    session_ids = None if subject.session_id is None else (subject.session_id,)
    names = None if subject.name is None else (subject.name,)
    return Subjects((subject.peer,), session_ids, subject.reason, subject.detail, names)


class _Moment(Struct, frozen=True, gc=False):
    """What happened at once to several."""

    first: int
    at: float
    kind: Kind
    revision: int | None
    subjects: Subjects

    @property
    def end(self) -> int:
        return self.first + len(self.subjects)

    def occurrence(self, index: int) -> Occurrence:
        subjects = self.subjects
        revision = subjects.revision(index, self.revision)
        return Occurrence(self.first + index, self.at, self.kind, revision, subjects.subject(index))


class Trail:
    """The latest occurrences, numbered from 1 in their order; the oldest are dropped."""

    def __init__(self, room: int = ROOM) -> None:
        self.next = 1
        """The number of the next occurrence."""
        self._room = room
        self._moments: deque[_Moment] = deque()

    def add(self, at: float, kind: Kind, revision: int | None, subjects: Subjects) -> None:
        """Append what happened at once to these."""
        if not len(subjects):
            return
        moment = _Moment(self.next, at, kind, revision, subjects)
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
        moments: list[_Moment] = []
        for moment in reversed(self._moments):
            if moment.end - 1 <= number:
                break
            moments.append(moment)
        found: list[Occurrence] = []
        for moment in reversed(moments):
            for index in range(max(0, number + 1 - moment.first), len(moment.subjects)):
                if len(found) == limit:
                    return found
                found.append(moment.occurrence(index))
        return found

    def last(self, limit: int, fits: Callable[[Subject], bool]) -> list[Occurrence]:
        """Return the last ``limit`` occurrences whose subject fits, in their order."""
        found: list[Occurrence] = []
        for moment in reversed(self._moments):
            for index in range(len(moment.subjects) - 1, -1, -1):
                if len(found) == limit:
                    return found[::-1]
                if fits(moment.subjects.subject(index)):
                    found.append(moment.occurrence(index))
        return found[::-1]

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
            peers = moment.subjects.peers
            if peer in peers:
                for index in range(len(peers) - 1, -1, -1):
                    if peers[index] == peer:
                        yield moment.occurrence(index)
