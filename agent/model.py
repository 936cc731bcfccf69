"""The words of the product as values: what core lists, what the interface holds, what may be done to it.

Nothing here does I/O or knows the time. Keys are raw bytes (32), times of core are seconds since the
Unix epoch (UTC), times of the host are a ``Now``, durations are seconds.

What there is one of for each peer is a tuple or a ``Struct``: both are made in a fraction of what a frozen
dataclass takes, and most of a large list's way into the state is making them.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, NamedTuple, NewType

from msgspec import Struct

PublicKey = NewType("PublicKey", bytes)
"""A peer's raw Curve25519 public key, 32 bytes."""

KEY_SIZE = 32


class PresharedKey(Struct, frozen=True, gc=False):
    """A raw WireGuard pre-shared key, 32 bytes and not all zero; its repr shows nothing.

    Raises ValueError for another length or for the all-zero key, which WireGuard takes for "no PSK".
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_SIZE or not any(self.raw):
            raise ValueError("a pre-shared key is 32 bytes that are not all zero")

    def __repr__(self) -> str:
        return "PresharedKey(…)"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("raw", "…")]

    def digest(self) -> bytes:
        """SHA-256 of the key: what the journal keeps to know it again (256 random bits: no secret)."""
        return hashlib.sha256(self.raw).digest()


class Identity(Struct, frozen=True, gc=False):
    """The interface's key pair as core hands it out, raw; its repr shows the public half only."""

    private_key: bytes
    public_key: PublicKey

    def __repr__(self) -> str:
        return "Identity(…)"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("private_key", "…")]


class Prefix(NamedTuple):
    """An IP prefix: the address in network order (4 or 16 bytes, no host bits) and its length in bits."""

    packed: bytes
    length: int

    def __str__(self) -> str:
        family = socket.AF_INET if len(self.packed) == 4 else socket.AF_INET6
        return f"{socket.inet_ntop(family, self.packed)}/{self.length}"


class InterfaceAddress(NamedTuple):
    """An address on the interface with the length of its network; host bits are expected."""

    packed: bytes
    length: int

    def __str__(self) -> str:
        return str(Prefix(self.packed, self.length))


class Endpoint(NamedTuple):
    """Where a peer's packets last came from: address in network order (4 or 16 bytes), UDP port, scope."""

    packed: bytes
    port: int
    scope: int = 0

    def __str__(self) -> str:
        if len(self.packed) == 4:
            return f"{socket.inet_ntop(socket.AF_INET, self.packed)}:{self.port}"
        zone = f"%{self.scope}" if self.scope else ""
        return f"[{socket.inet_ntop(socket.AF_INET6, self.packed)}{zone}]:{self.port}"


class Now(NamedTuple):
    """One reading of the host's clocks, in seconds.

    ``boot`` is CLOCK_BOOTTIME (runs through suspend, cannot be stepped), ``wall`` CLOCK_REALTIME.
    """

    boot: float
    wall: float


class Refusal(StrEnum):
    """Why a listed peer is not admitted, whatever its session says (rules 2, 3 and 6)."""

    INVALID_PEER = "invalid_peer"
    INVALID_PUBLIC_KEY = "invalid_public_key"
    INVALID_PRESHARED_KEY = "invalid_preshared_key"
    INVALID_ALLOWED_IPS = "invalid_allowed_ips"
    INVALID_KEEPALIVE = "invalid_persistent_keepalive"
    INVALID_MFA_EXEMPT = "invalid_mfa_exempt"
    INVALID_SESSION = "invalid_session"
    INVALID_TIME = "invalid_time"
    OWN_KEY = "own_public_key"
    DUPLICATE_KEY = "duplicate_public_key"
    PREFIX_CLAIMED = "prefix_claimed"
    SESSION_ON_TWO_KEYS = "session_on_two_keys"
    SESSION_ENDED = "session_ended"
    NOT_JOURNALLED = "not_journalled"
    NOT_GUARDED = "not_guarded"
    DEVICE = "device_refused"


