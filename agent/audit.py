"""What an operator reads about sessions, peers, drift and core: in the log, and in the audit trail."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from agent.encoding import format_key, format_time
from agent.model import Change, Location, Now, PublicKey, SessionEnd, SessionGranted, SessionRevoked
from agent.plan import Drift
from agent.state import State
from agent.trail import Kind, Occurrence, Subject, Trail

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
        self._closed = False
        self._has_started = False
        self._location: Location | None = None
        self._unreadable = state.roster.unreadable

    # What happens.

    def started(self, peers_found: int, sessions_adopted: int) -> None:
        """The agent has taken over what it found; what it knows from before is no news."""
        _log.info("started", peers_found=peers_found, sessions_adopted=sessions_adopted)
        self._location = self._state.location
        self._has_started = True
        self._state.forget_news()
        detail = f"{peers_found} peers found, {sessions_adopted} sessions adopted"
        self._tell(Kind.STARTED, [Subject(detail=detail)])

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
            self._tell(Kind.LOCATION, [Subject(detail=f"{state.location.name} {needs}")])
        for kind, admitted in ((Kind.GRANTED, state.granted), (Kind.RENEWED, state.renewed)):
            for revision, sessions in admitted.items():
                self._tell(kind, [Subject(one.public_key, one.id) for one in sessions], revision)
            admitted.clear()
        refused, cleared = state.roster.take_judged()
        if state.roster.unreadable is not self._unreadable:
            known, self._unreadable = set(self._unreadable), state.roster.unreadable
            refused += [(one.public_key, one.reason) for one in self._unreadable if one not in known]
        self._tell(Kind.REFUSED, [Subject(peer, None, why.value) for peer, why in refused])
        self._tell(Kind.CLEARED, [Subject(key, None, why.value) for key, why in cleared])

    def ended(self, ends: Sequence[SessionEnd]) -> None:
        """These sessions are over, and their peers off the interface."""
        self._tell(Kind.ENDED, [Subject(end.public_key, end.session_id, end.reason.value) for end in ends])

    def drifted(self, drift: Sequence[Drift]) -> None:
        """Somebody else changed the interface, its peers or their guard."""
        self._tell(Kind.DRIFT, [Subject(one.public_key, None, one.kind.value, one.detail) for one in drift])

    def core_found(self) -> None:
        """Core answers, and did not before."""
        _log.info("core found")
        self._tell(Kind.CORE_FOUND, [Subject()])

    def core_lost(self, error: Exception) -> None:
        """Core does not answer any more."""
        _log.warning("core lost", error=str(error))
        self._tell(Kind.CORE_LOST, [Subject(detail=str(error))])

    def core_invalid(self, error: Exception) -> None:
        """Core sent something invalid, which was refused whole."""
        _log.warning("core sent something invalid", error=str(error))
        self._tell(Kind.CORE_INVALID, [Subject(detail=str(error))])

    def _tell(self, kind: Kind, subjects: Sequence[Subject], revision: int | None = None) -> None:
        if not subjects:
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

    async def events(self, after: int | None, limit: int, wait: float) -> dict[str, Any]:
        """What is behind a number, or else the last ``limit``, as ``Operator.events`` says."""
        trail = self.trail
        if after is None:
            after = max(0, trail.next - 1 - limit)
        if wait:
            await self.news(after, wait)
        occurrences = trail.after(after, limit)
        return {
            "process": self._process,
            "missed": max(0, trail.oldest - 1 - after),
            "last": occurrences[-1].number if occurrences else trail.next - 1,
            "events": self.documents(occurrences),
        }

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
        return [self._document(one) for one in occurrences]

    def _document(self, one: Occurrence) -> dict[str, Any]:
        subject = one.subject
        listed = self._state.roster.peers.get(subject.peer) if isinstance(subject.peer, bytes) else None
        return {
            "number": one.number,
            "at": format_time(one.at),
            "event": one.kind.value,
            "public_key": _shown(subject.peer),
            "name": None if listed is None else listed.name,
            "session_id": subject.session_id,
            "revision": one.revision,
            "reason": subject.reason or None,
            "detail": subject.detail or None,
        }


def _shown(peer: PublicKey | str | None) -> str | None:
    return format_key(peer) if isinstance(peer, bytes) else peer


def _write_lines(kind: Kind, subjects: Sequence[Subject], revision: int | None) -> None:
    write = _log.warning if kind in _WARNINGS else _log.info
    for subject in subjects[:_ONE_BY_ONE]:
        about: dict[str, Any] = {"peer": _shown(subject.peer)}
        if subject.session_id is not None:
            about["session"] = subject.session_id
        if kind is Kind.DRIFT:
            about |= {"kind": subject.reason, "detail": subject.detail}
        elif subject.reason:
            about["reason"] = subject.reason
        write(_LINES[kind], **about, revision=revision)
    if len(subjects) > _ONE_BY_ONE:
        more = subjects[_ONE_BY_ONE:]
        if kind is Kind.DRIFT:
            write(_MORE[kind], by_kind=Counter(one.reason for one in more), revision=revision)
        elif more[0].reason:
            write(_MORE[kind], by_reason=Counter(one.reason for one in more), revision=revision)
        else:
            write(_MORE[kind], count=len(more), revision=revision)
