"""What an operator reads in the log about sessions, peers and drift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import structlog

from agent.encoding import format_key
from agent.model import Change, SessionEnd, SessionGranted, SessionRevoked
from agent.plan import Drift

_log = structlog.get_logger("agent.audit")
_ONE_BY_ONE: Final = 50
"""Changes, session ends or differences of one moment that get a line each; more are summed up.

A line costs more than the change itself, and the next ones would wait for it.
"""


def changed(changes: Sequence[Change]) -> None:
    """Changes of core's were taken, and are in the kernel where it could be reached."""
    for change in changes[:_ONE_BY_ONE]:
        _changed(change)
    if len(changes) > _ONE_BY_ONE:
        more = changes[_ONE_BY_ONE:]
        kinds = Counter(type(change.body).__name__ for change in more)
        _log.info("more changes taken", by_change=kinds, revision=more[-1].revision)


def _changed(change: Change) -> None:
    body, revision = change.body, change.revision
    match body:
        case SessionGranted(key, grant, fault):
            session = None if grant is None else grant.id
            _log.info(
                "session granted", peer=format_key(key), session=session, fault=fault, revision=revision
            )
        case SessionRevoked(key, session_id):
            _log.info("session revoked", peer=format_key(key), session=session_id, revision=revision)
        case _:
            _log.info("change taken", change=type(body).__name__, revision=revision)


def ended(ends: Sequence[SessionEnd]) -> None:
    """These sessions are over, and their peers off the interface."""
    for end in ends[:_ONE_BY_ONE]:
        _log.info(
            "session ended",
            peer=format_key(end.public_key),
            session=end.session_id,
            reason=end.reason.value,
        )
    if len(ends) > _ONE_BY_ONE:
        _log.info("more sessions ended", by_reason=Counter(e.reason.value for e in ends[_ONE_BY_ONE:]))


def drifted(drift: Sequence[Drift]) -> None:
    """Somebody else changed the interface, its peers or their guard."""
    for one in drift[:_ONE_BY_ONE]:
        peer = None if one.public_key is None else format_key(one.public_key)
        _log.warning("drift", kind=one.kind.value, peer=peer, detail=one.detail)
    if len(drift) > _ONE_BY_ONE:
        _log.warning("more drift", by_kind=Counter(one.kind.value for one in drift[_ONE_BY_ONE:]))
