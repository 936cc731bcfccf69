import asyncio
import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.audit import Audit
from agent.encoding import format_key
from agent.errors import CoreUnavailable
from agent.model import (
    Change,
    EndReason,
    PeerRemoved,
    PublicKey,
    Refusal,
    SessionEnd,
    SessionRevoked,
    UnreadablePeer,
)
from agent.plan import Drift, DriftKind
from agent.state import State, UnknownPeer
from tests.reconciler.harness import granted, revoked
from tests.support.builders import CORE, NOW, OWN_KEY, after, grant, key, location_changed, peer, snapshot


@pytest.fixture
def state() -> State:
    return State(own_key=OWN_KEY)


@pytest.fixture
def audit(state: State) -> Audit:
    audit = Audit(state, lambda: NOW)
    audit.started(0, 0)
    return audit


def drift(kind: DriftKind, count: int) -> list[Drift]:
    return [Drift(kind, PublicKey(number.to_bytes(32)), f"difference {number}") for number in range(count)]


def told(audit: Audit) -> list[tuple[str, str | None, str | None, int | None, str | None]]:
    """Event, peer, session, revision and reason of all but the start."""
    documents = audit.documents(audit.trail.after(1, 100_000))
    return [(d["event"], d["public_key"], d["session_id"], d["revision"], d["reason"]) for d in documents]


def name(number: int) -> str:
    return format_key(key(number))


def test_each_difference_has_a_line(audit: Audit) -> None:
    with capture_logs() as logs:
        audit.drifted([*drift(DriftKind.GUARD, 1), Drift(DriftKind.FWMARK, None, "has another fwmark")])
    assert [(line["event"], line["kind"], line["peer"], line["detail"]) for line in logs] == [
        ("drift", "guard", format_key(PublicKey(bytes(32))), "difference 0"),
        ("drift", "fwmark", None, "has another fwmark"),
    ]


def test_a_thousand_differences_at_once_are_summed_up_in_the_log_and_whole_in_the_trail(audit: Audit) -> None:
    with capture_logs() as logs:
        audit.drifted([*drift(DriftKind.GUARD, 1000), *drift(DriftKind.PEER_ADDED, 500)])
    assert len(logs) == 51
    assert logs[-1] == {
        "event": "more drift",
        "by_kind": {"guard": 950, "peer_added": 500},
        "revision": None,
        "log_level": "warning",
    }
    assert len(told(audit)) == 1500


def test_the_first_changes_of_a_moment_have_a_line_each_and_the_others_are_summed_up(audit: Audit) -> None:
    bodies = [SessionRevoked(PublicKey(number.to_bytes(32)), f"s{number}") for number in range(60)]
    changes = [Change("e", revision, body) for revision, body in enumerate(bodies, 1)]
    with capture_logs() as logs:
        audit.changed(changes)
    assert [line["session"] for line in logs[:-1]] == [f"s{number}" for number in range(50)]
    assert logs[-1] == {
        "event": "more changes taken",
        "by_change": {"SessionRevoked": 10},
        "revision": 60,
        "log_level": "info",
    }


def test_sessions_of_a_snapshot_are_told_with_its_revision(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, session=grant("s1", 1)), peer(2)], revision=41), NOW)
    with capture_logs() as logs:
        audit.followed()
    assert ("granted", name(1), "s1", 41, None) in told(audit)
    (line,) = [line for line in logs if line["event"] == "session granted"]
    assert (line["peer"], line["session"], line["revision"]) == (name(1), "s1", 41)


def test_grants_renewals_and_replacements_are_told_with_the_revision_that_said_so(
    state: State, audit: Audit
) -> None:
    state.load(snapshot([peer(1), peer(2)], revision=10), NOW)
    state.change(granted(1, grant("s1", 1)), NOW)
    state.change(granted(2, grant("s2", 2)), NOW)
    state.change(granted(1, grant("s1", 1, lasts=7200)), NOW)
    state.change(granted(2, grant("s3", 3)), NOW)
    audit.followed()
    assert [one for one in told(audit) if one[0] != "location"] == [
        ("granted", name(1), "s1", 11, None),
        ("granted", name(2), "s2", 12, None),
        ("granted", name(2), "s3", 14, None),
        ("renewed", name(1), "s1", 13, None),
    ]


