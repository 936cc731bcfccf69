"""The state as people and dashboards see it: ``wg-agent status`` and the per-peer metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from agent.encoding import format_key, format_time
from agent.metrics import PeerSeries
from agent.model import Now, ObservedDevice, PublicKey, Refusal, UnreadablePeer
from agent.plan import CUT, Mirror, describe, make_plan
from agent.state import State

PeerState = Literal["up", "waiting", "refused"]


def peer_state(state: State, mirror: Mirror, key: PublicKey) -> PeerState:
    """``up`` (on the interface), ``refused``, or ``waiting`` for a session or for core."""
    if key in state.roster.refused:
        return "refused"
    held = mirror.peers.get(key)
    return "up" if held is not None and held.tenure != CUT else "waiting"


def status(state: State, mirror: Mirror, now: Now, about: Mapping[str, Any]) -> dict[str, Any]:
    """The document of ``wg-agent status --json``; ``about`` is what the daemon adds about itself."""
    roster = state.roster
    peers = []
    for key, peer in roster.peers.items():
        session, traffic = state.sessions.get(key), state.traffic.get(key)
        entry: dict[str, Any] = {
            "public_key": format_key(key),
            "name": peer.name,
            "state": peer_state(state, mirror, key),
            "allowed_ips": [str(prefix) for prefix in peer.allowed_ips],
            "session_id": None if session is None else session.id,
            "expires_at": None if session is None else format_time(session.ends_at),
            "time_left": None if session is None else round(max(0.0, session.deadline.remaining(now)), 3),
            "latest_handshake": format_time(traffic.latest_handshake) if traffic.latest_handshake else None,
            "endpoint": None if traffic.endpoint is None else str(traffic.endpoint),
            "rx_bytes": traffic.rx_bytes,
            "tx_bytes": traffic.tx_bytes,
            "mfa_exempt": peer.mfa_exempt,
        }
        if key in roster.refused:
            entry["reason"] = roster.refused[key].value
        peers.append(entry)
    return {
        **about,
        "epoch": state.epoch,
        "revision": None if state.epoch is None else state.revision,
        "mfa_required": None if state.location is None else state.location.mfa_required,
        "location": None if state.location is None else state.location.name,
        "peers": [*peers, *map(_unreadable, roster.unreadable)],
    }


def _unreadable(peer: UnreadablePeer) -> dict[str, Any]:
    """An entry of core's list whose key can't be read; it is shown as core wrote it."""
    return {
        "public_key": peer.public_key,
        "name": peer.name,
        "state": "refused",
        "allowed_ips": [],
        "session_id": None,
        "expires_at": None,
        "time_left": None,
        "latest_handshake": None,
        "endpoint": None,
        "rx_bytes": 0,
        "tx_bytes": 0,
        "mfa_exempt": False,
        "reason": peer.reason.value,
    }


def peer_series(state: State) -> tuple[PeerSeries, ...]:
    """The listed peers for /metrics."""
    peers = state.roster.peers
    return tuple(map(PeerSeries, peers.values(), state.traffic.many(peers)))


def counts(state: State, mirror: Mirror) -> tuple[Counter[str], Counter[Refusal]]:
    """How many peers are in each state, and how many are refused for each reason."""
    listed, among = state.roster.peers.keys(), state.roster.refused.keys()
    by_reason = Counter(state.roster.refused.values())
    by_reason.update(peer.reason for peer in state.roster.unreadable)
    cut = {key for key, held in mirror.peers.items() if held.tenure == CUT}
    up = len((mirror.peers.keys() & listed) - among - cut)
    waiting = len(listed) - len(among) - up
    refused = len(among) + len(state.roster.unreadable)
    return Counter({"up": up, "waiting": waiting, "refused": refused}), by_reason


def plan(interface: str, state: State, mirror: Mirror, device: ObservedDevice, now: Now) -> dict[str, Any]:
    """What a reconcile would change on the interface as just read: ``wg-agent plan --json``.

    Planned on a copy of the mirror, which knows the peers' tenures; nothing is changed.
    """
    trial = mirror.copy()
    drift, _ = trial.observe(device)
    peers = state.roster.peers
    keys = peers.keys() | trial.peers.keys()
    operations = make_plan(((key, state.wanted(key, now)) for key in keys), trial)
    return {
        "interface": interface,
        "operations": [
            {
                "public_key": format_key(operation.public_key),
                "name": peers[operation.public_key].name if operation.public_key in peers else "",
                "operation": type(operation).__name__.removesuffix("Peer").lower(),
                "change": describe(operation),
            }
            for operation in operations
        ],
        "drift": [
            {
                "kind": difference.kind.value,
                "public_key": None if difference.public_key is None else format_key(difference.public_key),
                "detail": difference.detail,
            }
            for difference in drift
        ],
    }
