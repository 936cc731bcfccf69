"""Which clause core breaks over time: events played onto states."""

from __future__ import annotations

from typing import Any

import pytest

from agent.conformance.answers import Step
from agent.conformance.history import Moment, Pulled, judge_history
from agent.conformance.verdicts import Ledger, Mark, Verdict
from agent.core.messages import decode_snapshot
from agent.core.stream import ServerEvent
from tests.conformance.site import marked
from tests.conformance.test_stream import event, failed, resync
from tests.core.fakes import TIME, body, key, peer, session, state

LATER = "2026-11-24T04:00:00.000Z"
SECOND = session(id="s-20", preshared_key=key(7), granted_at=LATER)


def pulled(revision: int, *peers: Any, asked: int | None = None, **changed: Any) -> Pulled:
    return Pulled(decode_snapshot(body(state(*peers, revision=revision, **changed)), 0.0), asked)


def granted(revision: int, who: int = 1, **changed: Any) -> ServerEvent:
    data = {"public_key": key(who), "session": session() | changed}
    return event("session_granted", f"b7e1:{revision}", data)


def revoked(revision: int, session_id: str = "s-19", who: int = 1) -> ServerEvent:
    data = {"public_key": key(who), "session_id": session_id}
    return event("session_revoked", f"b7e1:{revision}", data)


def upserted(revision: int, who: int = 1, **changed: Any) -> ServerEvent:
    return event("peer_upserted", f"b7e1:{revision}", peer(who, **{"session": None} | changed))


def removed(revision: int, who: int = 1) -> ServerEvent:
    return event("peer_removed", f"b7e1:{revision}", {"public_key": key(who)})


def located(revision: int, **changed: Any) -> ServerEvent:
    data = {name: state()[name] for name in ("location", "interface", "session_policy")} | changed
    return event("location_changed", f"b7e1:{revision}", data)


def judged(*moments: Moment) -> Ledger:
    ledger = Ledger()
    judge_history(moments, ledger)
    return ledger


ALONE = peer(session=None)
START = pulled(42, ALONE)


def test_a_sessions_life_is_seen_in_all_its_parts() -> None:
    replacing = session(id="s-20", preshared_key=key(7), granted_at=LATER)
    ledger = judged(
        START,
        upserted(43, 2),
        granted(44),
        granted(45, expires_at="2026-11-24T20:00:00Z", preshared_key=key(9)),
        granted(46, **replacing),
        pulled(46, peer(session=replacing), peer(2, session=None)),
        revoked(47, "s-20"),
        removed(48, 2),
        located(49, interface={"mtu": 1400}),
        pulled(49, ALONE, interface={"mtu": 1400}),
    )

    assert failed(ledger) == set()
    assert set(marked(ledger, Mark.PASS)) == {
        "state.never-back",
        "change.peer-upserted",
        "change.session-granted",
        "change.session-renewed",
        "change.session-replaced",
        "change.session-revoked",
        "change.location-changed",
        "change.peer-removed",
        "change.known-peer",
        "change.snapshot-agrees",
        "session.granted-at-stays",
        "session.id-is-new",
        "session.psk-is-fresh",
    }


LISTED = peer(session=session())
BOTH = pulled(42, ALONE, peer(2, session=None))
WITH = pulled(42, LISTED)


