import contextlib
import random
import socket
import struct
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.encoding import format_key, parse_key
from agent.errors import DeviceError
from agent.model import ObservedDevice, ObservedPeer, Prefix, PublicKey
from agent.observed import RawPeers, moved
from agent.wireguard import dump
from agent.wireguard.dump import Dump
from tests.wireguard.attributes import attribute, messages, nest
from tests.wireguard.strategies import observed_peers

GOLDEN = Path(__file__).parent / "golden"
KEY = PublicKey(b"k" * 32)


def read(parts: Iterable[bytes], before: RawPeers | None = None) -> ObservedDevice:
    taken = Dump(before)
    for part in parts:
        taken.feed(part)
    return taken.device("wg0")


def decode(parts: Iterable[bytes]) -> ObservedDevice:
    """Read every peer, too."""
    device = read(parts)
    return replace(device, peers=dict(device.peers))


def golden(name: str) -> list[bytes]:
    found = list(messages((GOLDEN / f"{name}.bin").read_bytes()))
    return [body for kind, _, body in found if kind > 15]


# The kernel's layout of a peer, written from its get_peer().


def peer_attributes(peer: ObservedPeer) -> list[bytes]:
    seconds = int(peer.latest_handshake)
    nanoseconds = round((peer.latest_handshake - seconds) * 1e9)
    psk = bytes(32) if peer.preshared_key is None else peer.preshared_key.raw
    found = [
        attribute(1, peer.public_key),
        attribute(2, psk),
        attribute(6, struct.pack("=qq", seconds, nanoseconds)),
        attribute(5, struct.pack("=H", peer.persistent_keepalive)),
        attribute(8, struct.pack("=Q", peer.tx_bytes)),
        attribute(7, struct.pack("=Q", peer.rx_bytes)),
        attribute(10, struct.pack("=I", 1)),
    ]
    if peer.endpoint is not None:
        packed, port, scope = peer.endpoint
        if len(packed) == 4:
            address = struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + packed + bytes(8)
        else:
            address = (
                struct.pack("=H", socket.AF_INET6)
                + port.to_bytes(2, "big")
                + bytes(4)
                + packed
                + struct.pack("=I", scope)
            )
        found.append(attribute(4, address))
    if peer.allowed_ips:
        found.append(allowed_ips(peer.allowed_ips))
    return found


def allowed_ips(prefixes: Iterable[Prefix]) -> bytes:
    return nest(9, *(nest(0, *prefix_attributes(prefix)) for prefix in prefixes))


def prefix_attributes(prefix: Prefix) -> list[bytes]:
    family = socket.AF_INET if len(prefix.packed) == 4 else socket.AF_INET6
    return [
        attribute(3, bytes([prefix.length])),
        attribute(1, struct.pack("=H", family)),
        attribute(2, prefix.packed),
    ]


def part(*entries: bytes) -> bytes:
    return nest(8, *entries)


def same(one: ObservedPeer, other: ObservedPeer) -> bool:
    """Nanoseconds of a time do not survive a float."""
    near = abs(one.latest_handshake - other.latest_handshake) < 1e-3
    return near and one._replace(latest_handshake=0.0) == other._replace(latest_handshake=0.0)


@pytest.mark.parametrize("name", ["empty", "few", "many"])
def test_a_dump_of_a_real_kernel_says_what_wg_says(name: str) -> None:
    device, *lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
    _, public_key, port, mark = device.split("\t")
    seen = decode(golden(name))
    assert ("(none)" if seen.public_key is None else format_key(seen.public_key)) == public_key
    assert seen.listen_port == int(port)
    assert seen.fwmark == (0 if mark == "off" else int(mark, 16))
    shown = {}
    for line in lines:
        key, psk, endpoint, ips, handshake, rx, tx, keepalive = line.split("\t")
        peer = seen.peers[PublicKey(parse_key(key))]
        text = "(none)" if peer.preshared_key is None else format_key(peer.preshared_key.raw)
        assert text == psk
        assert ("(none)" if peer.endpoint is None else str(peer.endpoint)) == endpoint.replace("%lo", "%1")
        assert (",".join(map(str, peer.allowed_ips)) or "(none)") == ips
        assert int(peer.latest_handshake) == int(handshake)
        assert (peer.rx_bytes, peer.tx_bytes) == (int(rx), int(tx))
        assert peer.persistent_keepalive == (0 if keepalive == "off" else int(keepalive))
        shown[peer.public_key] = peer
    assert list(seen.peers) == list(shown)


