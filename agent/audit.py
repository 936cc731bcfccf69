"""What an operator reads about sessions, peers, drift and core: in the log, and in the audit trail."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Final

import structlog

from agent.encoding import format_key, format_time
from agent.model import Change, Location, Now, PublicKey, Refusal, SessionEnd, SessionGranted, SessionRevoked
from agent.plan import Drift
from agent.state import State
from agent.trail import Kind, Occurrence, Subject, Subjects, Trail, one

_log = structlog.get_logger("agent.audit")
_ONE_BY_ONE: Final = 50
"""Changes, session ends or differences of one moment that get a line each; more are summed up.

A line costs more than the change itself, and the next ones would wait for it.
"""
_LINES: Final = {
    Kind.GRANTED: "session granted",
    Kind.RENEWED: "session renewed",
    Kind.ENDED: "session ended",
    Kind.REFUSED: "peer refused",
    Kind.CLEARED: "peer no longer refused",
    Kind.DRIFT: "drift",
}
_MORE: Final = {
    Kind.GRANTED: "more sessions granted",
    Kind.RENEWED: "more sessions renewed",
    Kind.ENDED: "more sessions ended",
    Kind.REFUSED: "more peers refused",
    Kind.CLEARED: "more peers no longer refused",
    Kind.DRIFT: "more drift",
}
_WARNINGS: Final = frozenset({Kind.REFUSED, Kind.DRIFT})
_DETAIL: Final = 200
"""Characters of core's own words that are kept."""
_NONSENSE_EVERY: Final = 600.0
"""Seconds after which the same invalid thing is told again."""
_READERS: Final = 16
"""How many may wait for news at once; others are answered at once, so that the operator is let in."""


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


