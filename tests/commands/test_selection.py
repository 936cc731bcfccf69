from __future__ import annotations

import ipaddress
import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.commands.options import ORDERS, STATES
from agent.commands.selection import matching, ordered
from agent.encoding import format_time
from agent.model import PublicKey
from tests.commands.documents import some_peers
from tests.commands.parts import ALICE, BOB, NOBODY, peer

PEERS = st.builds(some_peers, st.integers(0, 30), st.integers(0, 1000))


def names(found: list[Any]) -> list[str]:
    return [entry["name"] for entry in found]


@given(peers=PEERS, by=st.sampled_from(ORDERS), seed=st.integers(0, 1000))
def test_sorting_loses_nobody_and_does_not_depend_on_cores_order(
    peers: list[dict[str, Any]], by: str, seed: int
) -> None:
    shuffled = random.Random(seed).sample(peers, len(peers))

    assert ordered(shuffled, by) == ordered(peers, by)
    assert sorted(map(repr, ordered(peers, by))) == sorted(map(repr, peers))


def following(peers: list[dict[str, Any]], by: str) -> list[tuple[Any, Any]]:
    found = ordered(peers, by)
    return list(itertools.pairwise(found))


@given(PEERS)
def test_by_state_those_come_first_who_are_up(peers: list[dict[str, Any]]) -> None:
    for one, next_one in following(peers, "state"):
        assert STATES.index(one["state"]) <= STATES.index(next_one["state"])


@given(PEERS)
def test_by_left_whose_session_ends_first_comes_first_and_who_has_none_last(
    peers: list[dict[str, Any]],
) -> None:
    for one, next_one in following(peers, "left"):
        assert next_one["time_left"] is None or one["time_left"] <= next_one["time_left"]


@given(PEERS)
def test_by_handshake_the_latest_comes_first_and_never_last(peers: list[dict[str, Any]]) -> None:
    for one, next_one in following(peers, "handshake"):
        assert next_one["latest_handshake"] is None or one["latest_handshake"] >= next_one["latest_handshake"]


@given(PEERS)
def test_by_rate_and_traffic_the_busiest_comes_first(peers: list[dict[str, Any]]) -> None:
    for one, next_one in following(peers, "traffic"):
        assert one["rx_bytes"] + one["tx_bytes"] >= next_one["rx_bytes"] + next_one["tx_bytes"]
    for one, next_one in following(peers, "rate"):
        rates = [(p["rx_rate"] or 0) + (p["tx_rate"] or 0) for p in (one, next_one)]
        assert rates[0] >= rates[1]


def test_addresses_sort_as_numbers() -> None:
    peers = [
        peer(PublicKey(bytes([n]) * 32), name=str(n), allowed_ips=ips)
        for n, ips in enumerate([["fd00::1/128"], ["10.8.0.10/32"], [], ["10.8.0.9/32"]])
    ]

    assert names(ordered(peers, "ip")) == ["3", "1", "0", "2"]


def test_names_sort_without_regard_to_case_and_nameless_ones_last() -> None:
    peers = [peer(key, name=name) for key, name in ((ALICE, ""), (BOB, "bob"), (NOBODY, "Alice"))]

    assert names(ordered(peers, "name")) == ["Alice", "bob", ""]


ADDRESSED = [
    peer(ALICE, name="alice-laptop", allowed_ips=["10.8.0.5/32", "fd00:8::5/128"]),
    peer(BOB, name="BOB 10.9.0.5", allowed_ips=["10.8.1.0/24"]),
    peer(NOBODY, name="Müller\x1b", allowed_ips=["192.168.0.0/16"]),
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("LAPTOP", [0]),
        ("bob", [1]),
        ("müll", [2]),
        (r"\x1b", [2]),
        ("10.8.0.5", [0]),
        ("10.8.1.77", [1]),
        ("10.8.1.128/25", [1]),
        ("10.0.0.0/8", [0, 1]),
        ("10.8.0.5/16", [0, 1]),
        ("0.0.0.0/0", [0, 1, 2]),
        ("fd00:8::/32", [0]),
        ("::/0", [0]),
        ("10.9.0.5", [1]),  # nobody's address, but in a name
        (ADDRESSED[0]["public_key"], [0]),
        (ADDRESSED[1]["public_key"][:6], [1]),
        (ADDRESSED[0]["public_key"][:6].lower(), []),
        ("nobody", []),
        ("10.7.0.1", []),
    ],
)
def test_an_argument_means_an_address_or_a_name_or_a_key(text: str, found: list[int]) -> None:
    assert matching(ADDRESSED, text) == [ADDRESSED[number] for number in found]


def test_a_name_is_meant_before_the_beginning_of_a_key() -> None:
    peers = [peer(ALICE, name="x"), peer(BOB, name=peer(ALICE)["public_key"][:4])]

    assert names(matching(peers, peers[1]["name"])) == [peers[1]["name"]]


@given(peers=PEERS, number=st.integers(0, (1 << 32) - 1), length=st.integers(0, 32))
def test_a_prefix_means_exactly_those_whose_allowed_ips_touch_it(
    peers: list[dict[str, Any]], number: int, length: int
) -> None:
    network = ipaddress.ip_network((number, length), strict=False)
    first, last = int(network.network_address), int(network.broadcast_address)

    def touches(entry: dict[str, Any]) -> bool:
        held = [ipaddress.ip_network(text) for text in entry["allowed_ips"]]
        return any(
            one.version == 4 and int(one.network_address) <= last and int(one.broadcast_address) >= first
            for one in held
        )

    wanted = [entry for entry in peers if touches(entry)]
    if wanted:
        assert matching(peers, f"{ipaddress.IPv4Address(number)}/{length}") == wanted


def test_handshakes_are_written_so_that_their_text_sorts_as_they_do() -> None:
    times = [0.5, 9.999, 1_000_000_000.0, 1_700_000_000.123, 4_000_000_000.0]

    assert sorted(map(format_time, times)) == list(map(format_time, times))
