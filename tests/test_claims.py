from hypothesis import given, settings
from hypothesis import strategies as st

from agent.claims import Claims
from agent.model import Prefix, PublicKey
from tests.support.builders import key, prefixes

Claim = tuple[PublicKey, tuple[Prefix, ...], bool]


def claims(*listed: Claim) -> Claims:
    held = Claims()
    held.load(listed)
    return held


def contested(held: Claims, *numbers: int) -> list[int]:
    """Who is, by asking for each and by the one walk over all."""
    found = [number for number in numbers if held.contested(key(number))]
    assert [number for number in numbers if key(number) in held.all_contested()] == found
    return found


def test_all_claimants_of_one_prefix_are_refused() -> None:
    held = claims(
        (key(1), prefixes("10.0.0.1", "10.1.0.0/24"), False),
        (key(2), prefixes("10.0.0.2", "10.1.0.0/24"), True),
        (key(3), prefixes("10.1.0.0/24"), False),
        (key(4), prefixes("10.0.0.4"), True),
    )
    assert contested(held, 1, 2, 3, 4) == [1, 2, 3]
    assert (held.neighbours(key(1)), held.neighbours(key(4))) == ({key(2), key(3)}, set())


def test_containing_a_prefix_is_claiming_it_among_peers_that_must_do_mfa() -> None:
    held = claims((key(1), prefixes("10.0.0.0/24"), True), (key(2), prefixes("10.0.0.7"), True))
    assert contested(held, 1, 2) == [1, 2]


def test_a_site_router_may_contain_the_prefix_of_a_peer_that_must_do_mfa() -> None:
    held = claims((key(1), prefixes("10.0.0.0/8"), False), (key(2), prefixes("10.0.0.7"), True))
    assert contested(held, 1, 2) == []


def test_neighbouring_prefixes_are_no_claim() -> None:
    held = claims(
        (key(1), prefixes("10.0.0.0/25"), True),
        (key(2), prefixes("10.0.0.128/25"), True),
        (key(3), prefixes("10.0.1.0/24"), True),
        (key(4), prefixes("a00::/25"), True),
    )
    assert contested(held, 1, 2, 3, 4) == []


def test_the_default_routes_of_both_families_contain_only_their_own() -> None:
    held = claims(
        (key(1), prefixes("0.0.0.0/0"), True),
        (key(2), prefixes("fd00::1"), True),
        (key(3), prefixes("255.255.255.255"), True),
    )
    assert contested(held, 1, 2, 3) == [1, 3]


def test_a_peer_does_not_contest_its_own_prefixes() -> None:
    held = claims((key(1), prefixes("10.0.0.0/24", "10.0.0.7"), True))
    assert contested(held, 1) == []


def test_a_prefix_given_twice_by_one_peer_is_claimed_once() -> None:
    twice = prefixes("10.0.0.7", "10.0.0.7")
    held = claims((key(1), twice, True))
    assert contested(held, 1) == []
    held.put(key(2), twice, True)
    assert contested(held, 1, 2) == [1, 2]
    held.drop(key(2))
    assert contested(held, 1) == []
    assert held.drop(key(1)) == set()
    held.put(key(3), twice, True)
    assert contested(held, 3) == []


def test_a_change_names_everybody_whose_verdict_may_have_changed() -> None:
    held = claims((key(1), prefixes("10.0.0.0/24"), True), (key(2), prefixes("10.0.1.2"), True))
    assert held.put(key(2), prefixes("10.0.0.2"), True) == {key(1), key(2)}
    assert held.put(key(2), prefixes("10.0.1.2"), True) == {key(1), key(2)}
    assert held.put(key(3), prefixes("10.0.0.0/24"), False) == {key(1), key(3)}
    assert held.drop(key(3)) == {key(1)}


def test_a_change_that_is_none_has_nobody_else_judged_again() -> None:
    held = claims((key(1), prefixes("10.0.0.0/24"), True), (key(2), prefixes("10.0.0.2"), True))
    assert held.put(key(2), prefixes("10.0.0.2"), True) == {key(2)}


def test_who_is_exempted_from_mfa_contests_no_prefix_within_its_own_any_more() -> None:
    held = claims((key(1), prefixes("10.0.0.0/24"), True), (key(2), prefixes("10.0.0.2"), True))
    assert held.put(key(1), prefixes("10.0.0.0/24"), False) == {key(1), key(2)}
    assert contested(held, 1, 2) == []
    assert held.put(key(1), prefixes("10.0.0.0/24"), True) == {key(1), key(2)}
    assert contested(held, 1, 2) == [1, 2]


def test_a_list_replaces_the_one_before() -> None:
    held = claims((key(1), prefixes("10.0.0.0/24"), True), (key(2), prefixes("10.0.0.2"), False))
    held.load([(key(3), prefixes("10.0.0.0/24"), True), (key(2), prefixes("10.0.0.2"), True)])
    assert contested(held, 2, 3) == [2, 3]
    held.load([(key(2), prefixes("10.0.0.2"), True)])
    assert (contested(held, 2), held.drop(key(3))) == ([], set())


def test_dropping_a_stranger_changes_nothing() -> None:
    assert claims().drop(key(9)) == set()
    assert not claims().contested(key(9))


# A small space, so that prefixes meet often; in both families.
_prefix = st.builds(
    lambda size, number, length: Prefix(
        bytes([number << 4 & 0xF00 >> length & 0xFF]) + bytes(size - 1), length
    ),
    st.sampled_from([4, 16]),
    st.integers(0, 15),
    st.integers(0, 4),
)
_some = st.lists(_prefix, max_size=3).map(tuple)
_step = st.tuples(st.integers(1, 5), st.none() | st.tuples(_some, st.booleans()), st.booleans())


def _contain(a: Prefix, b: Prefix) -> bool:
    if len(a.packed) != len(b.packed) or a.length > b.length:
        return False
    shift = len(a.packed) * 8 - a.length
    return int.from_bytes(a.packed, "big") >> shift == int.from_bytes(b.packed, "big") >> shift


def _contested(listed: dict[PublicKey, tuple[tuple[Prefix, ...], bool]], who: PublicKey) -> bool:
    mine, mfa = listed[who]
    return any(
        a == b or (mfa and other_mfa and (_contain(a, b) or _contain(b, a)))
        for other, (theirs, other_mfa) in listed.items()
        if other != who
        for a in mine
        for b in theirs
    )


@settings(max_examples=300)
@given(st.lists(_step, max_size=25))
def test_changes_and_a_whole_list_are_judged_alike(
    steps: list[tuple[int, tuple[tuple[Prefix, ...], bool] | None, bool]],
) -> None:
    held = Claims()
    listed: dict[PublicKey, tuple[tuple[Prefix, ...], bool]] = {}
    for number, claim, go_on_from_the_list in steps:
        before = {who: _contested(listed, who) for who in listed}
        if claim is None:
            listed.pop(key(number), None)
            affected = held.drop(key(number))
        else:
            listed[key(number)] = claim
            affected = held.put(key(number), *claim)
        whole = Claims()
        whole.load((who, *claim) for who, claim in listed.items())
        for who in listed:
            assert held.contested(who) == whole.contested(who) == _contested(listed, who)
        expected = {who for who in listed if _contested(listed, who)}
        assert held.all_contested() == whole.all_contested() == expected
        turned = {who for who in listed if before.get(who) != _contested(listed, who)}
        assert turned <= affected
        # What is kept is no other, and no more, than what the list itself would need.
        assert vars(held) == vars(whole)
        if go_on_from_the_list:
            held = whole
