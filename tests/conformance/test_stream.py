"""Which clause a connection to the stream breaks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.conformance.answers import Answer, StreamRecord
from agent.conformance.stream import (
    has_no_stream,
    judge_after_resync,
    judge_event,
    judge_events,
    judge_heartbeat,
    judge_opening,
    judge_replay,
    judge_resync,
)
from agent.conformance.verdicts import Ledger, Mark
from agent.core.stream import Heartbeat, ServerEvent
from agent.fence import Position
from tests.conformance.site import marked
from tests.core.fakes import TIME, key, peer, session

SSE = {"content-type": "text/event-stream; charset=utf-8"}
HEAD = Answer(200, SSE)


def event(kind: str, position: str, data: Any = None) -> ServerEvent:
    return ServerEvent(kind, position, json.dumps({} if data is None else data).encode())


def removed(revision: int, epoch: str = "b7e1") -> ServerEvent:
    return event("peer_removed", f"{epoch}:{revision}", {"public_key": key(1)})


def resync(position: str) -> ServerEvent:
    return event("resync", position)


def record(*items: ServerEvent | Heartbeat, asked: str = "b7e1:42", **members: Any) -> StreamRecord:
    """Items that come a second apart, on a stream that was opened at 100."""
    timed = [(101.0 + n, item) for n, item in enumerate(items)]
    given: dict[str, Any] = {"head": HEAD, "items": timed}
    return StreamRecord(asked, 100.0, **(given | members))


def failed(ledger: Ledger) -> set[str]:
    return set(marked(ledger, Mark.FAIL))


@pytest.mark.parametrize(
    ("head", "clauses"),
    [
        (HEAD, set()),
        (Answer(200, SSE | {"content-encoding": "Identity"}), set()),
        (Answer(200, SSE | {"content-encoding": "gzip"}), {"stream.identity"}),
        (Answer(200, {"content-type": "application/json"}), {"stream.opens"}),
        (Answer(200), {"stream.opens"}),
        (Answer(500), {"stream.opens"}),
        (Answer(503, SSE), {"stream.opens"}),
        (Answer(0, error="core has been silent for too long"), {"stream.opens"}),
        (None, {"stream.opens"}),
    ],
)
def test_a_stream_opens_as_what_it_is(head: Answer | None, clauses: set[str]) -> None:
    ledger = Ledger()
    assert judge_opening(record(head=head), ledger) is (not clauses)
    assert failed(ledger) == clauses


def test_what_is_wrong_with_an_opening_is_said() -> None:
    for members, seen in (
        ({"head": Answer(200, {"content-type": "application/json"})}, "Content-Type is application/json"),
        ({"head": Answer(200)}, "Content-Type is missing"),
        ({"head": Answer(500)}, "core answered 500"),
        ({"head": Answer(500), "fault": "core is broken"}, "core is broken"),
    ):
        ledger = Ledger()
        judge_opening(record(**members), ledger)
        assert ledger.verdict("stream.opens").seen == seen


def test_a_core_without_a_stream_is_no_broken_one() -> None:
    assert [has_no_stream(record(head=Answer(status))) for status in (404, 405, 501, 200, 500)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert not has_no_stream(record(head=None))


@pytest.mark.parametrize(
    ("times", "now", "done", "mark"),
    [
        ([10, 20], 25, True, Mark.PASS),
        ([15.5, 31], 31, True, Mark.PASS),
        ([10], 12, False, Mark.SKIP),
        ([0.01, 0.02], 10, False, Mark.SKIP),  # both came with the opening
        ([0.01, 0.02], 16.1, True, Mark.FAIL),
        ([], 16.5, True, Mark.FAIL),
        ([10, 26.5], 27, True, Mark.FAIL),
    ],
)
def test_heartbeats_are_what_breaks_the_silence_in_time(
    times: list[float], now: float, done: bool, mark: Mark
) -> None:
    ledger = Ledger()
    beats = record(items=[(100.0 + at, Heartbeat()) for at in times])
    assert judge_heartbeat(beats, 100.0 + now, ledger) is done
    assert ledger.mark("stream.heartbeat") is mark


def test_events_break_the_silence_but_are_no_heartbeats() -> None:
    ledger = Ledger()
    events = record(items=[(100.0 + at, removed(42 + at)) for at in range(1, 30)])
    assert not judge_heartbeat(events, 130.0, ledger)
    events.ended = 131.0
    assert judge_heartbeat(events, 500.0, ledger)
    assert ledger.mark("stream.heartbeat") is Mark.SKIP


@pytest.mark.parametrize(
    ("events", "clauses"),
    [
        ([removed(43), removed(44)], set()),
        ([removed(43), removed(45)], {"stream.revision-by-one"}),
        ([removed(43), removed(43)], {"stream.revision-by-one"}),
        ([removed(44)], {"stream.resume-current"}),
        ([removed(1)], {"stream.resume-current"}),
        ([resync("b7e1:42")], {"stream.resume-current"}),
        ([removed(43), removed(44, "c0de")], {"stream.epoch-stays"}),
        ([removed(43), resync("c0de:7"), removed(8, "c0de")], set()),
        ([removed(43), resync("no id"), removed(8, "c0de")], set()),
        ([event("peer_removed", "43", {"public_key": key(1)})], {"stream.id-form"}),
        ([event("peer_removed", "", {"public_key": key(1)})], {"stream.id-form"}),
        ([event("peer_renamed", "b7e1:43")], {"stream.event-types"}),
    ],
)
def test_events_are_numbered_one_by_one(events: list[ServerEvent], clauses: set[str]) -> None:
    ledger = Ledger()
    judge_events(record(*events, current=True), ledger)
    assert failed(ledger) == clauses


def test_what_comes_first_after_a_break_is_the_next_revision_or_resync() -> None:
    for events, clauses in (
        ([removed(43)], set()),
        ([resync("b7e1:50"), removed(51)], set()),
        ([removed(50)], {"stream.resume"}),
    ):
        ledger = Ledger()
        judge_events(record(*events), ledger)
        assert failed(ledger) == clauses


def test_a_quiet_stream_from_the_current_revision_is_as_it_should_be() -> None:
    ledger = Ledger()
    judge_events(record(Heartbeat(), current=True), ledger)
    assert ledger.mark("stream.resume-current") is Mark.PASS
    for other in (
        record(current=True, head=Answer(500)),
        record(Heartbeat()),
        record(removed(43), removed(44)),
    ):
        ledger = Ledger()
        judge_events(other, ledger)
        assert ledger.mark("stream.resume-current") is None
    judge_events(record(fault="an event has more than 1048576 bytes"), ledger)
    assert failed(ledger) == {"stream.data"}


GRANT = {"public_key": key(1), "session": session()}


@pytest.mark.parametrize(
    ("kind", "data", "clause"),
    [
        ("peer_removed", b"{", "stream.data"),
        ("peer_removed", b"{}", "stream.data"),
        ("peer_removed", b"[]", "stream.data"),
        ("peer_removed", {"public_key": "A" * 43 + "="}, "keys.canonical"),
        ("peer_removed", b'{"public_key": "a", "public_key": "b"}', "json.no-repeated-keys"),
        ("peer_upserted", peer(allowed_ips=["10.8.0.1/24"]), "prefixes.strict"),
        ("peer_upserted", peer(mfa_exempt=1), "stream.data"),
        ("peer_upserted", peer(session=session(granted_at="2026-11-24T03:00:00")), "times.offset"),
        ("session_granted", GRANT | {"session": None}, "state.sessions"),
        ("session_granted", GRANT | {"session": session(preshared_key="A" * 43 + "=")}, "keys.preshared"),
        ("session_granted", GRANT | {"session": session(expires_at=TIME)}, "state.sessions"),
        ("session_granted", GRANT | {"session": session(expires_at="2026-11-24")}, "times.offset"),
        ("session_revoked", {"public_key": key(1)}, "state.sessions"),
        ("location_changed", {"location": {"id": "7"}}, "stream.data"),
        ("location_changed", {"location": {"id": "7", "mfa_required": True}}, None),
        ("session_granted", GRANT, None),
        ("session_revoked", {"public_key": key(1), "session_id": "s-19"}, None),
        ("peer_upserted", peer(), None),
    ],
)
def test_an_events_data_is_judged_as_a_states_would_be(kind: str, data: Any, clause: str | None) -> None:
    ledger = Ledger()
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    judge_event(ServerEvent(kind, "b7e1:43", raw), ledger)
    assert failed(ledger) == ({clause} if clause else set())
    assert (ledger.mark("stream.data") is Mark.PASS) is (clause is None)


def test_what_a_resync_carries_beside_its_id_is_of_no_matter() -> None:
    ledger = Ledger()
    judge_event(ServerEvent("resync", "b7e1:43", b"now"), ledger)
    assert failed(ledger) == set()


HERE = (Position("b7e1", 42), Position("b7e1", 43))


@pytest.mark.parametrize(
    ("items", "members", "clauses"),
    [
        ([resync("b7e1:42")], {}, set()),
        ([Heartbeat(), resync("b7e1:43")], {}, set()),
        ([resync("b7e1:41")], {}, {"stream.resync-carries-revision"}),
        ([resync("c0de:42")], {}, {"stream.resync-carries-revision"}),
        ([resync("")], {}, {"stream.resync-carries-revision"}),
        ([], {}, {"stream.resync-future"}),
        ([removed(43)], {}, {"stream.resync-future"}),
        ([], {"head": Answer(410)}, {"stream.resync-future"}),
    ],
)
def test_what_cannot_be_replayed_is_answered_by_resync_with_cores_position(
    items: list[ServerEvent | Heartbeat], members: dict[str, Any], clauses: set[str]
) -> None:
    ledger = Ledger()
    judge_resync(record(*items, **members), "stream.resync-future", HERE, ledger)
    assert failed(ledger) == clauses


def test_without_bounds_a_resync_is_judged_by_its_form_alone() -> None:
    ledger = Ledger()
    assert judge_resync(record(resync("c0de:1")), "stream.resync-future", None, ledger)
    assert failed(ledger) == set()
    assert ledger.mark("stream.resync-carries-revision") is None


@pytest.mark.parametrize(
    ("items", "members", "done", "mark"),
    [
        ([resync("b7e1:42"), removed(43)], {}, True, Mark.PASS),
        ([resync("b7e1:42"), Heartbeat(), removed(43)], {}, True, Mark.PASS),
        ([resync("b7e1:42"), Heartbeat()], {}, True, Mark.PASS),
        ([resync("b7e1:42"), removed(42)], {}, True, Mark.FAIL),
        ([resync("b7e1:42"), removed(44)], {}, True, Mark.FAIL),
        ([resync("b7e1:42"), resync("b7e1:42")], {}, True, Mark.PASS),
        ([resync(""), removed(44)], {}, True, Mark.PASS),
        ([resync("b7e1:42")], {}, False, None),
        ([resync("b7e1:42")], {"ended": 102.0}, True, Mark.FAIL),
        ([resync("b7e1:42")], {"ended": 102.0, "let_go": True}, True, None),
        ([], {}, False, None),
        ([], {"ended": 102.0}, True, None),
    ],
)
def test_after_resync_the_stream_goes_on(
    items: list[ServerEvent | Heartbeat], members: dict[str, Any], done: bool, mark: Mark | None
) -> None:
    ledger = Ledger()
    assert judge_after_resync(record(*items, **members), ledger) is done
    assert ledger.mark("stream.goes-on-after-resync") is mark


LIVE = [removed(43), removed(44)]


@pytest.mark.parametrize(
    ("items", "known", "members", "mark"),
    [
        (LIVE, LIVE, {}, Mark.PASS),
        ([*LIVE, removed(45)], LIVE, {}, Mark.PASS),
        (LIVE[:1], LIVE, {}, Mark.FAIL),
        (LIVE[1:], LIVE, {}, Mark.FAIL),
        ([removed(43), event("peer_removed", "b7e1:44", {"public_key": key(2)})], LIVE, {}, Mark.FAIL),
        ([removed(43), ServerEvent("peer_removed", "b7e1:44", b"{")], LIVE, {}, Mark.FAIL),
        ([resync("b7e1:44")], LIVE, {}, Mark.SKIP),
        ([], LIVE, {}, Mark.FAIL),
        (LIVE, [], {}, Mark.PASS),
        (LIVE[1:], [], {}, Mark.FAIL),
        ([removed(43), event("peer_removed", "none")], [], {}, Mark.FAIL),
        ([], [], {}, Mark.FAIL),
        ([], LIVE, {"head": Answer(500)}, Mark.FAIL),
    ],
)
def test_a_replay_is_what_was_sent(
    items: list[ServerEvent], known: list[ServerEvent], members: dict[str, Any], mark: Mark
) -> None:
    ledger = Ledger()
    judge_replay(record(*items, **members), known, Position("b7e1", 44), ledger)
    assert ledger.mark("stream.resume") is mark


def test_a_stream_that_does_not_open_replays_nothing_even_where_there_is_nothing_to_replay() -> None:
    for head, mark in ((HEAD, Mark.PASS), (Answer(500), Mark.FAIL)):
        ledger = Ledger()
        judge_replay(record(head=head), [], Position("b7e1", 42), ledger)
        assert ledger.mark("stream.resume") is mark