def test_a_session_seen_again_unaltered_is_no_renewal(state: State, audit: Audit) -> None:
    listed = [peer(1, session=grant("s1", 1))]
    state.load(snapshot(listed, revision=1), NOW)
    audit.followed()
    before = told(audit)
    state.load(snapshot([peer(1, name="new name", session=grant("s1", 1))], revision=2), after(5))
    audit.followed()
    assert told(audit) == before


def test_another_psk_under_the_same_id_is_a_renewal(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, session=grant("s1", 1))], revision=1), NOW)
    audit.followed()
    state.load(snapshot([peer(1, session=grant("s1", 9))], revision=2), NOW)
    audit.followed()
    assert told(audit)[-1] == ("renewed", name(1), "s1", 2, None)


def test_refusals_are_told_once_with_their_reason_and_so_is_their_end(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, "10.8.0.9"), peer(2, "10.8.0.9")], revision=1), NOW)
    with capture_logs() as logs:
        audit.followed()
    assert sorted(one for one in told(audit) if one[0] == "refused") == sorted(
        ("refused", name(number), None, 1, "prefix_claimed") for number in (1, 2)
    )
    assert [line["peer"] for line in logs if line["event"] == "peer refused"] == [name(1), name(2)]
    seen = len(told(audit))
    state.load(snapshot([peer(1, "10.8.0.9"), peer(2, "10.8.0.9")], revision=2), NOW)
    audit.followed()
    assert len(told(audit)) == seen
    state.load(snapshot([peer(1, "10.8.0.9"), peer(2, "10.8.0.8")], revision=3), NOW)
    audit.followed()
    assert told(audit)[seen:] == [("cleared", name(number), None, 3, "prefix_claimed") for number in (1, 2)]


def test_who_is_refused_only_halfway_through_a_list_is_not_told_of(state: State, audit: Audit) -> None:
    many = [peer(number, f"10.9.0.{number}") for number in range(3, 60)]
    state.load(snapshot([peer(1, "10.8.0.1"), peer(2, "10.8.0.2"), *many], revision=1), NOW)
    audit.followed()
    before = told(audit)
    state.load(snapshot([peer(1, "10.8.0.2"), peer(2, "10.8.0.1"), *many], revision=2), NOW)
    audit.followed()
    assert told(audit) == before


def test_a_refused_peer_that_is_no_longer_listed_is_not_called_cleared(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, fault=Refusal.INVALID_PEER), peer(2)], revision=1), NOW)
    audit.followed()
    state.load(snapshot([peer(2)], revision=2), NOW)
    audit.followed()
    assert [one[0] for one in told(audit)] == ["location", "refused"]


def test_an_entry_whose_key_cannot_be_read_is_told_once_as_core_wrote_it(state: State, audit: Audit) -> None:
    odd = UnreadablePeer("rubbish", Refusal.INVALID_PUBLIC_KEY, "carol")
    for revision in (1, 2):
        state.load(snapshot([peer(1)], revision=revision, unreadable=(odd,)), NOW)
        audit.followed()
    assert [one for one in told(audit) if one[0] == "refused"] == [
        ("refused", "rubbish", None, 1, "invalid_public_key")
    ]


def test_a_location_that_begins_or_ceases_to_require_mfa_is_told(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1)], mfa_required=False), NOW)
    audit.followed()
    state.change(location_changed(mfa_required=True), NOW)
    audit.followed()
    details = [d["detail"] for d in audit.documents(audit.trail.after(1, 9))]
    assert details == ["hq requires no MFA", "hq requires MFA"]


def test_what_was_known_at_the_start_is_no_news(state: State) -> None:
    audit = Audit(state, lambda: NOW)
    state.load(snapshot([peer(1, session=grant("s1", 1)), peer(2, fault=Refusal.INVALID_PEER)]), NOW)
    audit.followed()
    audit.started(2, 1)
    audit.followed()
    assert [d["event"] for d in audit.documents(audit.trail.after(0, 9))] == ["started"]