@pytest.mark.parametrize(
    ("moments", "clause"),
    [
        ([WITH, granted(43, granted_at=LATER)], "session.granted-at-stays"),
        ([WITH, pulled(43, peer(session=session(granted_at=LATER)))], "session.granted-at-stays"),
        ([WITH, revoked(43), granted(44)], "session.id-is-new"),
        ([WITH, granted(43, **SECOND), granted(44)], "session.id-is-new"),
        ([WITH, removed(43), upserted(44, session=session())], "session.id-is-new"),
        ([WITH, upserted(43), pulled(43, ALONE), granted(44)], "session.id-is-new"),
        ([WITH, upserted(43, 2), granted(44, 2, preshared_key=key(7))], "session.id-is-new"),
        ([WITH, granted(43, id="s-20")], "session.psk-is-fresh"),
        ([WITH, revoked(43), granted(44, id="s-20")], "session.psk-is-fresh"),
        ([WITH, removed(43, 2)], "change.known-peer"),
        ([WITH, granted(43, 2, **SECOND)], "change.known-peer"),
        ([START, pulled(41, ALONE)], "state.never-back"),
        ([START, granted(43), revoked(44), pulled(43, LISTED)], "state.never-back"),
        ([WITH, upserted(43), pulled(43, LISTED)], "change.snapshot-agrees"),
        ([START, upserted(43, 2), pulled(43, ALONE)], "change.snapshot-agrees"),
        ([START, removed(43), pulled(43, ALONE)], "change.snapshot-agrees"),
        ([START, located(43, interface={"mtu": 1400}), pulled(43, ALONE)], "change.snapshot-agrees"),
        ([START, pulled(42, peer(session=None, name="renamed"))], "change.snapshot-agrees"),
        ([START, pulled(43, ALONE), upserted(43, name="renamed")], "change.snapshot-agrees"),
        (
            [BOTH, upserted(43, 2, allowed_ips=["10.8.0.1/32"]), upserted(44, allowed_ips=[])],
            "change.prefix-moves",
        ),
    ],
)
def test_what_core_says_over_time_breaks_one_clause(moments: list[Moment], clause: str) -> None:
    assert failed(judged(*moments)) == {clause}


def test_a_prefix_that_is_taken_first_and_then_given_moves_well() -> None:
    ledger = judged(
        pulled(42, ALONE, peer(2, session=None)),
        upserted(43, allowed_ips=["10.8.0.9/32"]),
        upserted(44, 2, allowed_ips=["10.8.0.1/32"]),
    )
    assert failed(ledger) == set()
    assert ledger.verdict("change.prefix-moves").seen == "10.8.0.1/32 passed over at 44"


def test_a_prefix_that_stays_contested_is_the_states_fault_and_no_move() -> None:
    ledger = judged(START, upserted(43, 2, allowed_ips=["10.8.0.1/32"]), removed(44, 2), upserted(45))
    assert failed(ledger) == {"change.prefix-moves"}
    ledger = judged(START, upserted(43, 2, allowed_ips=["10.8.0.1/32"]))
    assert failed(ledger) == set()
    assert ledger.mark("change.prefix-moves") is None


def test_an_upsert_with_another_session_ends_the_one_before() -> None:
    other = session(id="s-20", preshared_key=key(7), granted_at=LATER)
    ledger = judged(WITH, upserted(43, session=other), pulled(43, peer(session=other)), granted(44))
    assert failed(ledger) == {"session.id-is-new"}


def test_a_revocation_of_what_is_not_live_is_allowed_and_shows_nothing() -> None:
    for before in (START, WITH):
        ledger = judged(before, revoked(43, "s-77"))
        assert failed(ledger) == set()
        assert ledger.mark("change.session-revoked") is Mark.SKIP


def test_an_entry_with_a_fault_of_its_own_shows_no_clause_about_upserts_and_no_shared_session() -> None:
    for faulty in ({"allowed_ips": ["10.8.0.1/24"]}, {"session": session(preshared_key="")}):
        ledger = judged(START, upserted(43, **faulty))
        assert failed(ledger) == set()
        assert ledger.mark("change.peer-upserted") is None


def test_a_prefix_that_a_state_gives_to_two_is_no_move_when_one_lets_go_later() -> None:
    shared = pulled(42, ALONE, peer(2, session=None, allowed_ips=["10.8.0.1/32"]))
    ledger = judged(shared, upserted(43, 3, allowed_ips=["10.8.0.77/32"]), removed(44, 2))
    assert failed(ledger) == set()


def test_a_step_that_led_to_nothing_is_said_to_be_one_also_where_it_was_the_last() -> None:
    ledger = judged(START, Step("upsert"))
    assert ledger.verdict("change.peer-upserted") == Verdict(Mark.SKIP, "upsert led to no event")
    ledger = judged(START, Step("grant"), removed(43, 9), revoked(43), Step("location"))
    assert ledger.verdict("change.session-granted").seen == "grant led to peer_removed, session_revoked"