class EndReason(StrEnum):
    """Why a session ended."""

    EXPIRED = "expired"
    IDLE = "idle"
    NEVER_CONNECTED = "never_connected"
    REVOKED = "revoked"
    REPLACED = "replaced"
    PEER_REMOVED = "peer_removed"
    CORE_LOST = "core_lost"
    OPERATOR = "operator"


# What core says.


NEVER: Final = 253_402_300_799.0
"""The ``expires_at`` of a session to which core sets no end: 9999-12-31T23:59:59Z."""


class Grant(Struct, frozen=True, gc=False):
    """Core's grant of a session, as it stands in a message; times are core's.

    ``granted_at`` is None where core does not say: then the session began when it was first seen here.
    """

    id: str
    preshared_key: PresharedKey
    granted_at: float | None
    expires_at: float


class Peer(NamedTuple):
    """A device as core lists it.

    ``fault`` says what was wrong with the entry, ``session_fault`` what was wrong with its session
    (``session`` is None then); either refuses it. The rest holds what could be read: allowed IPs
    (empty if those were the fault) still count as claimed. ``static_key_unknown`` marks a peer of the
    last journalled state whose static PSK only core knows.
    """

    public_key: PublicKey
    allowed_ips: tuple[Prefix, ...]
    name: str = ""
    persistent_keepalive: int = 0
    mfa_exempt: bool = False
    preshared_key: PresharedKey | None = None
    session: Grant | None = None
    fault: Refusal | None = None
    session_fault: Refusal | None = None
    static_key_unknown: bool = False


@dataclass(frozen=True, slots=True)
class UnreadablePeer:
    """An entry whose public key can't be read: the text core gave (cut to 64 characters) and why."""

    public_key: str
    reason: Refusal
    name: str = ""


@dataclass(frozen=True, slots=True)
class Location:
    """A VPN network as core knows it."""

    id: str
    name: str
    mfa_required: bool


@dataclass(frozen=True, slots=True)
class InterfaceSettings:
    """What core wants of the interface; None where it left that to the configuration."""

    addresses: tuple[InterfaceAddress, ...] | None = None
    listen_port: int | None = None
    mtu: int | None = None
    fwmark: int | None = None


@dataclass(frozen=True, slots=True)
class SessionPolicy:
    """Core's ceilings in seconds (None: not set) and who judges liveness."""

    idle_timeout: float | None = None
    connect_timeout: float | None = None
    max_lifetime: float | None = None
    liveness: Literal["gateway", "core"] = "gateway"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole state, from GET state. ``requested_at`` is boot time when the request was sent.

    ``digest`` tells a large list of peers from others, by how it is written; empty for a small one.
    ``identity`` is None where core leaves the interface's key to the configuration.
    """

    epoch: str
    revision: int
    server_time: float
    requested_at: float
    location: Location
    interface: InterfaceSettings
    session_policy: SessionPolicy
    peers: tuple[Peer, ...]
    unreadable: tuple[UnreadablePeer, ...] = ()
    digest: bytes = field(default=b"", compare=False, repr=False)
    identity: Identity | None = None


@dataclass(frozen=True, slots=True)
class PeerUpserted:
    """A peer, whole: an absent session ends the one it had."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerRemoved:
    """The peer is no longer listed."""

    public_key: PublicKey


@dataclass(frozen=True, slots=True)
class SessionGranted:
    """A session for a listed peer; ``grant`` is None if it could not be read, and ``fault`` says why."""

    public_key: PublicKey
    grant: Grant | None
    fault: Refusal | None = None


@dataclass(frozen=True, slots=True)
class SessionRevoked:
    """The session is over; without effect if it is not the peer's live one."""

    public_key: PublicKey
    session_id: str


@dataclass(frozen=True, slots=True)
class LocationChanged:
    """Location, interface settings and session policy, each whole.

    ``identity`` is None where the interface's key stays what it is.
    """

    location: Location
    interface: InterfaceSettings
    session_policy: SessionPolicy
    identity: Identity | None = None


