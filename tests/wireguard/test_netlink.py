import itertools
import os
import struct
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import (
    KEEP,
    AddPeer,
    CutPeer,
    DeviceConfig,
    Operation,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)
from agent.wireguard import netlink
from tests.wireguard.attributes import NESTED, attribute, parse
from tests.wireguard.strategies import adds, operations

REMOVE_ME, REPLACE, UPDATE_ONLY = 1, 2, 4
A, B = PublicKey(b"a" * 32), PublicKey(b"b" * 32)
PSK = PresharedKey(b"p" * 32)
V4, V6 = Prefix(bytes([10, 0, 0, 1]), 32), Prefix(bytes([0xFD, *bytes(15)]), 64)
ZEROS = bytes(32)


def rnd(size: int) -> bytes:
    return b"r" * size


def encode(todo: Iterable[Operation]) -> list[bytes]:
    return list(netlink.encode_operations("wg0", todo, rnd))


def peers(body: bytes) -> list[dict[int, Any]]:
    """The entries of a body's nest of peers: attribute type to value, allowed IPs as prefixes."""
    (name_kind, name), (nest_kind, nest) = parse(body)
    assert (name_kind, name, nest_kind) == (2, b"wg0\0", 8 | NESTED)
    found = []
    for kind, entry in parse(nest):
        assert kind == NESTED
        values: dict[int, Any] = dict(parse(entry))
        assert len(values) == len(list(parse(entry)))
        if 3 in values:
            values[3] = struct.unpack("=I", values[3])[0]
        if 5 in values:
            values[5] = struct.unpack("=H", values[5])[0]
        if 9 | NESTED in values:
            values[9] = tuple(map(prefix, parse(values.pop(9 | NESTED))))
        found.append(values)
    return found


def prefix(item: tuple[int, bytes]) -> Prefix:
    kind, value = item
    assert kind == NESTED
    values = dict(parse(value))
    assert struct.unpack("=H", values[1])[0] == {4: 2, 16: 10}[len(values[2])]
    assert len(values[3]) == 1
    return Prefix(values[2], values[3][0])


def one(operation: Operation) -> dict[int, Any]:
    (body,) = encode([operation])
    (entry,) = peers(body)
    return entry


@pytest.mark.parametrize("prefixes", [(), (V4,), (V4, V6), (V6, V4), (V6,), (V4, V4, V6)])
def test_an_added_peer_replaces_whatever_was_there(prefixes: tuple[Prefix, ...]) -> None:
    ips = {9: prefixes} if prefixes else {}
    assert one(AddPeer(A, PSK, prefixes)) == {1: A, 2: PSK.raw, 3: REPLACE, **ips}
    assert one(AddPeer(A, None, prefixes)) == {1: A, 2: ZEROS, 3: REPLACE, **ips}


def test_a_removed_peer_is_named_and_flagged() -> None:
    assert one(RemovePeer(A)) == {1: A, 3: REMOVE_ME}


def test_a_cut_peer_gets_a_random_psk_and_loses_its_allowed_ips_only_if_it_is_there() -> None:
    assert one(CutPeer(A)) == {1: A, 2: b"r" * 32, 3: UPDATE_ONLY | REPLACE}


def test_each_cut_peer_gets_a_psk_of_its_own() -> None:
    many = 3 * netlink.MAX_PEERS
    cut = [CutPeer(PublicKey(number.to_bytes(32, "big"))) for number in range(many)]
    messages = netlink.encode_operations("wg0", cut, os.urandom)
    psks = {entry[2] for body in messages for entry in peers(body)}
    assert len(psks) == many


