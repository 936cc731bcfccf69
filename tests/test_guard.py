from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import nftlist, ruleset
from agent.encoding import parse_prefix
from agent.guard import TOLERANCE, Admission, GuardContents, compare, slept_since
from agent.model import Prefix, PublicKey
from agent.nftelements import ElementChange, Verb
from agent.ruleset import ALWAYS, Kind, PrefixSet, table_name

ALICE, BOB = (PublicKey(bytes([number]) * 32) for number in (1, 2))
A, B, WIDE = (parse_prefix(text) for text in ("10.8.0.5", "10.8.0.6", "10.8.9.0/24"))


def held(elements: dict[Prefix, float | None], *barred: Prefix, **more: object) -> GuardContents:
    return GuardContents(elements, frozenset(barred), **more)  # type: ignore[arg-type]


def test_what_is_as_wanted_needs_no_repair() -> None:
    wanted = {ALICE: Admission((A,), 60.0), BOB: Admission((WIDE,), None)}
    repair = compare(wanted, held({A: 59.0, WIDE: None}, A), lease_demanded=True)
    assert (repair.rebuild, repair.dismiss, dict(repair.admit), repair.drift) == (False, (), {}, ())


def test_what_took_long_to_read_is_judged_with_as_much_patience() -> None:
    wanted = {ALICE: Admission((A,), 60.0), BOB: Admission((WIDE,), None)}
    read = held({A: 64.0, WIDE: None}, A, lease=9.0).read_over(10.0)
    assert (read.elements, read.lease, read.spread) == ({A: 54.0, WIDE: None}, 0.0, 10.0)
    assert compare(wanted, read, lease_demanded=True).drift == ()
    for left, said in ((60 + TOLERANCE + 10.1, "longer"), (60 - TOLERANCE - 0.1, "less")):
        drift = compare(wanted, held({A: left, WIDE: None}, A).read_over(10.0), lease_demanded=True).drift
        assert [said in detail for _, detail in drift] == [True]


def test_a_missing_table_is_raised_with_everybody() -> None:
    wanted = {ALICE: Admission((A,), 60.0)}
    repair = compare(wanted, None, lease_demanded=True)
    assert (repair.rebuild, repair.admit) == (True, wanted)
    assert [drift.detail for drift in repair.drift] == ["the nftables table is gone"]


@pytest.mark.parametrize(
    ("wanted", "elements", "barred", "said"),
    [
        (60.0, {}, (A,), "is not let through"),
        (60.0, {A: 60 + TOLERANCE + 0.1}, (A,), "s longer than its session lives"),
        (60.0, {A: 90.0}, (A,), "is let through for 30 s longer than its session lives"),
        (60.0, {A: math.inf}, (A,), "s longer than its session lives"),
        (60.0, {A: 60 - TOLERANCE - 0.1}, (A,), "s less than its session lives"),
        (60.0, {A: 20.0}, (A,), "is let through for 40 s less than its session lives"),
        (60.0, {A: None}, (A,), "let through for good"),
        (60.0, {A: 60.0}, (), "not barred without one"),
        (0.5, {A: 5.0}, (A,), "s longer than its session lives"),
        (None, {}, (), "not let through for good"),
        (None, {A: 60.0}, (), "not let through for good"),
        (None, {A: None}, (A,), "is barred"),
    ],
)
def test_an_element_that_differs_is_written_anew(
    wanted: float | None, elements: dict[Prefix, float | None], barred: tuple[Prefix, ...], said: str
) -> None:
    admissions = {ALICE: Admission((A,), wanted), BOB: Admission((B,), 30.0)}
    repair = compare(admissions, held({**elements, B: 30.0}, *barred, B), lease_demanded=True)
    assert dict(repair.admit) == {ALICE: admissions[ALICE]}
    ((key, detail),) = repair.drift
    assert key == ALICE
    assert said in detail
    assert detail.startswith("10.8.0.5/32 ")


@pytest.mark.parametrize(
    ("wanted", "elements"),
    [
        (0.5, {}),
        (TOLERANCE, {}),
        (60.0, {A: 60 + TOLERANCE}),
        (60.0, {A: 60 - TOLERANCE}),
        (1.0, {A: 0.0}),
    ],
)
def test_time_that_passes_while_reading_is_no_drift(
    wanted: float, elements: dict[Prefix, float | None]
) -> None:
    repair = compare({ALICE: Admission((A,), wanted)}, held(elements, A), lease_demanded=True)
    assert (repair.rebuild, repair.dismiss, dict(repair.admit), repair.drift) == (False, (), {}, ())


def test_what_belongs_to_nobody_is_dismissed() -> None:
    wanted = {ALICE: Admission((A,), 60.0)}
    repair = compare(wanted, held({A: 60.0, B: 60.0, WIDE: None}, A, B), lease_demanded=True)
    assert sorted(repair.dismiss) == sorted((B, WIDE))
    assert len(repair.drift) == 2


