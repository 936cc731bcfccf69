"""Judging connections to the change stream, each by itself: opening, heartbeats, numbering, replay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

from agent.conformance.answers import StreamRecord
from agent.conformance.state import judge_entry, judge_session, load_json
from agent.conformance.verdicts import Ledger
from agent.core.messages import decode_event, parse_position
from agent.core.stream import Heartbeat, ServerEvent
from agent.encoding import format_key
from agent.errors import InvalidMessage
from agent.fence import Position
from agent.model import Change, PeerUpserted, SessionGranted

NO_STREAM: Final = frozenset({404, 405, 501})
HEARTBEAT: Final = 15.0
LATE: Final = 1.0
"""Seconds that a heartbeat may be under way."""
_BY_TIMER: Final = 0.1
"""Seconds of silence before a comment that was sent for the silence's sake."""
TYPES: Final = frozenset(
    {"peer_upserted", "peer_removed", "session_granted", "session_revoked", "location_changed", "resync"}
)


def judge_opening(record: StreamRecord, ledger: Ledger) -> bool:
    """Judge how core answered GET changes; False if it has no stream to be judged."""
    head = record.head
    if head is None or head.status != 200:
        ledger.failed("stream.opens", record.fault or str(head))
        return False
    good = head.media_type == "text/event-stream"
    ledger.judged("stream.opens", good, f"Content-Type is {head.media_type[:40] or 'missing'}")
    encoding = head.headers.get("content-encoding", "identity").strip().lower()
    return (
        ledger.judged("stream.identity", encoding in {"", "identity"}, f"Content-Encoding is {encoding[:20]}")
        and good
    )


def has_no_stream(record: StreamRecord) -> bool:
    """Whether core says that it has none: such a core is polled."""
    return record.head is not None and record.head.status in NO_STREAM


def heartbeats(record: StreamRecord) -> int:
    """How many comments came that nothing but silence can have called for."""
    times = [record.began, *(at for at, _ in record.items)]
    return sum(
        isinstance(item, Heartbeat) and at - before >= _BY_TIMER
        for before, (at, item) in zip(times, record.items, strict=False)
    )


def judge_heartbeat(record: StreamRecord, now: float, ledger: Ledger) -> bool:
    """Judge the silences up to ``now``; True once there is nothing more to wait for."""
    times = [record.began, *(at for at, _ in record.items), record.ended or now]
    longest = max(after - before for before, after in pairwise(times))
    if longest > HEARTBEAT + LATE:
        ledger.failed("stream.heartbeat", f"silence for {longest:.1f} s")
        return True
    if heartbeats(record) >= 2:
        ledger.passed(
            "stream.heartbeat", f"{heartbeats(record)} heartbeats, silence for at most {longest:.1f} s"
        )
        return True
    ledger.skipped("stream.heartbeat", "it was not silent for long enough")
    return record.ended is not None


def judge_events(record: StreamRecord, ledger: Ledger) -> None:
    """Judge each event and its number."""
    current = record.current
    first = "stream.resume-current" if current else "stream.resume"
    position: Position | None = Position(*parse_position(record.asked))
    for number, event in enumerate(record.events):
        judge_event(event, ledger)
        found = _position(event)
        if event.type == "resync":
            if number == 0 and current:
                ledger.failed(first, f"resync, though {record.asked} is core's own position")
            position = found
            continue
        if found is None:
            ledger.failed(
                "stream.id-form", f"the id of {event.type[:40] or 'an event'} is not EPOCH:REVISION"
            )
            return
        ledger.passed("stream.id-form", str(found))
        if position is not None:
            _judge_step(position, found, first if number == 0 else "stream.revision-by-one", ledger)
        position = found
    if current and not record.events and record.is_open:
        ledger.passed("stream.resume-current", f"nothing newer than {record.asked}, and nothing came")
    if record.fault:
        ledger.failed("stream.data", record.fault)


def _judge_step(position: Position, found: Position, clause: str, ledger: Ledger) -> None:
    step = f"{found} after {position}"
    if not ledger.judged("stream.epoch-stays", found.epoch == position.epoch, step):
        return
    good = found.revision == position.revision + 1
    ledger.judged(clause, good, step)
    if good:
        ledger.passed("stream.revision-by-one", step)


