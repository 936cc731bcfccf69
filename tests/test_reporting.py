from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from agent.errors import JournalError
from agent.fence import Position
from agent.model import EndReason, PublicKey, Refusal, SessionEnd, SessionPolicy, UnreadablePeer
from agent.reporting import Reporting
from agent.state import State
from tests.support.builders import CORE, NOW, OWN_KEY, after, device, grant, key, observed, peer, snapshot


def end(number: int) -> SessionEnd:
    return SessionEnd(f"s{number}", key(number), EndReason.EXPIRED, CORE, 0.0, 0, 0)


class Desk:
    """A state, its reports, and what the journal was told to forget."""

    def __init__(self) -> None:
        self.state = State(own_key=OWN_KEY)
        self.now = NOW
        self.forgotten: list[str] = []
        self.journal_fails = False
        self.reports = Reporting(self.state, lambda: self.now, self._forget)

    async def _forget(self, ends: Sequence[SessionEnd]) -> None:
        if self.journal_fails:
            raise JournalError("the disk is gone")
        self.forgotten += [end.session_id for end in ends]

    def pulled(self, *peers: object, **members: object) -> None:
        self.state.load(snapshot(peers, **members), self.now)  # type: ignore[arg-type]
        epoch, revision = self.state.epoch, self.state.revision
        self.reports.in_kernel(None if epoch is None else Position(epoch, revision), pulled=True)

    def seen(self, *numbers: int, rx: int = 100) -> None:
        self.state.observe(device(*(observed(n, rx=rx) for n in numbers)), self.now)
        self.reports.observed()

    def is_pending(self) -> bool:
        async def ask() -> bool:
            try:
                await asyncio.wait_for(self.reports.pending(), 0.01)
            except TimeoutError:
                return False
            return True

        return asyncio.run(ask())

    def reported(self, limit: int = 100) -> set[PublicKey]:
        report = self.reports.stats(limit)
        return set() if report is None else {p.public_key for p in report.peers}


def test_before_the_first_state_there_is_nothing_to_say() -> None:
    desk = Desk()
    desk.reports.in_kernel(None, pulled=False)
    desk.seen(1)
    assert desk.reports.applied() is None
    assert desk.reports.stats(10) is None
    assert not desk.is_pending()


def test_applied_is_said_until_it_is_accepted() -> None:
    desk = Desk()
    desk.pulled(peer(1))
    first = desk.reports.applied()
    assert first is not None
    assert (first.epoch, first.revision, first.applied_at) == ("e1", 1, CORE)
    assert desk.reports.applied() == first
    assert desk.is_pending()
    desk.reports.applied_accepted(first)
    assert desk.reports.applied() is None
    assert not desk.is_pending()


def test_an_acceptance_of_an_older_one_leaves_the_newer() -> None:
    desk = Desk()
    desk.pulled(peer(1))
    older = desk.reports.applied()
    assert older is not None
    desk.pulled(peer(1), revision=2)
    desk.reports.applied_accepted(older)
    newer = desk.reports.applied()
    assert newer is not None
    assert newer.revision == 2


def test_without_a_pull_only_news_are_said() -> None:
    desk = Desk()
    desk.pulled(peer(1), peer(2))
    said = desk.reports.applied()
    assert said is not None
    desk.reports.applied_accepted(said)
    desk.now = after(10)
    desk.reports.in_kernel(Position("e1", 1), pulled=False)
    assert desk.reports.applied() is None
    desk.state.block([key(1)], Refusal.NOT_JOURNALLED)
    desk.reports.in_kernel(Position("e1", 1), pulled=False)
    news = desk.reports.applied()
    assert news is not None
    assert [(r.public_key[-4:], r.reason) for r in news.refused] == [("AAE=", "not_journalled")]
    assert news.applied_at == CORE + 10


def test_the_refused_are_listed_whole_with_those_whose_key_cannot_be_read() -> None:
    desk = Desk()
    broken = UnreadablePeer("nonsense", Refusal.INVALID_PUBLIC_KEY)
    desk.pulled(peer(1), peer(2, "10.8.0.1"), peer(3), unreadable=(broken,))
    refused = desk.reports.refused()
    assert [r.reason for r in refused] == ["invalid_public_key", "prefix_claimed", "prefix_claimed"]
    assert refused[0].public_key == "nonsense"


def test_stats_name_changed_peers_until_they_are_accepted() -> None:
    desk = Desk()
    desk.pulled(peer(1, session=grant("s1", 1)), peer(2), peer(3))
    desk.seen(1, 2)
    report = desk.reports.stats(10)
    assert report is not None
    assert (report.epoch, report.revision, report.sent_at) == ("e1", 1, CORE)
    assert {p.public_key: (p.session_id, p.rx_bytes) for p in report.peers} == {
        key(1): ("s1", 100),
        key(2): (None, 100),
    }
    assert desk.reported() == {key(1), key(2)}
    desk.reports.stats_accepted(report)
    assert desk.reported() == set()
    assert not desk.reports.stats(10)
    desk.seen(1, 2)
    assert desk.reported() == set()
    desk.seen(2, rx=150)
    assert desk.reported() == {key(2)}