ChangeBody = PeerUpserted | PeerRemoved | SessionGranted | SessionRevoked | LocationChanged


@dataclass(frozen=True, slots=True)
class Change:
    """One revision: applies only on top of the one before it, within its epoch."""

    epoch: str
    revision: int
    body: ChangeBody


# What the agent tells core.


@dataclass(frozen=True, slots=True)
class RefusedPeer:
    """A peer that is listed and not admitted; ``public_key`` is the text that core knows it by."""

    public_key: str
    reason: str


class SessionEnd(NamedTuple):
    """The end of a session, for core: its own counters in bytes, times in core's time (0: never)."""

    session_id: str
    public_key: PublicKey
    reason: EndReason
    ended_at: float
    latest_handshake: float
    rx_bytes: int
    tx_bytes: int


@dataclass(frozen=True, slots=True)
class PeerStats:
    """One peer's report: bytes since it was first seen here, handshake in Unix seconds (0: never)."""

    public_key: PublicKey
    session_id: str | None
    endpoint: Endpoint | None
    latest_handshake: float
    rx_bytes: int
    tx_bytes: int


# What the interface holds.


class ObservedPeer(NamedTuple):
    """A peer as read from the interface; ``latest_handshake`` in Unix seconds, 0 for never."""

    public_key: PublicKey
    preshared_key: PresharedKey | None
    allowed_ips: tuple[Prefix, ...]
    endpoint: Endpoint | None
    persistent_keepalive: int
    latest_handshake: float
    rx_bytes: int
    tx_bytes: int


@dataclass(frozen=True, slots=True)
class ObservedDevice:
    """The interface as read; ``public_key`` is None while it has no private key."""

    name: str
    public_key: PublicKey | None
    listen_port: int
    fwmark: int
    peers: Mapping[PublicKey, ObservedPeer]


# What may be done to it.


class RemovePeer(Struct, frozen=True, gc=False):
    """Take the peer off the interface; without effect if it is not there."""

    public_key: PublicKey


class CutPeer(Struct, frozen=True, gc=False):
    """Make the peer useless at once: a random PSK and no allowed IPs, only if it is there."""

    public_key: PublicKey


class UpdatePeer(Struct, frozen=True, gc=False):
    """Change a peer that is there, and only then.

    ``preshared_key``: a key, None to clear it, or KEEP. ``allowed_ips``: KEEP, or the prefixes to
    have (``replace_allowed_ips``) or to gain. ``persistent_keepalive`` in seconds, 0 off, or KEEP.
    """

    public_key: PublicKey
    preshared_key: PresharedKey | Keep | None
    allowed_ips: tuple[Prefix, ...] | Keep
    replace_allowed_ips: bool
    persistent_keepalive: int | Keep


class AddPeer(Struct, frozen=True, gc=False):
    """Put the peer on the interface with all its allowed IPs; ``preshared_key`` None means none."""

    public_key: PublicKey
    preshared_key: PresharedKey | None
    allowed_ips: tuple[Prefix, ...]


class Keep(StrEnum):
    """Marks what an update leaves alone."""

    KEEP = "keep"


KEEP: Literal[Keep.KEEP] = Keep.KEEP

Operation = RemovePeer | CutPeer | UpdatePeer | AddPeer


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Device-wide settings to have; None leaves a setting alone. The private key is 32 raw bytes."""

    private_key: bytes | None = field(default=None, repr=False)
    listen_port: int | None = None
    fwmark: int | None = None


class DesiredPeer(NamedTuple):
    """What the interface should hold of a peer.

    ``tenure`` numbers the peer's stay: another tenure means that it has to be removed and added,
    however alike the rest is; within a tenure it is updated in place.
    """

    public_key: PublicKey
    preshared_key: PresharedKey | None
    allowed_ips: tuple[Prefix, ...]
    persistent_keepalive: int
    tenure: int