def judge_event(event: ServerEvent, ledger: Ledger) -> None:
    """Judge one event by its type and data."""
    if event.type not in TYPES:
        ledger.failed("stream.event-types", f"event: {event.type[:40] or 'missing'}")
        return
    ledger.passed("stream.event-types", event.type)
    if event.type == "resync":
        return
    try:
        data, repeated = load_json(event.data)
    except ValueError:
        ledger.failed("stream.data", f"{event.type} with data that is not JSON")
        return
    if repeated:
        ledger.failed("json.no-repeated-keys", f"an object in {event.type} repeats a key")
        return
    try:
        change = decode_event(event.type, "sound:1", event.data)
    except InvalidMessage as error:
        problem = error.message.removeprefix("core's message is not valid: ")
        bad_key = (
            isinstance(data, dict) and isinstance(data.get("public_key"), str) and "public_key" in problem
        )
        ledger.failed("keys.canonical" if bad_key else "stream.data", f"{event.type}: {problem}")
        return
    if isinstance(change, Change) and _judge_change(change, data, ledger):
        ledger.passed("stream.data", event.type)


def _judge_change(change: Change, data: Any, ledger: Ledger) -> bool:
    match change.body:
        case PeerUpserted(peer):
            return judge_entry(peer, data, ledger, "stream.data")
        case SessionGranted(key, None, fault) if fault is not None:
            judge_session(fault, data.get("session"), format_key(key), ledger)
            return False
    return True


def _position(event: ServerEvent) -> Position | None:
    try:
        return Position(*parse_position(event.id))
    except InvalidMessage:
        return None


def judge_resync(
    record: StreamRecord, clause: str, bounds: tuple[Position, Position] | None, ledger: Ledger
) -> bool:
    """Judge the answer to a position that can't be replayed; True if it is resync.

    ``bounds`` are core's positions before and after, None if they are not known or of two epochs.
    """
    if not record.is_open:
        ledger.failed(clause, f"from {record.asked}: {record.head or record.fault}")
        return False
    events = record.events
    if not events or events[0].type != "resync":
        what = "nothing came" if not events else f"{events[0].type[:40]} came first"
        ledger.failed(clause, f"from {record.asked} {what}")
        return False
    ledger.passed(clause, f"from {record.asked}: resync with the id {events[0].id[:100]}")
    found = _position(events[0])
    if found is None:
        ledger.failed("stream.resync-carries-revision", "its id is missing, or not EPOCH:REVISION")
    elif bounds is not None:
        low, high = bounds
        good = found.epoch == low.epoch and low.revision <= found.revision <= high.revision
        where = str(low) if low == high else f"{low} to {high}"
        ledger.judged("stream.resync-carries-revision", good, f"its id is {found}, core's position {where}")
    return True


def judge_after_resync(record: StreamRecord, ledger: Ledger) -> bool:
    """Judge what comes on a stream after its resync; True once something has."""
    at = next((n for n, (_, i) in enumerate(record.items) if isinstance(i, ServerEvent)), None)
    if at is None:
        return record.ended is not None
    after = [item for _, item in record.items[at + 1 :]]
    resync, following = record.events[0], record.events[1:2]
    position = _position(resync)
    if following and following[0].type != "resync" and position is not None:
        found = _position(following[0])
        good = found == Position(position.epoch, position.revision + 1)
        ledger.judged(
            "stream.goes-on-after-resync", good, f"{following[0].id[:100]} after resync at {position}"
        )
        return True
    if record.ended is not None and not record.let_go and not after:
        ledger.failed("stream.goes-on-after-resync", "core closed the stream")
    elif after:
        ledger.passed("stream.goes-on-after-resync", "it stays open")
    return bool(after) or record.ended is not None


def judge_replay(record: StreamRecord, known: list[ServerEvent], current: Position, ledger: Ledger) -> None:
    """Judge what was sent from an older revision; ``known`` is what was seen live since then, if it was."""
    if not record.is_open:
        ledger.failed("stream.resume", f"from {record.asked}: {record.head or record.fault}")
        return
    events = record.events
    if events and events[0].type == "resync":
        ledger.skipped("stream.resume", f"from {record.asked}: resync, which is allowed and costs a pull")
        return
    if known:
        good = _sequence(events[: len(known)]) == _sequence(known)
        seen = f"{len(events)} events, {len(known)} had been sent since"
    else:
        start = Position(*parse_position(record.asked))
        numbers = [_position(event) for event in events]
        wanted = [Position(start.epoch, n) for n in range(start.revision + 1, current.revision + 1)]
        good = numbers[: len(wanted)] == wanted
        seen = f"{len(events)} events up to {events[-1].id[:100]}" if events else "nothing came"
    ledger.judged("stream.resume", good, f"from {record.asked}: {seen}")


def _sequence(events: list[ServerEvent]) -> list[tuple[str, str, Any]]:
    found = []
    for event in events:
        try:
            data, _ = load_json(event.data)
        except ValueError:
            data = None
        found.append((event.id, event.type, data))
    return found
