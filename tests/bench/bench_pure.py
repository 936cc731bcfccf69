"""Micro-benchmarks of the pure parts at 10,000 peers: decode a snapshot, plan, encode, parse a dump."""

import json
import os
from typing import Any

import pytest

from agent.core.messages import decode_snapshot
from agent.encoding import format_key
from agent.model import AddPeer, Now, Snapshot
from agent.plan import Mirror, make_plan
from agent.state import State
from agent.wireguard.netlink import encode_operations

PEERS = 10_000
NOW = Now(1000.0, 1_800_000_000.0)
TIMES = {"granted_at": "2027-01-15T08:00:00.000Z", "expires_at": "2027-01-15T16:00:00.000Z"}


def document() -> bytes:
    """A state of core's: every peer with a session, one IPv4 and one IPv6 prefix."""
    peers = []
    for i in range(PEERS):
        session = {"id": f"s-{i}", "preshared_key": format_key(os.urandom(32)), **TIMES}
        peers.append(
            {
                "public_key": format_key(os.urandom(32)),
                "name": f"device-{i}",
                "allowed_ips": [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}/32", f"fd00:8::{i:x}/128"],
                "session": session,
            }
        )
    state: dict[str, Any] = {
        "epoch": "bench",
        "revision": 1,
        "server_time": "2027-01-15T08:00:00.000Z",
        "location": {"id": "1", "name": "hq", "mfa_required": True},
        "peer_count": PEERS,
        "peers": peers,
    }
    return json.dumps(state).encode()


@pytest.fixture(scope="module")
def body() -> bytes:
    return document()


@pytest.fixture(scope="module")
def snapshot(body: bytes) -> Snapshot:
    return decode_snapshot(body, NOW.boot)


def test_decode_a_snapshot(benchmark: Any, body: bytes) -> None:
    assert len(benchmark(decode_snapshot, body, NOW.boot).peers) == PEERS


def test_load_and_plan_a_snapshot(benchmark: Any, snapshot: Snapshot) -> None:
    def cold() -> int:
        state = State()
        state.load(snapshot, NOW)
        return len(make_plan(((key, state.wanted(key, NOW)) for key in state.dirty), Mirror()))

    assert benchmark(cold) == PEERS


def test_load_and_plan_an_unchanged_snapshot(benchmark: Any, snapshot: Snapshot) -> None:
    state, mirror = State(), Mirror()
    state.load(snapshot, NOW)
    for operation in (plan := make_plan(((k, state.wanted(k, NOW)) for k in state.dirty), mirror)):
        mirror.acknowledge(operation, plan.tenures.get(operation.public_key, 0))
    state.dirty.clear()

    def again() -> int:
        state.load(snapshot, NOW)
        return len(make_plan(((key, state.wanted(key, NOW)) for key in state.dirty), mirror))

    assert benchmark(again) == 0


def test_encode_additions(benchmark: Any, snapshot: Snapshot) -> None:
    adds = []
    for peer in snapshot.peers:
        assert peer.session is not None
        adds.append(AddPeer(peer.public_key, peer.session.preshared_key, peer.allowed_ips))
    assert benchmark(lambda: sum(1 for _ in encode_operations("wg0", adds, os.urandom))) > PEERS // 128