def test_a_bar_that_an_ended_session_left_behind_is_taken_away_without_a_word() -> None:
    repair = compare({}, held({}, A), lease_demanded=True)
    assert (repair.dismiss, repair.drift) == ((A,), ())


def test_faults_of_the_table_and_another_lease_rule_rebuild_it() -> None:
    broken = compare({}, held({}, faults=("the chain ingress is gone",)), lease_demanded=True)
    assert (broken.rebuild, [d.detail for d in broken.drift]) == (True, ["the chain ingress is gone"])
    other = compare({}, held({}, lease_demanded=True), lease_demanded=False)
    assert (other.rebuild, len(other.drift)) == (True, 1)


def test_an_adopted_sessions_life_is_the_shortest_of_its_elements_and_none_unless_all_are_there() -> None:
    contents = held({A: 30.0, B: 20.0, WIDE: None, parse_prefix("10.8.0.7"): math.inf})
    assert contents.remaining((A, B)) == 20.0
    assert contents.remaining((A,)) == 30.0
    for prefixes in ((), (A, WIDE), (A, parse_prefix("10.8.0.99")), (parse_prefix("10.8.0.7"),)):
        assert contents.remaining(prefixes) == 0.0


def test_what_there_is_of_one_peer_is_its_own_elements_and_bars_of_a_table_that_counts_as_whole() -> None:
    contents = held({A: 30.0, B: 20.0}, A, B, WIDE, faults=("a chain is gone",), spread=3.0, lease=9.0)
    assert contents.of((A, WIDE)) == held({A: 30.0}, A, WIDE, spread=3.0)


def test_the_table_tells_a_session_that_is_over_from_a_peer_it_knows_no_session_of() -> None:
    contents = held({A: 30.0, WIDE: None}, A, B)
    assert contents.session_left((A,)) == 30.0
    assert contents.session_left((B,)) == 0.0
    assert contents.session_left((A, B)) == 0.0
    assert contents.session_left((WIDE,)) is None
    assert contents.session_left(()) is None


@pytest.mark.parametrize(
    ("boot", "monotonic", "slept"),
    [(1000.0, 900.0, False), (2000.1, 1900.0, False), (2000.0, 1899.0, True), (90_000.0, 900.0, True)],
)
def test_after_a_suspend_the_elements_are_written_anew(boot: float, monotonic: float, slept: bool) -> None:
    assert slept_since(100.0, boot, monotonic) is slept


def test_short_sleeps_add_up() -> None:
    offset = 100.0
    assert not slept_since(offset, 1000.2, 900.0)
    assert slept_since(offset, 1000.4, 900.0)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_timeout_is_whole_milliseconds_rounded_down_or_none(seconds: float) -> None:
    milliseconds = ruleset.milliseconds(seconds)
    if milliseconds is None:
        assert not seconds >= 0.01
        return
    assert 10 <= milliseconds <= seconds * 1000
    assert min(seconds, 99_999_999.0) * 1000 - milliseconds < 1.01
    change = ElementChange(Verb.ADD, "session4_32", {A.packed: milliseconds})
    [command] = ruleset.as_commands("wg0", [change])
    text = command.removeprefix("add element inet wg_agent_wg0 session4_32 { 10.8.0.5 timeout ").removesuffix(
        " }"
    )
    # nft takes no number of more than eight digits.
    assert all(len(number) <= 8 for number in re.findall("[0-9]+", text))
    whole, rest = re.fullmatch(r"(\d+)s(\d+)ms", text).groups()  # type: ignore[union-attr]
    assert int(whole) * 1000 + int(rest) == milliseconds


@given(st.text(st.characters(codec="ascii", exclude_characters='"*\\', categories=("L", "N", "P", "S"))))
def test_no_two_interfaces_share_a_table(name: str) -> None:
    if not name:
        return
    text = table_name(name)
    body = text.removeprefix("wg_agent_")
    back = bytearray()
    while body:
        if body[0] == ".":
            back.append(int(body[1:3], 16))
            body = body[3:]
        else:
            back.append(ord(body[0]))
            body = body[1:]
    assert back.decode() == name
    assert all(c.isalnum() or c in "._-" for c in text)


@pytest.mark.parametrize("name", ["", 'wg"0', "wg*", "wg\\0", "wg\n", "wgé"])
def test_an_interface_that_nft_can_not_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="can't name"):
        table_name(name)


def test_every_session_set_fails_closed() -> None:
    for length in range(129):
        for version in (4, 6):
            command = ruleset.add_set("wg0", PrefixSet(Kind.SESSION, version, length))
            assert "timeout 1s;" in command
            assert "interval" not in command
            assert "auto-merge" not in command