def test_ends_have_their_reason_and_the_peer_its_name(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, name="alice")], revision=5), NOW)
    audit.ended([SessionEnd("s1", key(1), EndReason.IDLE, CORE, 0.0, 0, 0)])
    (document,) = audit.documents(audit.trail.after(1, 9))
    assert document == {
        "number": 2,
        "at": "2027-01-15T08:00:00.000Z",
        "event": "ended",
        "public_key": name(1),
        "name": "alice",
        "session_id": "s1",
        "revision": 5,
        "reason": "idle",
        "detail": None,
    }


def test_a_session_that_begins_and_ends_in_one_step_is_told_of_in_that_order(
    state: State, audit: Audit
) -> None:
    state.load(snapshot([peer(1), peer(2)], revision=1), NOW)
    state.change(granted(1, grant("s1", 1)), NOW)
    state.change(granted(2, grant("s2", 2)), NOW)
    state.change(revoked(1, "s1"), NOW)
    audit.ended(state.ends)
    audit.followed()
    sessions = [(one[0], one[2]) for one in told(audit) if one[2]]
    assert sessions == [("granted", "s1"), ("ended", "s1"), ("granted", "s2")]


def test_an_end_is_told_with_the_revision_that_has_ended_the_session(state: State, audit: Audit) -> None:
    listed = [peer(n, session=grant(f"s{n}", n, lasts=60 if n == 3 else 3600)) for n in range(1, 6)]
    state.load(snapshot(listed, revision=20), NOW)
    state.change(revoked(1, "s1"), NOW)
    state.change(PeerRemoved(key(2)), NOW)
    # Its deadline is past before the next change is there.
    state.change(revoked(4, "other"), after(60))
    with pytest.raises(UnknownPeer):
        state.change(revoked(9, "s9"), after(61))
    state.end([key(5)], after(61))
    state.change(revoked(4, "s4"), after(61))
    with capture_logs() as logs:
        audit.ended(state.ends)
    ends = [(one[2], one[3], one[4]) for one in told(audit) if one[0] == "ended"]
    assert ends == [
        ("s1", 21, "revoked"),
        ("s2", 22, "peer_removed"),
        ("s3", 22, "expired"),
        ("s5", 23, "operator"),
        ("s4", 24, "revoked"),
    ]
    lines = [(line["session"], line["revision"]) for line in logs if line["event"] == "session ended"]
    assert lines == [end[:2] for end in ends]


def test_ends_by_another_location_are_told_with_its_revision(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, session=grant("s1", 1))], revision=20), NOW)
    audit.followed()
    state.load(snapshot([peer(1)], revision=1, epoch="e2", location="8"), NOW)
    audit.ended(state.ends)
    state.change(granted(1, grant("s2", 2)), NOW)
    audit.followed()
    assert [(one[0], one[2], one[3]) for one in told(audit) if one[2]] == [
        ("granted", "s1", 20),
        ("ended", "s1", 1),
        ("granted", "s2", 2),
    ]


def test_many_that_end_by_a_revision_each_are_summed_up_in_the_log(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(n, session=grant(f"s{n}", n)) for n in range(1, 201)], revision=1), NOW)
    audit.followed()
    for number in range(1, 201):
        state.change(revoked(number, f"s{number}"), NOW)
    with capture_logs() as logs:
        audit.ended(state.ends)
    assert len(logs) == 51
    assert [one[3] for one in told(audit) if one[0] == "ended"] == list(range(2, 202))
    assert state.ended_by == {}


def test_an_end_is_told_once_however_long_the_journal_takes(state: State, audit: Audit) -> None:
    ends = [SessionEnd("s1", key(1), EndReason.IDLE, CORE, 0.0, 0, 0)]
    audit.ended(ends)
    audit.ended(ends)
    audit.kept(ends)
    assert [one[0] for one in told(audit)] == ["ended"]


