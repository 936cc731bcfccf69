from __future__ import annotations

import pytest

from agent.errors import InvalidMessage
from agent.fence import Fence, Position, Verdict
from agent.model import Change, PeerRemoved
from tests.support.builders import NOW, after, key, snapshot


def change(epoch: str, revision: int) -> Change:
    return Change(epoch, revision, PeerRemoved(key(1)))


def at(epoch: str, revision: int) -> Fence:
    fence = Fence()
    fence.advance(epoch, revision, NOW)
    return fence


def test_before_the_first_state_no_change_applies_and_any_state_does() -> None:
    fence = Fence()
    assert fence.position is None
    assert fence.judge(change("e1", 1)) is Verdict.NO_STATE
    assert fence.judge_snapshot(snapshot(revision=0)) is Verdict.APPLIED


@pytest.mark.parametrize(
    ("epoch", "revision", "verdict"),
    [
        ("e1", 6, Verdict.APPLIED),
        ("e1", 5, Verdict.HELD),
        ("e1", 1, Verdict.HELD),
        ("e1", 7, Verdict.PULL),
        ("e2", 6, Verdict.PULL),
        ("e2", 1, Verdict.PULL),
    ],
)
def test_only_the_next_revision_of_the_epoch_applies(epoch: str, revision: int, verdict: Verdict) -> None:
    assert at("e1", 5).judge(change(epoch, revision)) is verdict


@pytest.mark.parametrize(("epoch", "revision"), [("e1", 5), ("e1", 6), ("e1", 99), ("e2", 5), ("e2", 0)])
def test_a_state_applies_unless_it_is_older_within_the_epoch(epoch: str, revision: int) -> None:
    state = snapshot(epoch=epoch, revision=revision, requested_at=after(1).boot)
    assert at("e1", 5).judge_snapshot(state) is Verdict.APPLIED


def test_an_older_state_that_was_requested_before_is_merely_overtaken() -> None:
    state = snapshot(revision=4, requested_at=NOW.boot)
    assert at("e1", 5).judge_snapshot(state) is Verdict.HELD


def test_an_older_state_that_was_requested_after_shows_core_going_back() -> None:
    state = snapshot(revision=4, requested_at=after(0.001).boot)
    with pytest.raises(InvalidMessage, match="from revision 5 to 4"):
        at("e1", 5).judge_snapshot(state)


def test_judging_moves_nothing() -> None:
    fence = at("e1", 5)
    fence.judge(change("e1", 6))
    fence.judge_snapshot(snapshot(revision=9))
    assert fence.position == Position("e1", 5)
    assert str(fence.position) == "e1:5"