def test_where_core_judges_liveness_a_look_without_changes_is_reported_once() -> None:
    desk = Desk()
    desk.pulled(peer(1), policy=SessionPolicy(liveness="core"))
    desk.seen(1)
    first = desk.reports.stats(10)
    assert first is not None
    assert [p.public_key for p in first.peers] == [key(1)]
    desk.reports.stats_accepted(first)
    assert desk.reports.stats(10) is None
    desk.reports.applied_accepted(desk.reports.applied())  # type: ignore[arg-type]
    for _ in range(2):
        desk.seen(1)
        quiet = desk.reports.stats(10)
        assert quiet is not None
        assert quiet.peers == ()
        assert desk.reports.stats(10) == quiet, "core has not taken it yet"
        desk.reports.stats_accepted(quiet)
        assert desk.reports.stats(10) is None
    assert not desk.is_pending()


def test_a_full_report_is_followed_by_one_that_says_that_there_are_no_more() -> None:
    desk = Desk()
    desk.pulled(peer(1), peer(2), policy=SessionPolicy(liveness="core"))
    desk.seen(1, 2)
    sizes = []
    while (report := desk.reports.stats(1)) is not None:
        sizes.append(len(report.peers))
        desk.reports.stats_accepted(report)
    assert sizes == [1, 1, 0]


def test_where_gateways_judge_a_look_without_changes_is_not_reported() -> None:
    desk = Desk()
    desk.pulled(peer(1), policy=SessionPolicy(liveness="gateway"))
    desk.seen()
    assert desk.reports.stats(10) is None


def test_a_peer_that_changed_while_its_report_was_under_way_is_due_again() -> None:
    desk = Desk()
    desk.pulled(peer(1))
    desk.seen(1)
    report = desk.reports.stats(10)
    assert report is not None
    desk.seen(1, rx=200)
    desk.reports.stats_accepted(report)
    assert desk.reported() == {key(1)}


def test_a_report_names_so_many_and_the_rest_later() -> None:
    desk = Desk()
    desk.pulled(*(peer(n) for n in range(1, 8)))
    desk.seen(*range(1, 8))
    all_of_them: set[PublicKey] = set()
    for size in (3, 3, 1):
        report = desk.reports.stats(3)
        assert report is not None
        assert len(report.peers) == size
        all_of_them |= {p.public_key for p in report.peers}
        desk.reports.stats_accepted(report)
    assert desk.reports.stats(3) is None
    assert all_of_them == {key(n) for n in range(1, 8)}


def test_what_is_seen_is_not_reported_before_it_is_journalled() -> None:
    desk = Desk()
    desk.pulled(peer(1))
    desk.state.observe(device(observed(1, rx=5)), desk.now)
    assert desk.reports.stats(10) is None


def test_a_new_epoch_makes_everybody_due() -> None:
    desk = Desk()
    desk.pulled(peer(1), peer(2))
    desk.seen(1, 2)
    report = desk.reports.stats(10)
    assert report is not None
    desk.reports.stats_accepted(report)
    desk.pulled(peer(1), peer(2), epoch="e2")
    desk.reports.observed()
    assert desk.reported() == {key(1), key(2)}


def test_unlisted_peers_are_not_reported() -> None:
    desk = Desk()
    desk.pulled(peer(1))
    desk.seen(1, 2)
    assert desk.reported() == {key(1)}


def test_ends_are_given_oldest_first_until_the_journal_has_forgotten_them() -> None:
    desk = Desk()
    desk.reports.ended([end(5), end(2)])
    desk.reports.ended([end(9), end(5)])
    assert [e.session_id for e in desk.reports.ends(10)] == ["s5", "s2", "s9"]
    assert [e.session_id for e in desk.reports.ends(2)] == ["s5", "s2"]
    desk.journal_fails = True
    with pytest.raises(JournalError):
        asyncio.run(desk.reports.ends_accepted(desk.reports.ends(2)))
    assert len(desk.reports.ends(10)) == 3
    desk.journal_fails = False
    asyncio.run(desk.reports.ends_accepted(desk.reports.ends(2)))
    assert [e.session_id for e in desk.reports.ends(10)] == ["s9"]
    assert desk.forgotten == ["s5", "s2"]
    assert desk.is_pending()
    asyncio.run(desk.reports.ends_accepted(desk.reports.ends(2)))
    assert not desk.is_pending()


def test_ends_can_be_told_before_the_first_state() -> None:
    desk = Desk()
    desk.reports.ended([end(1)])
    assert desk.is_pending()
