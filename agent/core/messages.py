"""What core says, from bytes to model values, strictly.

A message is refused whole (InvalidMessage, naming the place and never quoting the value) when its
frame is wrong; an entry of the peer list that is wrong is refused alone. An object that repeats a
key is wrong wherever it stands: parsers differ in which of the two values they believe. The standard
parser shows every pair. A large list is first read by a faster one that does not: if there are as many
quotes in the text as in what it made of it, then no key was repeated, and else the standard parser is asked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeGuard

import msgspec

from agent.core.columns import ID_SIZE, UnusualError, read_peers
from agent.encoding import (
    clean_name,
    parse_interface_address,
    parse_prefix,
    parse_preshared_key,
    parse_public_key,
    parse_time,
)
from agent.errors import InvalidMessage
from agent.model import (
    Change,
    ChangeBody,
    Grant,
    InterfaceSettings,
    Location,
    LocationChanged,
    Peer,
    PeerRemoved,
    PeerUpserted,
    Prefix,
    PresharedKey,
    PublicKey,
    Refusal,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
    Snapshot,
    UnreadablePeer,
)

REVISION_LIMIT: Final = 2**63 - 1
PEERS_LIMIT: Final = 1 << 20
"""WireGuard takes no more peers on an interface."""
UNREADABLE_LIMIT: Final = 10_000
"""Entries without a readable key beyond which the list is no list of peers."""
ADDRESSES_LIMIT: Final = 256
"""An interface has a few; each costs the kernel and the step that sets it time."""
_LARGE: Final = 1_000_000
_QUICK: Final = 10_000
"""Bytes from which on reading a state twice, if it comes to that, is worth the attempt."""
_PORTION: Final = 1000
_FRAME: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRIES: Final = msgspec.json.Decoder(list[msgspec.Raw])
_SPARSE: Final = 8
"""A list of peers has a value in 20 bytes; JSON denser than one in 8 takes 50 times its size in memory."""
_EPOCH: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_POSITION: Final = re.compile(r"([A-Za-z0-9_-]{1,64}):(0|[1-9][0-9]{0,18})", re.ASCII)
_HINT: Final = "core does not keep to the API; see docs/core-api.openapi.yaml"


@dataclass(frozen=True, slots=True)
class NotModified:
    """The answer to GET state when what is held is core's current state."""


@dataclass(frozen=True, slots=True)
class Resync:
    """Core can't replay what was asked for: GET state. Names core's position; is no revision."""

    epoch: str
    revision: int


@dataclass(frozen=True, slots=True)
class Push:
    """What core pushed: changes, in their order, for the location with this id."""

    location: str
    changes: tuple[Change, ...]


