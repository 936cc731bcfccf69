"""Short ways to say peers, grants and snapshots; small numbers stand for keys."""

from collections.abc import Iterable
from typing import Any

from agent.encoding import parse_prefix
from agent.model import (
    Endpoint,
    Grant,
    InterfaceSettings,
    Location,
    LocationChanged,
    Now,
    ObservedDevice,
    ObservedPeer,
    Peer,
    Prefix,
    PresharedKey,
    PublicKey,
    SessionPolicy,
    Snapshot,
)
from agent.trail import Subject, Subjects

CORE = 1_800_000_000.0
"""Core's time in seconds when ``NOW`` is now."""
NOW = Now(boot=1_000.0, wall=CORE)
OWN_KEY = PublicKey(b"\xee" * 32)


def after(seconds: float, step: float = 0.0) -> Now:
    """The host's clocks so many seconds after ``NOW``; ``step`` is what the wall clock was set by."""
    return Now(NOW.boot + seconds, NOW.wall + seconds + step)


def key(number: int) -> PublicKey:
    return PublicKey(number.to_bytes(32, "big"))


def psk(number: int) -> PresharedKey:
    return PresharedKey(b"\xaa" * 16 + number.to_bytes(16, "big"))


def prefixes(*texts: str) -> tuple[Prefix, ...]:
    return tuple(sorted(parse_prefix(text) for text in texts))


def grant(
    session_id: str,
    preshared_key: int,
    *,
    granted_at: float = CORE,
    expires_at: float | None = None,
    lasts: float = 3600.0,
) -> Grant:
    """A grant; it expires ``lasts`` seconds after it was granted unless ``expires_at`` is given."""
    ends = granted_at + lasts if expires_at is None else expires_at
    return Grant(session_id, psk(preshared_key), granted_at, ends)


def peer(number: int, *allowed_ips: str, **members: Any) -> Peer:
    """A listed peer; without allowed IPs it has 10.8.0.NUMBER."""
    return Peer(key(number), prefixes(*(allowed_ips or (f"10.8.0.{number}",))), **members)


def snapshot(
    peers: Iterable[Peer] = (),
    *,
    epoch: str = "e1",
    revision: int = 1,
    server_time: float = CORE,
    requested_at: float = NOW.boot,
    mfa_required: bool = True,
    location: str = "7",
    policy: SessionPolicy | None = None,
    **members: Any,
) -> Snapshot:
    return Snapshot(
        epoch=epoch,
        revision=revision,
        server_time=server_time,
        requested_at=requested_at,
        location=Location(location, "hq", mfa_required),
        interface=InterfaceSettings(),
        session_policy=policy or SessionPolicy(),
        peers=tuple(peers),
        **members,
    )


def location_changed(
    *, mfa_required: bool = True, location: str = "7", policy: SessionPolicy | None = None
) -> LocationChanged:
    return LocationChanged(
        Location(location, "hq", mfa_required), InterfaceSettings(), policy or SessionPolicy()
    )


def observed(
    number: int,
    *allowed_ips: str,
    preshared_key: int | None = None,
    endpoint: Endpoint | None = None,
    keepalive: int = 0,
    handshake: float = 0.0,
    rx: int = 0,
    tx: int = 0,
) -> ObservedPeer:
    """A peer as read from the interface; without allowed IPs it has 10.8.0.NUMBER."""
    return ObservedPeer(
        key(number),
        None if preshared_key is None else psk(preshared_key),
        prefixes(*(allowed_ips or (f"10.8.0.{number}",))),
        endpoint,
        keepalive,
        handshake,
        rx,
        tx,
    )


def device(*peers: ObservedPeer) -> ObservedDevice:
    return ObservedDevice("wg0", OWN_KEY, 51820, 0, {p.public_key: p for p in peers})


def columns(*subjects: Subject) -> Subjects:
    """Those to whom something happens at once, as the audit trail keeps them."""
    return Subjects(
        tuple(one.peer for one in subjects),
        tuple(one.session_id for one in subjects),
        tuple(one.reason for one in subjects),
        tuple(one.detail for one in subjects),
        tuple(one.name for one in subjects),
    )