def test_a_peer_whose_allowed_ips_go_on_in_other_parts_is_one_peer() -> None:
    parts = golden("many")
    assert len(parts) > 2
    seen = decode(parts)
    assert len(seen.peers) == 101
    assert max(len(peer.allowed_ips) for peer in seen.peers.values()) == 2000


def test_a_real_kernels_peers_take_the_precompiled_path(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = 0
    walk = dump._walk_peer

    def count(data: bytes, start: int, end: int) -> ObservedPeer:
        nonlocal walked
        walked += 1
        return walk(data, start, end)

    monkeypatch.setattr(dump, "_walk_peer", count)
    assert decode(golden("few")).peers
    assert walked == 0
    decode(golden("many"))
    assert walked == 2  # the two continuations


def raw_peers(device: ObservedDevice) -> RawPeers:
    assert isinstance(device.peers, RawPeers)
    return device.peers


def in_parts(peers: Iterable[ObservedPeer], size: int) -> list[bytes]:
    """A dump of these with so many to a part; the first peer of each further part began in the one before."""
    entries = [nest(0, *peer_attributes(peer)) for peer in peers]
    parts = [entries[at : at + size] for at in range(0, len(entries), size)]
    for ahead, behind in pairwise(parts):
        more = allowed_ips([Prefix(b"\x0a\x63" + ahead[-1][10:12], 32)])
        key = ahead[-1][8:40]
        behind.insert(0, nest(0, attribute(1, key), more))
    return [part(*entries) for entries in parts]


@given(
    st.lists(observed_peers(), max_size=12, unique_by=lambda peer: peer.public_key),
    st.randoms(use_true_random=False),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_a_dump_beside_an_earlier_one_says_what_it_says_alone(
    peers: list[ObservedPeer], choice: random.Random, size: int, other_size: int
) -> None:
    earlier = raw_peers(read(in_parts(peers, size)))
    after = [peer for peer in peers if choice.random() < 0.8]
    if choice.random() < 0.5:
        choice.shuffle(after)
    after = [p._replace(rx_bytes=p.rx_bytes ^ 1) if choice.random() < 0.3 else p for p in after]
    parts = in_parts(after, choice.choice([size, other_size]))
    alone = raw_peers(read(parts))
    beside = raw_peers(read(parts, earlier))
    assert list(beside.raw.items()) == list(alone.raw.items())
    assert dict(beside) == dict(alone)
    different = {key for key, raw in alone.raw.items() if earlier.raw.get(key) != raw}
    assert set(moved(earlier, beside)) == different
    third = raw_peers(read(parts, beside))
    assert not moved(beside, third)
    # Somebody who has not seen the second look compares with the first.
    assert set(moved(earlier, third)) == different


def test_a_peer_that_has_not_moved_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = read(golden("many"))
    monkeypatch.setattr(dump, "_fast_peer", lambda *_: pytest.fail("a peer was read"))
    again = read(golden("many"), raw_peers(device))
    assert len(again.peers) == 101
    assert not moved(device.peers, again.peers)


def test_the_settings_of_a_device_are_read() -> None:
    taken = Dump()
    for body in golden("few"):
        taken.feed(body)
    config = taken.config()
    assert config.private_key is not None
    assert (config.listen_port, config.fwmark) == (51820, 42)
    assert Dump().config().private_key is None


def test_nothing_that_holds_a_dump_shows_a_private_key() -> None:
    taken = Dump()
    for body in golden("few"):
        taken.feed(body)
    private = taken.config().private_key
    assert private is not None
    assert repr(private) not in repr(taken) + repr(taken.config()) + repr(taken.device("wg0"))


@given(st.lists(observed_peers(), max_size=5, unique_by=lambda peer: peer.public_key))
def test_peers_are_read_as_they_were_written(peers: list[ObservedPeer]) -> None:
    seen = decode([part(*(nest(0, *peer_attributes(peer)) for peer in peers))]).peers
    assert list(seen) == [peer.public_key for peer in peers]
    assert all(same(seen[peer.public_key], peer) for peer in peers)


@given(observed_peers(), st.randoms(use_true_random=False))
def test_any_order_and_unknown_attributes_say_the_same(peer: ObservedPeer, rng: random.Random) -> None:
    attributes = [*peer_attributes(peer)[:-1], attribute(99, b"new"), attribute(0, b"")]
    if peer.allowed_ips:
        ips = []
        for prefix in peer.allowed_ips:
            inner = [*prefix_attributes(prefix), attribute(77, b"x")]
            rng.shuffle(inner)
            ips.append(nest(0, *inner))
        attributes.append(nest(9, *ips))
    else:
        attributes.append(peer_attributes(peer)[-1])
    rng.shuffle(attributes)
    body = attribute(55, b"?") + part(nest(0, *attributes)) + attribute(1, bytes(4))
    assert same(decode([body]).peers[peer.public_key], peer)


@given(observed_peers())
def test_both_paths_say_the_same(peer: ObservedPeer) -> None:
    data = nest(0, *peer_attributes(peer))
    fast = dump._fast_peer(data, 0, len(data))
    assert fast == dump._walk_peer(data, 4, len(data))


@given(observed_peers(), st.integers(0, 6))
def test_a_continued_peer_keeps_what_the_first_part_said(peer: ObservedPeer, cut: int) -> None:
    first = peer._replace(allowed_ips=peer.allowed_ips[:cut])
    rest = peer.allowed_ips[cut:]
    parts = [
        part(nest(0, *peer_attributes(first))),
        part(nest(0, attribute(1, peer.public_key), allowed_ips(rest))),
    ]
    assert same(decode(parts).peers[peer.public_key], peer)


@given(st.binary(max_size=300))
@example(b"\x00")
@example(part(b"\x05\x00"))
@example(part(nest(0)))
@example(part(nest(0, attribute(1, b"short"))))
@example(part(nest(0, attribute(1, KEY), attribute(4, b""))))
@example(part(nest(0, attribute(1, KEY), attribute(4, bytes(16)))))
@example(part(nest(0, attribute(1, KEY), nest(9, nest(0)))))
@example(part(nest(0, attribute(1, KEY), nest(9, nest(0, attribute(3, b"\x21"))))))
def test_arbitrary_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    inside_peer = nest(0, attribute(1, KEY), data)
    inside_ips = nest(0, attribute(1, KEY), nest(9, data))
    for body in (data, part(data), part(inside_peer), part(inside_ips)):
        with contextlib.suppress(DeviceError):
            decode([body])


@pytest.mark.parametrize("length", [33, 129])
def test_a_prefix_longer_than_its_address_is_refused(length: int) -> None:
    prefix = Prefix(bytes(4 if length == 33 else 16), length)
    peer = ObservedPeer(KEY, None, (prefix,), None, 0, 0.0, 0, 0)
    with pytest.raises(DeviceError):
        decode([part(nest(0, *peer_attributes(peer)))])


@given(st.sampled_from(golden("few") + golden("many")), st.data())
def test_damaged_dumps_are_read_or_refused_and_nothing_else(body: bytes, data: st.DataObject) -> None:
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    with contextlib.suppress(DeviceError):
        decode([bytes(damaged[:end])])
