"""The state as people and dashboards see it: ``wg-agent status`` and the per-peer metrics."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal

from msgspec import UNSET, Struct, UnsetType

from agent.encoding import format_key, format_time
from agent.metrics import PeerSeries
from agent.model import Now, ObservedDevice, PresharedKey, PublicKey, Refusal
from agent.plan import CUT, Held, Mirror, describe, make_plan
from agent.state import State

PeerState = Literal["up", "waiting", "refused"]

_SLICE: Final = 1000
"""Peers described at a time: some milliseconds, for which a revocation waits."""


def peer_state(state: State, mirror: Mirror, key: PublicKey) -> PeerState:
    """``up`` (on the interface), ``refused``, or ``waiting`` for a session or for core."""
    if key in state.roster.refused:
        return "refused"
    held = mirror.peers.get(key)
    return "up" if held is not None and held.tenure != CUT else "waiting"


def moment(boot: float | None, now: Now) -> str | None:
    """A moment of boot time as the wall clock has it today, in RFC 3339; None stays None."""
    return None if boot is None else format_time(now.wall - now.boot + boot)


async def status(
    state: State, mirror: Mirror, read_clock: Callable[[], Now], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of ``wg-agent status --json``; ``about`` is what the daemon adds about itself.

    ``session_life`` is what ``time_left`` counts down from, in seconds; a session that is not in use
    (``session_in_use``) is held for when it is, and the peer's place does not hang on it. ``rx_rate`` and
    ``tx_rate`` are in bytes a second between the last two looks at the interface; None before there were two.

    It is taken a slice at a time, and between these the state may move. The peers are exactly core's list at
    the end: who has gone is left out, who came is there. All else but the peers is of the beginning: a peer
    is shown as it was at ``revision``, or later.
    """
    document = {
        **about,
        "epoch": state.epoch,
        "revision": None if state.epoch is None else state.revision,
        "mfa_required": None if state.location is None else state.location.mfa_required,
        "location": None if state.location is None else state.location.name,
        "observed_at": moment(state.traffic.looked_at, read_clock()),
    }
    rows: dict[PublicKey, _Row] = {}
    todo = list(state.roster.peers)
    while todo:
        for start in range(0, len(todo), _SLICE):
            if start:
                await asyncio.sleep(0)
            rows.update(_listed(state, mirror, read_clock(), todo[start : start + _SLICE]))
        todo = [key for key in state.roster.peers if key not in rows]
    roster = state.roster
    peers = [row for key, row in rows.items() if key in roster.peers]
    unreadable = (
        _Row(peer.public_key, peer.name, "refused", reason=peer.reason) for peer in roster.unreadable
    )
    return {**document, "peers": [*peers, *unreadable]}


class _Row(Struct, gc=False):
    """A peer in the status. Of dicts the garbage collector would look through a hundred thousand at once."""

    public_key: str
    """As core wrote it, where it can't be read."""
    name: str
    state: PeerState
    allowed_ips: tuple[str, ...] = ()
    session_id: str | None = None
    session_in_use: bool | None = None
    expires_at: str | None = None
    granted_at: str | None = None
    session_life: float | None = None
    time_left: float | None = None
    latest_handshake: str | None = None
    endpoint: str | None = None
    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_rate: float | None = None
    tx_rate: float | None = None
    mfa_exempt: bool = False
    reason: Refusal | UnsetType = UNSET


def _listed(
    state: State, mirror: Mirror, now: Now, keys: Iterable[PublicKey]
) -> Iterator[tuple[PublicKey, _Row]]:
    """The rows of those that are listed."""
    roster, sessions, book = state.roster, state.sessions, state.traffic
    for key in keys:
        peer = roster.peers.get(key)
        if peer is None:
            continue
        session, traffic, rates = sessions.get(key), book.get(key), book.rates(key)
        row = _Row(
            format_key(key),
            peer.name,
            peer_state(state, mirror, key),
            tuple(map(str, peer.allowed_ips)),
            latest_handshake=format_time(traffic.latest_handshake) if traffic.latest_handshake else None,
            endpoint=None if traffic.endpoint is None else str(traffic.endpoint),
            rx_bytes=traffic.rx_bytes,
            tx_bytes=traffic.tx_bytes,
            rx_rate=rates and round(rates[0], 1),
            tx_rate=rates and round(rates[1], 1),
            mfa_exempt=peer.mfa_exempt,
            reason=roster.refused.get(key, UNSET),
        )
        if session is not None:
            row.session_id, row.session_in_use = session.id, session.in_use
            row.expires_at, row.granted_at = format_time(session.ends_at), format_time(session.granted_at)
            row.session_life = round(session.ends_at - session.granted_at, 3)
            row.time_left = round(max(0.0, session.deadline.remaining(now)), 3)
        yield key, row


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
    described: list[dict[str, Any]] = []
    peers = state.roster.peers
    keys = peers.keys() | trial.peers.keys()
    for operation in make_plan(((key, state.wanted(key, now)) for key in keys), trial):
        key = operation.public_key
        session, before = state.sessions.get(key), trial.peers.get(key)
        trial.acknowledge(operation)
        after = trial.peers.get(key)
        observed = device.peers.get(key)
        described.append(
            {
                "public_key": format_key(key),
                "name": _name(state, key),
                "operation": type(operation).__name__.removesuffix("Peer").lower(),
                "change": describe(operation),
                "before": _in_a_plan(before),
                "after": _in_a_plan(after),
                "preshared_key_changes": _psk(before) != _psk(after),
                "endpoint": None if observed is None or observed.endpoint is None else str(observed.endpoint),
                "session_id": None if session is None else session.id,
                "why": _why_off(state, key) if after is None else "",
            }
        )
    return {
        "interface": interface,
        "epoch": state.epoch,
        "operations": described,
        "drift": [
            {
                "kind": difference.kind.value,
                "public_key": None if difference.public_key is None else format_key(difference.public_key),
                "name": _name(state, difference.public_key),
                "detail": difference.detail,
            }
            for difference in drift
        ],
    }


def _in_a_plan(held: Held | None) -> dict[str, Any] | None:
    """What a plan shows of a peer before or after an operation; of its PSK only whether it has one."""
    if held is None:
        return None
    return {
        "allowed_ips": [str(prefix) for prefix in held.allowed_ips],
        "persistent_keepalive": held.persistent_keepalive,
        "preshared_key": held.preshared_key is not None,
    }


def _psk(held: Held | None) -> PresharedKey | None:
    return None if held is None else held.preshared_key


def _why_off(state: State, key: PublicKey) -> str:
    """Why a peer is not to be on the interface."""
    if key not in state.roster.peers:
        return "not listed by core" if state.epoch is not None else "core has not been heard yet"
    refusal = state.roster.refused.get(key)
    return "no live session" if refusal is None else f"refused: {refusal}"


def _name(state: State, key: PublicKey | None) -> str:
    peer = None if key is None else state.roster.peers.get(key)
    return "" if peer is None else peer.name