def test_a_listing_is_read_in_the_words_of_older_and_newer_nft() -> None:
    text = """table inet wg_agent_wg0 {
	comment "made by wg-agent, which owns this table"
	set lease {
		type ifname
		size 65535
		flags timeout
		timeout 1s
		elements = { "wg0" timeout 5m expires 4m59s996ms }
	}
	set session4_32 {
		type ipv4_addr
		timeout 1s
		elements = { 10.8.0.5 timeout 1d10h17m36s788ms expires 1d10h17m36s780ms, 10.8.0.6 expires 992ms,
				10.8.0.7 timeout never, 10.8.0.8 timeout 2m expires 1m1s comment "it, is" }
	}
	set session6_64 {
		type ipv6_addr
		timeout 1s
		elements = { fd00:8:: timeout 1m40s expires 1m39s992ms }
	}
	set exempt4_24 {
		type ipv4_addr
		elements = { 10.8.9.0 comment "mine" }
	}
	set barred4_32 {
		type ipv4_addr
		elements = { 10.8.0.5, 10.8.0.6 }
	}
	set session4_40 {
		type ipv4_addr
	}
	set barred4_16 {
		type ipv4_addr
		flags interval
	}
	map theirs {
		type ipv4_addr : verdict
		elements = { 10.0.0.1 : accept }
	}
	chain ingress {
		type filter hook ingress devices = { "wg0" } priority 0; policy drop;
		iifname @lease jump from_session comment "one"
		ip saddr 10.0.0.1 accept
	}
	chain postrouting {
		type filter hook postrouting priority filter; policy accept;
	}
	chain other {
		type nat hook output priority -100; policy accept;
	}
}
"""
    others = "table inet wg_agent_wg {\n\tset session4_8 {\n\t\ttype ipv4_addr\n\t}\n}\n"
    own = nftlist.table_part(f"{others}{text}{others}", ruleset.table("wg0"))
    assert own == text.rstrip()
    assert nftlist.table_part(others, ruleset.table("wg0")) is None
    listing = nftlist.parse(own)
    assert listing.owned
    assert listing.has_lease
    assert {str(one) for one in listing.sets} == {"session4_32", "session6_64", "exempt4_24", "barred4_32"}
    assert listing.broken_sets == ["barred4_16"]
    assert listing.chains["ingress"].hook == ("ingress", "wg0", "0", "drop")
    assert listing.chains["ingress"].rules == ["one", ""]
    assert listing.chains["postrouting"].hook == ("postrouting", "", "0", "accept")
    contents = listing.contents(
        "wg0",
        {
            "lease": {b"wg0".ljust(16, b"\0"): 299.996, b"wg1".ljust(16, b"\0"): 1.0},
            "session4_32": {A.packed: 123.4, B.packed: None},
            "session6_64": {parse_prefix("fd00:8::/64").packed: 99.992},
            "exempt4_24": {WIDE.packed: None},
            "barred4_32": {A.packed: None, B.packed: None},
        },
    )
    assert contents.elements == {A: 123.4, B: math.inf, parse_prefix("fd00:8::/64"): 99.992, WIDE: None}
    assert contents.barred == {A, B}
    assert contents.lease == 299.996
    assert listing.contents("wg0", {}).lease is None
    assert "there is a foreign chain other" in contents.faults
    assert "the set session6_128 is gone" in contents.faults


def test_a_listing_that_can_not_be_understood_is_never_half_read() -> None:
    with pytest.raises(ValueError, match="nft lists something unknown"):
        nftlist.parse("table inet t {\n\tnonsense of the future\n}\n")


def test_flowtables_over_the_interface_are_named_by_device_and_wildcard() -> None:
    text = """table inet shop {
	flowtable fast {
		hook ingress priority filter
		devices = { eth0, wg0 }
	}
	flowtable slow {
		hook ingress priority filter
		devices = { eth0,
				wg01 }
	}
}
table ip more {
	flowtable any {
		hook ingress priority filter
		devices = { "wg*" }
	}
}
"""
    assert nftlist.flowtables(text, "wg0") == ("inet shop fast", "ip more any")
    assert nftlist.flowtables("", "wg0") == ()


def test_admitting_a_prefix_twice_in_one_go_deletes_it_once() -> None:
    admissions = [Admission((A, A), 5.0), Admission((A,), 6.0), Admission((WIDE, WIDE), None)]
    step = ruleset.admit("wg0", admissions, ALWAYS)
    assert step.sets == {*ALWAYS, PrefixSet(Kind.EXEMPT, 4, 24)}
    commands = ruleset.as_commands("wg0", step.changes)
    assert sum(command.count("10.8.0.5") for command in commands if command.startswith("delete")) == 2
    assert [c for c in commands if "timeout 6s0ms" in c]
    dismissed = ruleset.as_commands("wg0", ruleset.dismiss([A, A, WIDE], ALWAYS))
    assert [c.count("10.8.0.5") for c in dismissed] == [1] * 6


def test_a_listing_that_is_cut_off_is_said_to_be() -> None:
    cut = "table inet t {\n\tset sessions4_32 {\n\t\ttype ipv4_addr\n"
    with pytest.raises(ValueError, match="cut off"):
        nftlist.parse(cut)