class _Repeated(dict[str, Any]):
    """An object that has one of its keys twice; what it says can't be trusted."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Repeated(members)


def _constant(_name: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _refuse(place: str, problem: str) -> NoReturn:
    raise InvalidMessage(f"core's message is not valid: {place} {problem}", _HINT)


def _check_density(body: bytes) -> None:
    if sum(map(body.count, (b",", b"[", b"{"))) > len(body) // _SPARSE:
        _refuse("it", "has too many values for its size")


def _load(body: bytes) -> Any:
    if len(body) > _LARGE:
        _check_density(body)
    return _parse(body)


def _parse(body: bytes) -> Any:
    # The parser's own error holds the text, PSKs included: it is dropped, not chained.
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError):
        pass
    _refuse("it", "is not JSON")


class _Frame(NamedTuple):
    """A large state but for its peers, which are as they stand there, and a digest of that."""

    members: dict[str, Any]
    peers: msgspec.Raw
    digest: bytes


def _load_frame(body: bytes) -> _Frame | None:
    """Read a large state; None for a small one, and where the standard parser has to look closely."""
    if len(body) <= _QUICK:
        return None
    try:
        members = _FRAME.decode(body)
        quotes = sum(2 + bytes(raw).count(b'"') for raw in members.values())
        peers = members.pop("peers")
    except (ValueError, RecursionError, KeyError):
        return None
    if body.count(b'"') != quotes or not bytes(peers).startswith(b"["):
        return None
    frame = {name: _parse(bytes(raw)) for name, raw in members.items()}
    return _Frame(frame, peers, hashlib.blake2b(peers).digest())


def _read_entries(peers: msgspec.Raw) -> Iterator[Peer | UnreadablePeer]:
    """Read the entries of a peer list, a thousand at once where they are as usual."""
    entries = _ENTRIES.decode(peers)
    if len(entries) > PEERS_LIMIT:
        _refuse("peers", f"has more than {PEERS_LIMIT} entries")
    for at in range(0, len(entries), _PORTION):
        some = entries[at : at + _PORTION]
        try:
            yield from read_peers(b"[%b]" % b",".join(some))
        except UnusualError:
            yield from (_peer(_parse(bytes(entry))) for entry in some)


def _members(value: object, place: str) -> dict[str, Any]:
    if isinstance(value, _Repeated):
        _refuse(place, "repeats a key")
    if not isinstance(value, dict):
        _refuse(place, "is missing" if value is None else "is not an object")
    return value


def _text_id(value: object, place: str) -> str:
    if not is_id(value):
        _refuse(place, f"is not a string of 1 to {ID_SIZE} printable characters")
    return value


def is_id(value: object) -> TypeGuard[str]:
    """Whether the value can name a session or a location: 1 to 128 printable characters."""
    return isinstance(value, str) and 0 < len(value) <= ID_SIZE and value.isprintable()


def _integer(value: object, place: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _refuse(place, f"is not an integer from {low} to {high}")
    return value


def _optional_integer(members: dict[str, Any], key: str, place: str, low: int, high: int) -> int | None:
    value = members.get(key)
    return None if value is None else _integer(value, f"{place}.{key}", low, high)


def _optional_seconds(members: dict[str, Any], key: str) -> float | None:
    value = members.get(key)
    if value is None:
        return None
    # An integer that no float holds is no duration either; the comparison itself is exact.
    if type(value) not in {int, float} or not 1 <= value <= REVISION_LIMIT:
        _refuse(f"session_policy.{key}", "is not a number of seconds of at least 1")
    return float(value)


def _location(value: object) -> Location:
    members = _members(value, "location")
    mfa_required = members.get("mfa_required")
    if type(mfa_required) is not bool:
        _refuse("location.mfa_required", "is missing" if mfa_required is None else "is not a boolean")
    location_id = _text_id(members.get("id"), "location.id")
    return Location(location_id, clean_name(members.get("name")), mfa_required)


def _interface(value: object) -> InterfaceSettings:
    if value is None:
        return InterfaceSettings()
    members = _members(value, "interface")
    addresses = members.get("addresses")
    if addresses is not None and not isinstance(addresses, list):
        _refuse("interface.addresses", "is not a list")
    if addresses is not None and len(addresses) > ADDRESSES_LIMIT:
        _refuse("interface.addresses", f"has more than {ADDRESSES_LIMIT} entries")
    parsed = None
    try:
        if addresses is not None:
            parsed = tuple(dict.fromkeys(map(parse_interface_address, addresses)))
    except ValueError as error:
        _refuse("interface.addresses", f"has an entry that is {error}")
    return InterfaceSettings(
        addresses=parsed,
        listen_port=_optional_integer(members, "listen_port", "interface", 0, 65_535),
        # 576: below it IPv4 does not work (RFC 791), and no tunnel is that small on purpose.
        mtu=_optional_integer(members, "mtu", "interface", 576, 65_535),
        fwmark=_optional_integer(members, "fwmark", "interface", 0, 2**32 - 1),
    )


def _session_policy(value: object) -> SessionPolicy:
    if value is None:
        return SessionPolicy()
    members = _members(value, "session_policy")
    liveness: Literal["gateway", "core"]
    match members.get("liveness"):
        case None | "gateway":
            liveness = "gateway"
        case "core":
            liveness = "core"
        case _:
            _refuse("session_policy.liveness", "is neither gateway nor core")
    return SessionPolicy(
        idle_timeout=_optional_seconds(members, "idle_timeout"),
        connect_timeout=_optional_seconds(members, "connect_timeout"),
        max_lifetime=_optional_seconds(members, "max_lifetime"),
        liveness=liveness,
    )


def _grant(value: object) -> Grant | Refusal:
    """Read a session, or say what is wrong with it."""
    if not isinstance(value, dict) or isinstance(value, _Repeated):
        return Refusal.INVALID_SESSION
    get = value.get
    try:
        preshared_key = parse_preshared_key(get("preshared_key"))
    except ValueError:
        return Refusal.INVALID_PRESHARED_KEY
    try:
        granted_at = parse_time(get("granted_at"))
        expires_at = parse_time(get("expires_at"))
    except ValueError:
        return Refusal.INVALID_TIME
    if expires_at <= granted_at:
        return Refusal.INVALID_TIME
    session_id = get("id")
    if not is_id(session_id):
        return Refusal.INVALID_SESSION
    return Grant(session_id, preshared_key, granted_at, expires_at)


def _peer(value: object) -> Peer | UnreadablePeer:
    """Read an entry of the peer list, keeping what can be read of a faulty one."""
    if not isinstance(value, dict):
        return UnreadablePeer("", Refusal.INVALID_PEER)
    get = value.get
    text = get("public_key")
    try:
        public_key = parse_public_key(text)
    except ValueError:
        return UnreadablePeer(clean_name(text), Refusal.INVALID_PUBLIC_KEY, clean_name(get("name")))
    fault: Refusal | None = None
    session: Grant | None = None
    session_fault: Refusal | None = None
    if (entry := get("session")) is not None:
        grant = _grant(entry)
        if isinstance(grant, Refusal):
            session_fault = grant
        else:
            session = grant
    preshared_key: PresharedKey | None = None
    if (key := get("preshared_key")) is not None:
        try:
            preshared_key = parse_preshared_key(key)
        except ValueError:
            fault = Refusal.INVALID_PRESHARED_KEY
    mfa_exempt = get("mfa_exempt")
    if mfa_exempt is None:
        mfa_exempt = False
    elif mfa_exempt is not True and mfa_exempt is not False:
        mfa_exempt, fault = False, Refusal.INVALID_MFA_EXEMPT
    keepalive = get("persistent_keepalive")
    if keepalive is None:
        keepalive = 0
    elif type(keepalive) is not int or not 0 <= keepalive <= 65_535:
        keepalive, fault = 0, Refusal.INVALID_KEEPALIVE
    allowed_ips: tuple[Prefix, ...] = ()
    prefixes = get("allowed_ips")
    if not isinstance(prefixes, list):
        fault = Refusal.INVALID_ALLOWED_IPS
    else:
        try:
            allowed_ips = tuple([parse_prefix(prefix) for prefix in prefixes])
        except ValueError:
            fault = Refusal.INVALID_ALLOWED_IPS
        if len(allowed_ips) > 1 and not (len(allowed_ips) == 2 and allowed_ips[0] < allowed_ips[1]):
            allowed_ips = tuple(sorted(set(allowed_ips)))
    if isinstance(value, _Repeated):
        fault = Refusal.INVALID_PEER
    return Peer(
        public_key,
        allowed_ips,
        clean_name(get("name")),
        keepalive,
        mfa_exempt,
        preshared_key,
        session,
        fault,
        session_fault,
    )


def decode_snapshot(body: bytes, requested_at: float, before: Snapshot | None = None) -> Snapshot:
    """Read the answer to GET state; ``requested_at`` is boot time in seconds when it was asked for.

    Entries of the peer list that are wrong come back as peers with a ``fault`` or, without a
    readable key, as ``unreadable``. A large list that is written as the one of ``before`` is not read again
    (``resync_10k``): the peers are the same objects. Raises InvalidMessage for everything else that is wrong.
    """
    if len(body) > _LARGE:
        _check_density(body)
    frame = _load_frame(body)
    members = _members(_parse(body), "it") if frame is None else frame.members
    epoch = members.get("epoch")
    if not isinstance(epoch, str) or not _EPOCH.fullmatch(epoch):
        _refuse("epoch", "is missing" if epoch is None else "is not 1 to 64 of A-Z a-z 0-9 _ -")
    revision = _integer(members.get("revision"), "revision", 0, REVISION_LIMIT)
    try:
        server_time = parse_time(members.get("server_time"))
    except ValueError as error:
        _refuse("server_time", f"is wrong: {error}")
    location = _location(members.get("location"))
    interface = _interface(members.get("interface"))
    session_policy = _session_policy(members.get("session_policy"))
    if frame is not None and before is not None and frame.digest == before.digest:
        peers, unreadable = before.peers, before.unreadable
    else:
        peers, unreadable = _peer_list(members.get("peers") if frame is None else frame.peers)
    count = members.get("peer_count")
    if type(count) is not int or count != len(peers) + len(unreadable):
        _refuse(
            "peer_count",
            "is missing" if count is None else "is not the number of peers: the list is cut",
        )
    return Snapshot(
        epoch,
        revision,
        server_time,
        requested_at,
        location,
        interface,
        session_policy,
        peers,
        unreadable,
        b"" if frame is None else frame.digest,
    )


def _peer_list(entries: object) -> tuple[tuple[Peer, ...], tuple[UnreadablePeer, ...]]:
    if isinstance(entries, msgspec.Raw):
        read = _read_entries(entries)
    elif isinstance(entries, list):
        if len(entries) > PEERS_LIMIT:
            _refuse("peers", f"has more than {PEERS_LIMIT} entries")
        read = map(_peer, entries)
    else:
        _refuse("peers", "is missing" if entries is None else "is not a list")
    peers: list[Peer] = []
    unreadable: list[UnreadablePeer] = []
    for peer in read:
        if isinstance(peer, Peer):
            peers.append(peer)
        else:
            unreadable.append(peer)
            if len(unreadable) > UNREADABLE_LIMIT:
                _refuse("peers", f"has more than {UNREADABLE_LIMIT} entries without a public key")
    return tuple(peers), tuple(unreadable)


def parse_position(text: object) -> tuple[str, int]:
    """Read EPOCH:REVISION. Raises InvalidMessage."""
    match = _POSITION.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match[2]) > REVISION_LIMIT:
        _refuse("an event's id", "is not EPOCH:REVISION")
    return match[1], int(match[2])


def _body(event: object, data: object) -> ChangeBody:
    members = _members(data, "an event's data")
    if event == "location_changed":
        return LocationChanged(
            _location(members.get("location")),
            _interface(members.get("interface")),
            _session_policy(members.get("session_policy")),
        )
    key: PublicKey | None
    try:
        key = parse_public_key(members.get("public_key"))
    except ValueError:
        key = None
    if key is None:
        _refuse("an event's public_key", "is not a key")
    match event:
        case "peer_upserted":
            peer = _peer(members)
            if isinstance(peer, Peer):
                return PeerUpserted(peer)
        case "peer_removed":
            return PeerRemoved(key)
        case "session_granted":
            grant = _grant(members.get("session"))
            if isinstance(grant, Grant):
                return SessionGranted(key, grant)
            return SessionGranted(key, None, grant)
        case "session_revoked":
            session_id = members.get("session_id")
            if is_id(session_id):
                return SessionRevoked(key, session_id)
            # It revokes something of this peer's: refusing the peer is the safe reading.
            return SessionGranted(key, None, Refusal.INVALID_SESSION)
    _refuse("an event's type", "is not one of the API's")


def decode_event(event: str, event_id: str, data: bytes) -> Change | Resync:
    """Read one event of the change stream.

    A bad event whose id, type, JSON and public key can be read becomes a change that refuses that
    peer. Raises InvalidMessage for any other, which means that the state has to be pulled.
    """
    epoch, revision = parse_position(event_id)
    if event == "resync":
        return Resync(epoch, revision)
    return Change(epoch, revision, _body(event, _load(data)))


def decode_push(body: bytes) -> Push:
    """Read the body of a push; it carries at least one change. Raises InvalidMessage."""
    members = _members(_load(body), "it")
    location = _text_id(members.get("location"), "location")
    entries = members.get("changes")
    if not isinstance(entries, list) or not entries:
        _refuse("changes", "is missing" if entries is None else "is not a list of changes")
    changes = []
    for entry in entries:
        change = _members(entry, "a change")
        epoch, revision = parse_position(change.get("id"))
        changes.append(Change(epoch, revision, _body(change.get("type"), change.get("data"))))
    return Push(location, tuple(changes))