class Audit:
    """Writes down what has become of the state's peers and sessions; on the loop only.

    ``read_clock`` is the host's.
    """

    def __init__(self, state: State, read_clock: Callable[[], Now]) -> None:
        self.trail = Trail()
        self._state = state
        self._clock = read_clock
        self._process = uuid.uuid4().hex[:8]
        self._moved = asyncio.Event()
        self._readers = 0
        self._closed = False
        self._has_started = False
        self._early: list[SessionEnd] = []
        """Ends that the start has brought: they are told after it."""
        self._told: set[str] = set()
        """Ids of sessions whose end is told and not journalled yet."""
        self._location: Location | None = None
        self._unreadable = state.roster.unreadable
        self._nonsense = ("", 0.0)
        """The last invalid thing that was told, and when by boot time."""

    # What happens.

    def started(self, peers_found: int, sessions_adopted: int) -> None:
        """The agent has taken over what it found; what it knows from before is no news."""
        _log.info("started", peers_found=peers_found, sessions_adopted=sessions_adopted)
        self._location = self._state.location
        self._has_started = True
        self._state.forget_news()
        detail = f"{_counted(peers_found, 'peer')} found, {_counted(sessions_adopted, 'session')} adopted"
        self._tell(Kind.STARTED, one(Subject(detail=detail)))
        self._tell_ends(self._early)
        self._early = []

    def changed(self, changes: Sequence[Change]) -> None:
        """Changes of core's were taken; what has come of them is told by ``followed``."""
        for change in changes[:_ONE_BY_ONE]:
            match change.body:
                case SessionGranted():
                    pass
                case SessionRevoked(key, session_id):
                    _log.info(
                        "session revoked", peer=format_key(key), session=session_id, revision=change.revision
                    )
                case body:
                    _log.info("change taken", change=type(body).__name__, revision=change.revision)
        if len(changes) > _ONE_BY_ONE:
            more = changes[_ONE_BY_ONE:]
            kinds = Counter(type(change.body).__name__ for change in more)
            _log.info("more changes taken", by_change=kinds, revision=more[-1].revision)

    def followed(self) -> None:
        """The interface has followed the state, where it could be reached: tell what is new of it."""
        state = self._state
        if not self._has_started:
            return
        if state.location is not None and state.location != self._location:
            self._location = state.location
            needs = "requires MFA" if state.location.mfa_required else "requires no MFA"
            self._tell(Kind.LOCATION, one(Subject(detail=f"{state.location.name} {needs}")))
        self._tell_admitted()
        refused, cleared = state.roster.take_judged()
        self._tell_judged(Kind.REFUSED, refused)
        self._tell_judged(Kind.CLEARED, cleared)
        if state.roster.unreadable is not self._unreadable:
            known, self._unreadable = set(self._unreadable), state.roster.unreadable
            new = [entry for entry in self._unreadable if entry not in known]
            subjects = Subjects(
                tuple(entry.public_key for entry in new),
                reasons=tuple(entry.reason.value for entry in new),
                names=tuple(entry.name for entry in new),
            )
            self._tell(Kind.REFUSED, subjects)

    def ended(self, ends: Sequence[SessionEnd]) -> None:
        """These sessions are over, and their peers off the interface; each is told once until ``kept``."""
        told = self._told
        fresh = [end for end in ends if end.session_id not in told] if told else ends
        told.update(end.session_id for end in fresh)
        if not self._has_started:
            self._early += fresh
            return
        # A session that began and ended in one step is told of in that order.
        self._tell_admitted({end.session_id for end in fresh})
        self._tell_ends(fresh)

    def kept(self, ends: Sequence[SessionEnd]) -> None:
        """These ends are journalled: they do not come again."""
        self._told.difference_update(end.session_id for end in ends)

    def drifted(self, drift: Sequence[Drift]) -> None:
        """Somebody else changed the interface, its peers or their guard."""
        subjects = Subjects(
            tuple(found.public_key for found in drift),
            reasons=tuple(found.kind.value for found in drift),
            details=tuple(found.detail for found in drift),
            names=self._names([found.public_key for found in drift]),
        )
        self._tell(Kind.DRIFT, subjects)

    def core_found(self) -> None:
        """Core answers, and did not before."""
        _log.info("core found")
        self._tell(Kind.CORE_FOUND, one(Subject()))

    def core_lost(self, error: Exception) -> None:
        """Core does not answer, or not any more."""
        _log.warning("core lost", error=str(error))
        self._tell(Kind.CORE_LOST, one(Subject(detail=str(error)[:_DETAIL])))

    def core_invalid(self, error: Exception) -> None:
        """Core sent something invalid, which was refused whole."""
        _log.warning("core sent something invalid", error=str(error))
        detail, now = str(error)[:_DETAIL], self._clock().boot
        # The same again and again would push out everybody's history.
        if detail != self._nonsense[0] or now - self._nonsense[1] >= _NONSENSE_EVERY:
            self._nonsense = detail, now
            self._tell(Kind.CORE_INVALID, one(Subject(detail=detail)))

    def _tell_admitted(self, only: Collection[str] | None = None) -> None:
        """Tell of the sessions that have begun or were renewed, or of those with these ids."""
        for kind, admitted in ((Kind.GRANTED, self._state.granted), (Kind.RENEWED, self._state.renewed)):
            for revision, sessions in list(admitted.items()):
                told = sessions if only is None else [session for session in sessions if session.id in only]
                if not told:
                    continue
                keys = [session.public_key for session in told]
                ids = tuple(session.id for session in told)
                self._tell(kind, Subjects(tuple(keys), ids, names=self._names(keys)), revision)
                if len(told) == len(sessions):
                    del admitted[revision]
                else:
                    admitted[revision] = [session for session in sessions if session.id not in (only or ())]

    def _tell_ends(self, ends: Sequence[SessionEnd]) -> None:
        """Each with the revision that has ended it: by now later ones may be held."""
        ended_by = tuple(self._state.ended_by.pop(end.session_id, None) for end in ends)
        at_once = len(set(ended_by)) == 1
        subjects = Subjects(
            tuple(end.public_key for end in ends),
            tuple(end.session_id for end in ends),
            tuple(end.reason.value for end in ends),
            names=self._names([end.public_key for end in ends]),
            revisions=None if at_once else ended_by,
        )
        self._tell(Kind.ENDED, subjects, ended_by[0] if at_once else None)

    def _tell_judged(self, kind: Kind, judged: Sequence[tuple[PublicKey, Refusal]]) -> None:
        keys = [key for key, _ in judged]
        reasons = tuple(why.value for _, why in judged)
        self._tell(kind, Subjects(tuple(keys), reasons=reasons, names=self._names(keys)))

    def _names(self, keys: Sequence[PublicKey | None]) -> tuple[str | None, ...]:
        """What core calls these, or called them before it listed them no longer."""
        listed = self._state.roster.peers
        names = [listed[key].name if key is not None and key in listed else None for key in keys]
        if names.count(None) <= _ONE_BY_ONE:
            for index, key in enumerate(keys):
                if names[index] is None and key is not None:
                    before = self.trail.of(key, 1)
                    names[index] = before[0].subject.name if before else None
        return tuple(names)

    def _tell(self, kind: Kind, subjects: Subjects, revision: int | None = None) -> None:
        if not len(subjects):
            return
        state = self._state
        if revision is None and state.epoch is not None:
            revision = state.revision
        self.trail.add(self._clock().wall, kind, revision, subjects)
        if kind in _LINES:
            _write_lines(kind, subjects, revision)
        self._moved.set()
        self._moved = asyncio.Event()

    # Who asks.

    async def events(
        self, after: int | None, limit: int, wait: float, process: str | None = None, who: str | None = None
    ) -> dict[str, Any]:
        """What is behind a number, or else the last ``limit``, as ``Operator.events`` says."""
        trail = self.trail
        fits = None if who is None else partial(_is_about, who=who)
        if after is None:
            found = trail.last(limit, fits or _is_anything)
            return self._answer(found, trail.next - 1, 0)
        if process not in {None, self._process}:
            after = 0
        if wait and self._readers < _READERS:
            self._readers += 1
            try:
                await self.news(after, wait)
            finally:
                self._readers -= 1
        found = trail.after(after, limit)
        last = found[-1].number if found else max(after, trail.next - 1)
        if fits is not None:
            found = [occurrence for occurrence in found if fits(occurrence.subject)]
        return self._answer(found, last, max(0, trail.oldest - 1 - after))

    def _answer(self, found: Sequence[Occurrence], last: int, missed: int) -> dict[str, Any]:
        return {"process": self._process, "missed": missed, "last": last, "events": self.documents(found)}

    async def news(self, number: int, seconds: float) -> None:
        """Wait until there is something behind this number, or the agent stops, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.trail.next <= number + 1 and not self._closed:
                    await self._moved.wait()

    def close(self) -> None:
        """The agent stops: nobody waits for news any more."""
        self._closed = True
        self._moved.set()

    def documents(self, occurrences: Sequence[Occurrence]) -> list[dict[str, Any]]:
        """These as ``wg-agent events --json`` shows them."""
        return [_document(occurrence) for occurrence in occurrences]


def _document(occurrence: Occurrence) -> dict[str, Any]:
    subject = occurrence.subject
    return {
        "number": occurrence.number,
        "at": format_time(occurrence.at),
        "event": occurrence.kind.value,
        "public_key": _shown(subject.peer),
        "name": subject.name,
        "session_id": subject.session_id,
        "revision": occurrence.revision,
        "reason": subject.reason or None,
        "detail": subject.detail or None,
    }


def _is_anything(_: Subject) -> bool:
    return True


def _is_about(subject: Subject, who: str) -> bool:
    """Whether it concerns a peer with this name, or whose key begins so; what concerns nobody does not."""
    return subject.name == who or (subject.peer is not None and (_shown(subject.peer) or "").startswith(who))


def _shown(peer: PublicKey | str | None) -> str | None:
    return format_key(peer) if isinstance(peer, bytes) else peer


def _write_lines(kind: Kind, subjects: Subjects, revision: int | None) -> None:
    write = _log.warning if kind in _WARNINGS else _log.info
    for index in range(min(_ONE_BY_ONE, len(subjects))):
        subject = subjects.subject(index)
        about: dict[str, Any] = {"peer": _shown(subject.peer)}
        if not isinstance(subject.peer, bytes) and subject.name:
            about["name"] = subject.name
        if subject.session_id is not None:
            about["session"] = subject.session_id
        if kind is Kind.DRIFT:
            about |= {"kind": subject.reason, "detail": subject.detail}
        elif subject.reason:
            about["reason"] = subject.reason
        write(_LINES[kind], **about, revision=subjects.revision(index, revision))
    if len(subjects) > _ONE_BY_ONE:
        reasons = subjects.reasons
        if isinstance(reasons, str):
            write(_MORE[kind], count=len(subjects) - _ONE_BY_ONE, revision=revision)
        else:
            by = Counter(reasons[_ONE_BY_ONE:])
            write(_MORE[kind], **{"by_kind" if kind is Kind.DRIFT else "by_reason": by}, revision=revision)
