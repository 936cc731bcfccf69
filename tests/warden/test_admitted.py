"""What is known of the table, beside what is wanted: no guard is asked here."""

from collections.abc import Collection

import pytest

from agent.admitted import Admitted
from agent.guard import GuardContents
from agent.model import Now, Peer, PublicKey
from agent.plan import Wanted
from agent.state import State
from tests.reconciler.harness import granted, live, revoked, upserted
from tests.support.builders import NOW, OWN_KEY, after, grant, key, peer, prefixes, snapshot


class Table:
    """A state that core has told of these peers, and what its table is known to hold."""

    def __init__(self, *peers: Peer) -> None:
        self.state = State(None, OWN_KEY)
        self.state.load(snapshot(peers), NOW)
        self.state.dirty.clear()
        self.admitted = Admitted(self.state)

    def write(self, *numbers: int, refused: Collection[int] = ()) -> None:
        admissions = self.admitted.admissions(map(key, numbers), NOW)
        self.admitted.take(self.admitted.as_held(admissions), {key(n) for n in refused})

    def let_through(self, seconds: float, *numbers: int) -> list[bool]:
        return [self.admitted.lets_through(key(n), after(seconds)) for n in numbers]


def test_who_is_written_is_let_through_until_the_session_ends_and_others_are_not() -> None:
    table = Table(live(1), peer(2, mfa_exempt=True), live(3), live(4))
    table.write(1, 2, 3, refused=[3])
    assert table.let_through(3599, 1, 2, 3, 4) == [True, True, False, False]
    assert table.let_through(3600, 1, 2, 3, 4) == [False, True, False, False]


def test_who_is_not_wanted_is_not_to_be_let_through() -> None:
    table = Table(live(1), peer(2), peer(3, mfa_exempt=True))
    admissions = table.admitted.admissions([key(1), key(2), key(3)], NOW)
    assert {k: admission.remaining for k, admission in admissions.items()} == {key(1): 3600, key(3): None}


def test_who_has_just_been_admitted_as_is_wanted_is_not_judged_again() -> None:
    table = Table(live(1), live(2))
    table.write(1, 2)
    admitted, state = table.admitted, table.state
    admitted.judge_anew()
    assert admitted.admissions([key(1), key(2)], NOW, changed_only=True) == {}
    asked: list[PublicKey] = []
    judge = state.wanted

    def wanted(key: PublicKey, now: Now) -> Wanted:
        asked.append(key)
        return judge(key, now)

    state.wanted = wanted  # type: ignore[method-assign]
    assert admitted.withdraw([key(1), key(2)], NOW, judged=True) == []
    assert asked == []
    assert admitted.withdraw([key(1), key(2)], NOW, judged=True) == []
    assert asked == [key(1), key(2)]


def test_what_somebody_had_is_dismissed_once_the_session_is_over_and_known_no_more() -> None:
    table = Table(live(1), live(2))
    table.write(1, 2)
    table.state.change(revoked(1, "s1"), NOW)
    assert table.admitted.withdraw([key(1), key(2)], NOW, judged=True) == [*prefixes("10.8.0.1")]
    assert table.let_through(0, 1, 2) == [False, True]
    both = GuardContents(dict.fromkeys(prefixes("10.8.0.1", "10.8.0.2")))
    assert table.admitted.strangers(both) == {*prefixes("10.8.0.1")}


def test_a_prefix_that_moves_is_taken_from_its_owner_who_is_tried_again_once() -> None:
    table = Table(live(1), live(2))
    table.write(1, 2)
    admitted, state = table.admitted, table.state
    for number, address in ((1, "10.8.0.7"), (2, "10.8.0.1")):
        state.change(upserted(number, address, session=grant(f"s{number}", number)), NOW)
    wanted = admitted.admissions([key(2)], NOW)
    assert admitted.moving(wanted) == [*prefixes("10.8.0.1")]
    admitted.moved(prefixes("10.8.0.1"))
    assert admitted.moving(wanted) == []
    for again in ({key(1)}, set()):
        state.dirty.clear()
        admitted.try_again(NOW)
        assert state.dirty == again


def test_a_table_that_is_raised_for_some_says_nothing_any_more_about_the_others() -> None:
    table = Table(live(1), live(2))
    table.write(1, 2)
    admitted = table.admitted
    wanted = admitted.admissions([key(2)], NOW)
    admitted.keep_only(wanted)
    assert table.let_through(0, 1, 2) == [False, True]
    assert admitted.is_among(wanted)
    # Elements of the other may still be there.
    admission = admitted.admission(key(1), NOW)
    assert admission is not None
    assert not admission.fresh


def test_what_the_link_took_with_it_may_still_be_there_and_what_was_taken_down_is_not() -> None:
    for goes, fresh in ((Admitted.lose_link, False), (Admitted.forget, True)):
        table = Table(live(1))
        table.write(1)
        goes(table.admitted)
        assert table.let_through(0, 1) == [False]
        admission = table.admitted.admission(key(1), NOW)
        assert admission is not None
        assert admission.fresh is fresh


def test_of_an_adopted_table_who_is_just_so_need_not_be_written_until_it_is_written_to() -> None:
    table = Table(live(1), live(2), peer(3, mfa_exempt=True))
    admitted = table.admitted
    first, second, third = prefixes("10.8.0.1", "10.8.0.2", "10.8.0.3")
    left = {first: 3600.0, second: 1800.0, third: None}
    admitted.adopt(GuardContents(left, frozenset({first, second})), NOW)
    # Of the other the table itself ends the session, earlier.
    assert table.let_through(1799, 1, 2, 3) == [True, True, True]
    assert table.let_through(1800, 1, 2, 3) == [True, False, True]
    held = admitted.as_held(admitted.admissions(admitted.everybody(), NOW))
    assert admitted.already_there(held) == {key(1), key(3)}
    assert not admitted.already_there(held)


@pytest.mark.parametrize(("lasts", "covered"), [(3597, False), (3599, True), (7200, True)])
def test_elements_cover_a_session_that_they_do_not_outlive(lasts: float, covered: bool) -> None:
    table = Table(live(1), peer(2, mfa_exempt=True))
    table.write(1)
    admitted = table.admitted
    table.state.change(granted(1, grant("s1", 1, lasts=lasts)), NOW)
    wanted = admitted.admissions([key(1), key(2)], NOW)
    assert admitted.covers(key(1), wanted[key(1)], NOW) is covered
    assert admitted.covers(key(2), wanted[key(2)], NOW)
    more = wanted[key(1)]._replace(prefixes=prefixes("10.8.0.1", "10.9.0.0/24"))
    assert not admitted.covers(key(1), more, NOW)
