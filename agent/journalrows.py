"""The journal's rows: a session, a peer, an end, traffic; each as what SQLite holds of it, and back.

A session and a peer are one MessagePack record beside their key: SQLite takes half as long for that as for a
column each (``cold_sync_10k``). There is no secret in any of them (rule 22).

SQLite has no checksums: whatever is read is checked; ValueError, or msgspec's DecodeError, says that a row is
damaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from agent.encoding import check_prefix
from agent.model import KEY_SIZE, EndReason, Peer, Prefix, PublicKey, Refusal, SessionEnd
from agent.sessions import Deadline, Liveness, Session
from agent.traffic import Traffic

_Digest = Annotated[bytes, Meta(min_length=KEY_SIZE, max_length=KEY_SIZE)]


class _SessionRecord(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    psk_digest: _Digest
    former_digest: _Digest | None
    granted_at: float
    expires_at: float
    ends_at: float
    boot_id: str
    """Of the boot that ``deadline_boot`` and the times of life count in; empty without such a deadline."""
    deadline_boot: float | None
    deadline_wall: float
    in_use: bool
    base_rx: int
    base_tx: int
    life: tuple[float, float, float | None, float | None] | None
    """``Liveness``, where the peer was on the interface."""


class _PeerRecord(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    name: str
    allowed_ips: tuple[Prefix, ...]
    persistent_keepalive: int
    mfa_exempt: bool
    has_preshared_key: bool
    fault: Refusal | None


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_session: Final = msgspec.msgpack.Decoder(_SessionRecord).decode
_decode_peer: Final = msgspec.msgpack.Decoder(_PeerRecord).decode


def session_row(session: Session, liveness: Liveness | None, boot_id: str) -> tuple[str, bytes, bytes]:
    """Return id, public key and record of a session whose deadline was anchored in this boot, if in any."""
    deadline = session.deadline
    record = _SessionRecord(
        session.psk_digest,
        session.former_digest,
        session.granted_at,
        session.expires_at,
        session.ends_at,
        boot_id if deadline.boot is not None else "",
        deadline.boot,
        deadline.wall,
        session.in_use,
        session.base_rx,
        session.base_tx,
        None
        if liveness is None
        else (
            liveness.added_at,
            liveness.latest_handshake,
            liveness.handshake_seen_at,
            liveness.last_sign_at,
        ),
    )
    return session.id, session.public_key, _encode(record)


def parse_session(row: Sequence[Any], boot_id: str) -> tuple[Session, Liveness | None]:
    """Return what a row holds; what was counted in another boot's time is void."""
    id_, key, raw = row
    checked((id_, key), (str, bytes))
    record = _decode_session(_blob(raw))
    times = (record.granted_at, record.expires_at, record.ends_at, record.deadline_boot, record.deadline_wall)
    if not all(time is None or math.isfinite(time) for time in (*times, *(record.life or ()))):
        # A deadline that is no number would never pass.
        raise ValueError("a row of the journal is damaged")
    same_boot = record.boot_id == boot_id
    session = Session(
        id=id_,
        public_key=key,
        preshared_key=None,
        granted_at=record.granted_at,
        expires_at=record.expires_at,
        ends_at=record.ends_at,
        deadline=Deadline(record.deadline_boot if same_boot else None, record.deadline_wall),
        in_use=record.in_use,
        base_rx=record.base_rx,
        base_tx=record.base_tx,
        former_digest=record.former_digest,
        journalled_digest=record.psk_digest,
    )
    if record.life is None:
        return session, None
    added_at, latest_handshake, handshake_seen_at, last_sign_at = record.life
    if same_boot:
        return session, Liveness(added_at, latest_handshake, handshake_seen_at, last_sign_at)
    return session, Liveness(0.0, latest_handshake, None, None if last_sign_at is None else 0.0)


def peer_row(peer: Peer) -> tuple[bytes, bytes]:
    """Return public key and record of a peer, without its static PSK."""
    record = _PeerRecord(
        peer.name,
        peer.allowed_ips,
        peer.persistent_keepalive,
        peer.mfa_exempt,
        peer.preshared_key is not None or peer.static_key_unknown,
        peer.fault or peer.session_fault,
    )
    return peer.public_key, _encode(record)


def parse_peer(row: Sequence[Any]) -> Peer:
    """Return what a row holds of a peer."""
    key, raw = row
    checked((key,), (bytes,))
    record = _decode_peer(_blob(raw))
    return Peer(
        public_key=key,
        allowed_ips=tuple(map(check_prefix, record.allowed_ips)),
        name=record.name,
        persistent_keepalive=record.persistent_keepalive,
        mfa_exempt=record.mfa_exempt,
        fault=record.fault,
        static_key_unknown=record.has_preshared_key,
    )


def end_row(end: SessionEnd) -> tuple[Any, ...]:
    """Return an end's columns."""
    return (
        end.session_id,
        end.public_key,
        end.reason,
        end.ended_at,
        end.latest_handshake,
        end.rx_bytes,
        end.tx_bytes,
    )


def parse_end(row: Sequence[Any]) -> SessionEnd:
    """Return what a row holds of an end."""
    id_, key, reason, ended_at, latest_handshake, rx, tx = checked(
        row, (str, bytes, str, float, float, int, int)
    )
    return SessionEnd(id_, key, EndReason(reason), ended_at, latest_handshake, rx, tx)


def parse_traffic(row: Sequence[Any]) -> tuple[PublicKey, Traffic]:
    """Return what a row holds of a peer's traffic."""
    key, *counters = checked(row, (bytes, int, int, int, int, float))
    return key, Traffic(*counters)


def checked(row: Sequence[Any], kinds: Sequence[Any]) -> Any:
    """Return the row if its values are of these kinds; bytes are keys."""
    for value, kind in zip(row, kinds, strict=False):
        if not isinstance(value, kind) or (isinstance(value, bytes) and len(value) != KEY_SIZE):
            raise ValueError("a row of the journal is damaged")
    return row


def _blob(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a row of the journal is damaged")
    return value