def test_what_the_start_has_ended_is_told_after_the_start(state: State) -> None:
    audit = Audit(state, lambda: NOW)
    audit.ended([SessionEnd("s1", key(1), EndReason.EXPIRED, CORE, 0.0, 0, 0)])
    audit.started(0, 0)
    assert [d["event"] for d in audit.documents(audit.trail.after(0, 9))] == ["started", "ended"]


def test_a_peer_that_is_listed_no_longer_keeps_its_name(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, name="alice", session=grant("s1", 1))]), NOW)
    audit.followed()
    state.change(PeerRemoved(key(1)), NOW)
    audit.ended(state.ends)
    names = [d["name"] for d in audit.documents(audit.trail.after(1, 9)) if d["session_id"]]
    assert names == ["alice", "alice"]


def test_the_same_rubbish_does_not_push_out_everybodys_history(audit: Audit) -> None:
    for _ in range(100):
        audit.core_invalid(CoreUnavailable("no JSON"))
    audit.core_invalid(CoreUnavailable("x" * 100_000))
    documents = audit.documents(audit.trail.after(1, 999))
    assert [(d["event"], len(d["detail"])) for d in documents] == [("core_invalid", 7), ("core_invalid", 200)]


def test_core_lost_found_and_lying_are_told(audit: Audit) -> None:
    audit.core_found()
    audit.core_lost(CoreUnavailable("connection refused"))
    audit.core_invalid(CoreUnavailable("no JSON"))
    assert [one[0] for one in told(audit)] == ["core_found", "core_lost", "core_invalid"]


def test_a_reader_that_waits_is_woken_by_what_happens(audit: Audit) -> None:
    async def main() -> float:
        waiting = asyncio.create_task(audit.news(1, 10))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        audit.core_found()
        began = time.monotonic()
        await waiting
        return time.monotonic() - began

    assert asyncio.run(main()) < 1


def test_a_reader_waits_no_longer_than_it_asked_for_and_not_at_all_for_what_is_there(audit: Audit) -> None:
    async def main() -> None:
        async with asyncio.timeout(5):
            await audit.news(1, 0.01)
            await audit.news(0, 60)

    asyncio.run(main())


def answer(audit: Audit, *asked: Any) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with asyncio.timeout(5):
            return await audit.events(*asked)

    return asyncio.run(main())


def test_who_followed_another_process_is_answered_at_once_and_from_the_beginning(audit: Audit) -> None:
    audit.core_found()
    told = answer(audit, 5000, 100, 25.0, "another")
    assert ([d["event"] for d in told["events"]], told["last"]) == (["started", "core_found"], 2)
    assert answer(audit, 1, 100, 25.0, told["process"])["last"] == 2


def test_one_peers_history_is_found_behind_thousands_of_others(state: State, audit: Audit) -> None:
    state.load(snapshot([peer(1, name="alice", session=grant("s1", 1))]), NOW)
    audit.followed()
    for number in range(3000):
        audit.ended([SessionEnd(f"x{number}", key(2), EndReason.IDLE, CORE, 0.0, 0, 0)])
    for who in ("alice", name(1)):
        assert [d["session_id"] for d in answer(audit, None, 50, 0.0, None, who)["events"]] == ["s1"]


def test_only_so_many_wait_and_the_others_are_answered_at_once(audit: Audit) -> None:
    async def main() -> None:
        waiting = [asyncio.create_task(audit.events(1, 10, 25.0)) for _ in range(16)]
        await asyncio.sleep(0.01)
        async with asyncio.timeout(2):
            assert (await audit.events(1, 10, 25.0))["events"] == []
        assert not any(task.done() for task in waiting)
        audit.core_found()
        assert [len((await task)["events"]) for task in waiting] == [1] * 16

    asyncio.run(main())


def test_nobody_holds_up_an_agent_that_stops(audit: Audit) -> None:
    async def main() -> None:
        waiting = [asyncio.create_task(audit.news(1, 60)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        audit.close()
        async with asyncio.timeout(5):
            await asyncio.gather(*waiting)
            await audit.news(1, 60)

    asyncio.run(main())