def test_a_state_that_differs_in_many_peers_names_three_and_counts_the_others() -> None:
    for many, more in ((3, ""), (5, " and 2 more")):
        renamed = [peer(n, session=None, name="renamed") for n in range(1, many + 1)]
        before = [peer(n, session=None) for n in range(1, many + 1)]
        seen = judged(pulled(42, *before), pulled(42, *renamed)).verdict("change.snapshot-agrees").seen
        assert seen.count("(name)") == 3
        assert seen.startswith("at b7e1:42: ")
        assert seen.endswith(f"(name){more}")


def test_states_that_follow_each_other_without_an_event_show_nothing_of_events() -> None:
    assert judged(START, pulled(42, ALONE)).mark("change.snapshot-agrees") is None
    for clause in ("granted-at-stays", "id-is-new", "psk-is-fresh"):
        assert judged(START, pulled(42, ALONE)).mark(f"session.{clause}") is None
    again = judged(START, upserted(43), resync("b7e1:50"), pulled(50, ALONE), pulled(50, ALONE))
    assert again.mark("change.snapshot-agrees") is None


def test_what_cannot_be_played_waits_for_the_next_state() -> None:
    lost: list[ServerEvent] = [
        resync("b7e1:50"),
        event("peer_renamed", "b7e1:43"),
        removed(44),
        event("peer_removed", "c0de:43", {"public_key": key(1)}),
    ]
    for one in lost:
        ledger = judged(START, one, removed(45), pulled(50, LISTED), revoked(51), pulled(51, ALONE))
        assert failed(ledger) == set()
        assert ledger.mark("change.session-revoked") is Mark.PASS
        # A state that came before the loss was seen is as good.
        ledger = judged(START, pulled(50, LISTED), one, revoked(51), pulled(51, ALONE))
        assert failed(ledger) == set()
        assert ledger.mark("change.session-revoked") is Mark.PASS


def test_events_that_a_state_has_already_are_not_played_again() -> None:
    assert failed(judged(START, upserted(42, name="old"), pulled(42, ALONE))) == set()


def test_a_session_past_its_end_may_be_listed_or_not() -> None:
    over = session(expires_at="2026-11-24T03:00:01Z")
    later = "2026-11-24T03:00:02Z"
    for before, after in ((peer(session=over), ALONE), (ALONE, peer(session=over))):
        assert failed(judged(pulled(42, before), pulled(42, after, server_time=later))) == set()
    early = judged(pulled(42, peer(session=over)), pulled(42, ALONE, server_time=TIME))
    assert failed(early) == {"change.snapshot-agrees"}


def test_a_step_without_its_event_says_what_came_instead() -> None:
    ledger = judged(
        WITH, Step("replace", (key(1),)), revoked(43), granted(44, **SECOND), Step("renew"), Step("restart")
    )
    assert ledger.verdict("change.session-replaced").seen == "replace led to session_revoked, session_granted"
    assert ledger.verdict("change.session-renewed").seen == "renew led to no event"
    assert failed(ledger) == set()


def test_a_state_that_was_overtaken_on_its_way_is_no_step_back() -> None:
    ledger = judged(START, granted(43), revoked(44), pulled(43, LISTED, asked=1), pulled(44, ALONE))
    assert failed(ledger) == set()
    assert ledger.mark("change.snapshot-agrees") is Mark.PASS


def test_a_new_history_may_begin_anywhere() -> None:
    assert failed(judged(START, Step("new-history"), pulled(1, ALONE))) == set()
    other = pulled(1, ALONE, epoch="c0de")
    assert failed(judged(START, other, pulled(2, ALONE, epoch="c0de"))) == set()


def test_a_revocation_of_another_session_has_no_effect() -> None:
    ledger = judged(WITH, revoked(43, "s-1"), pulled(43, LISTED))
    assert failed(ledger) == set()
    assert ledger.mark("change.session-revoked") is Mark.SKIP
    assert ledger.mark("change.snapshot-agrees") is Mark.PASS


def test_a_session_that_cannot_be_read_is_no_session() -> None:
    ledger = judged(WITH, granted(43, preshared_key=""), pulled(43, ALONE))
    assert failed(ledger) == set()
    assert ledger.mark("change.session-renewed") is None