def test_an_update_says_only_what_changes() -> None:
    update = UpdatePeer(A, KEEP, KEEP, False, KEEP)
    assert one(update) == {1: A, 3: UPDATE_ONLY}
    assert one(UpdatePeer(A, PSK, KEEP, False, KEEP)) == {1: A, 2: PSK.raw, 3: UPDATE_ONLY}
    assert one(UpdatePeer(A, None, KEEP, False, 25)) == {1: A, 2: ZEROS, 3: UPDATE_ONLY, 5: 25}
    assert one(UpdatePeer(A, KEEP, (V6,), False, 0)) == {1: A, 3: UPDATE_ONLY, 5: 0, 9: (V6,)}
    assert one(UpdatePeer(A, KEEP, (V4,), True, KEEP)) == {
        1: A,
        3: UPDATE_ONLY | REPLACE,
        9: (V4,),
    }
    assert one(UpdatePeer(A, KEEP, (), True, KEEP)) == {1: A, 3: UPDATE_ONLY | REPLACE}


def test_keeping_the_allowed_ips_never_empties_them() -> None:
    assert one(UpdatePeer(A, KEEP, KEEP, True, KEEP)) == {1: A, 3: UPDATE_ONLY}


@given(adds)
def test_the_precompiled_path_gives_the_bytes_of_the_general_one(add: AddPeer) -> None:
    raw = ZEROS if add.preshared_key is None else add.preshared_key.raw
    general = netlink._general_peer(add.public_key, raw, REPLACE, None, add.allowed_ips)
    assert netlink._entries(add, itertools.repeat(rnd(32))) == general


def test_common_peers_take_the_precompiled_path() -> None:
    assert netlink._common_peer(A, PSK, (V4,)) is not None
    assert netlink._common_peer(A, None, (V4, V6)) is not None


@given(st.lists(operations, max_size=400))
def test_messages_keep_to_their_limits_and_to_the_order(todo: list[Operation]) -> None:
    bodies = encode(todo)
    entries = [peers(body) for body in bodies]
    keys = [entry[1] for message in entries for entry in message]
    assert keys == [operation.public_key for operation in todo]
    for body, message in zip(bodies, entries, strict=True):
        assert 1 <= len(message) <= 128
        assert sum(entry[3] == REMOVE_ME for entry in message) <= 8
        assert len(body) < 61_000


def test_a_thousand_peers_go_into_full_messages() -> None:
    bodies = encode(AddPeer(PublicKey(bytes([i % 256, i >> 8] * 16)), PSK, (V4,)) for i in range(1000))
    assert [len(peers(body)) for body in bodies] == [*[128] * 7, 104]


def test_a_thousand_removals_hold_the_lock_a_few_at_a_time() -> None:
    bodies = encode(RemovePeer(PublicKey(bytes([i % 256, i >> 8] * 16))) for i in range(1000))
    assert [len(peers(body)) for body in bodies] == [8] * 125


def test_a_peer_with_very_many_allowed_ips_is_continued_without_replacing() -> None:
    many = tuple(Prefix(bytes([0xFD, *bytes(13), i >> 8, i & 255]), 128) for i in range(5000))
    for operation, first in (
        (AddPeer(A, PSK, many), {1: A, 2: PSK.raw, 3: REPLACE}),
        (UpdatePeer(A, PSK, many, True, 5), {1: A, 2: PSK.raw, 3: UPDATE_ONLY | REPLACE, 5: 5}),
    ):
        bodies = encode([operation, RemovePeer(B)])
        assert len(bodies) > 1
        assert all(len(body) < 61_000 for body in bodies)
        *entries, last = [entry for body in bodies for entry in peers(body)]
        assert last == {1: B, 3: REMOVE_ME}
        assert sum((entry.pop(9) for entry in entries), ()) == many
        assert entries[0] == first
        assert all(entry == {1: A, 3: UPDATE_ONLY} for entry in entries[1:])


def test_nothing_to_do_is_no_message() -> None:
    assert encode([]) == []


def test_only_settings_that_are_given_are_sent() -> None:
    name = attribute(2, b"wg0\0")
    assert netlink.encode_name("wg0") == name
    assert netlink.encode_config("wg0", DeviceConfig()) == name
    assert netlink.encode_config("wg0", DeviceConfig(b"k" * 32, 51820, 42)) == b"".join(
        (
            name,
            attribute(3, b"k" * 32),
            attribute(6, struct.pack("=H", 51820)),
            attribute(7, struct.pack("=I", 42)),
        )
    )
