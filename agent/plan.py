"""From what the interface should hold to the operations that make it so.

The mirror is what the interface holds as far as acknowledged operations and the last look at it tell.
A plan removes first, then updates, then adds: a prefix is free before its new owner gets it, and
whatever prefix of the plan was carried out, nobody has been let in whom the plan does not want in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, TypeVar, assert_never

from msgspec import Struct, structs

from agent.model import (
    KEEP,
    AddPeer,
    CutPeer,
    DesiredPeer,
    Keep,
    ObservedDevice,
    ObservedPeer,
    Operation,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)
from agent.observed import moved

_T = TypeVar("_T")

FOUND: Final = -1
"""Tenure of a peer that was found on the interface and is not known to be ours."""
CUT: Final = -2
"""Tenure of a peer that was cut: it is only ever removed."""


class Leave(StrEnum):
    """Marks a peer that is not to be touched: what is wanted of it is not known yet."""

    LEAVE = "leave"


LEAVE: Final = Leave.LEAVE
Wanted = DesiredPeer | Leave | None
"""What is wanted of a peer: this, hands off, or that it is not on the interface."""


class Held(Struct, frozen=True, gc=False):
    """A peer on the interface, in so far as it matters to a plan."""

    preshared_key: PresharedKey | None
    allowed_ips: tuple[Prefix, ...]
    persistent_keepalive: int
    has_endpoint: bool
    tenure: int


_USELESS: Final = Held(None, (), 0, False, CUT)
"""What is known of a peer that was cut: all that is left to do is to remove it."""


class DriftKind(StrEnum):
    """What somebody else changed."""

    PEER_ADDED = "peer_added"
    PEER_REMOVED = "peer_removed"
    PRESHARED_KEY = "preshared_key"
    ALLOWED_IPS = "allowed_ips"
    PERSISTENT_KEEPALIVE = "persistent_keepalive"
    INTERFACE = "interface"
    LISTEN_PORT = "listen_port"
    FWMARK = "fwmark"
    PRIVATE_KEY = "private_key"
    ADDRESS = "address"
    MTU = "mtu"
    LINK_DOWN = "link_down"
    GUARD = "guard"


@dataclass(frozen=True, slots=True)
class Drift:
    """A difference that no plan of ours made; ``detail`` is for people and holds no secret."""

    kind: DriftKind
    public_key: PublicKey | None
    detail: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Operations in the order in which they are carried out."""

    removes: tuple[RemovePeer, ...] = ()
    updates: tuple[UpdatePeer, ...] = ()
    adds: tuple[AddPeer, ...] = ()
    tenures: dict[PublicKey, int] = field(default_factory=dict)
    """Of the added peers."""
    adopted: tuple[PublicKey, ...] = ()
    """Peers that were found as they should be and count as ours from now on."""

    def without(self, keys: Collection[PublicKey], mirror: Mirror) -> tuple[Plan, set[PublicKey]]:
        """The same but for these peers, and for those who gain a prefix that one of them still holds.

        Returns the plan and who is not in it. Who was adopted stays so.
        """
        writes: tuple[UpdatePeer | AddPeer, ...] = (*self.updates, *self.adds)
        out, added = set(keys), set(keys)
        while added:
            held = (mirror.peers[key].allowed_ips for key in added if key in mirror.peers)
            kept = {prefix for allowed_ips in held for prefix in allowed_ips}
            added = {
                write.public_key
                for write in writes
                if write.public_key not in out
                and not isinstance(write.allowed_ips, Keep)
                and not kept.isdisjoint(write.allowed_ips)
            }
            out |= added
        removes = tuple(operation for operation in self.removes if operation.public_key not in out)
        updates = tuple(operation for operation in self.updates if operation.public_key not in out)
        adds = tuple(operation for operation in self.adds if operation.public_key not in out)
        return replace(self, removes=removes, updates=updates, adds=adds), out

    def portions(self, size: int, order: Callable[[PublicKey], str]) -> list[Plan]:
        """The updates and then the adds, at most so many at a time; at least one plan, if an empty one.

        Where they do not fit into one, each kind comes in the order that ``order`` gives.
        """
        if len(self.updates) + len(self.adds) <= size:
            return [replace(self, removes=())]
        updates = sorted(self.updates, key=lambda update: order(update.public_key))
        adds = sorted(self.adds, key=lambda add: order(add.public_key))
        parts = [Plan(updates=tuple(some)) for some in _cut_up(updates, size)]
        return parts + [Plan(adds=tuple(some), tenures=self.tenures) for some in _cut_up(adds, size)]

    def __iter__(self) -> Iterator[Operation]:
        yield from self.removes
        yield from self.updates
        yield from self.adds

    def __len__(self) -> int:
        return len(self.removes) + len(self.updates) + len(self.adds)


class Mirror:
    """What the interface holds. Only acknowledged operations and looks at the interface change it."""

    def __init__(self) -> None:
        self.peers: dict[PublicKey, Held] = {}
        self._seen: Mapping[PublicKey, ObservedPeer] | None = None
        """The interface's peers at the last look."""
        self._touched: set[PublicKey] = set()
        """Whom an operation has changed since."""

    def copy(self) -> Mirror:
        """Another mirror of the same, to try a plan on."""
        other = Mirror()
        other.peers = dict(self.peers)
        other._seen, other._touched = self._seen, set(self._touched)
        return other

    def acknowledge(self, operation: Operation, tenure: int = FOUND) -> None:
        """Take in an operation that the device has carried out; ``tenure`` is that of an added peer."""
        key = operation.public_key
        self._touched.add(key)
        if isinstance(operation, AddPeer):
            self.peers[key] = Held(operation.preshared_key, operation.allowed_ips, 0, False, tenure)
            return
        held = self.peers.get(key)
        if held is None:
            return
        if isinstance(operation, CutPeer):
            self.peers[key] = _USELESS
        elif isinstance(operation, RemovePeer):
            del self.peers[key]
        elif isinstance(operation, UpdatePeer):
            self.peers[key] = _updated(held, operation)
        else:
            assert_never(operation)

    def adopt(self, key: PublicKey, tenure: int) -> None:
        """Count a peer that was found as in this tenure from now on."""
        self.peers[key] = structs.replace(self.peers[key], tenure=tenure)

    def find(self, device: ObservedDevice) -> None:
        """Take in what there is before anything was planned: none of it is drift."""
        self._seen, self._touched = device.peers, set()
        self.peers = {key: _found(observed, FOUND) for key, observed in device.peers.items()}

    def observe(self, device: ObservedDevice) -> tuple[list[Drift], set[PublicKey]]:
        """Take in a look at the interface.

        Returns how it differs from the mirror, and the peers to plan again: those, and the ones that
        have got an endpoint and may have a keepalive now. A cut peer has lost what it had on
        purpose: it stays cut, whatever it holds now.
        """
        drift: list[Drift] = []
        again: set[PublicKey] = set()
        there = device.peers.keys()
        # Who is as before, and was not touched by us, is as the mirror has it.
        keys = dict.fromkeys(moved(self._seen, device.peers))
        keys |= dict.fromkeys(self._touched & there)
        looked_at = {key: device.peers[key] for key in keys}
        self._seen, self._touched = device.peers, set()
        gone = sorted(self.peers.keys() - there)
        drift += [
            Drift(DriftKind.PEER_REMOVED, key, "is no longer on the interface")
            for key in gone
            if self.peers.pop(key).tenure != CUT
        ]
        for key, observed in looked_at.items():
            held = self.peers.get(key)
            if held is None:
                self.peers[key] = _found(observed, FOUND)
                drift.append(Drift(DriftKind.PEER_ADDED, key, "was put on the interface"))
            elif held.tenure != CUT:
                differences = _compare(key, held, observed)
                has_endpoint = observed.endpoint is not None
                if differences or has_endpoint != held.has_endpoint:
                    drift += differences
                    again.add(key)
                    # A strange PSK may have let somebody in, whose transport keys outlive it: such a
                    # peer is ours again only if that PSK is the wanted one, else it is added afresh.
                    same_psk = observed.preshared_key == held.preshared_key
                    self.peers[key] = _found(observed, held.tenure if same_psk else FOUND)
        again.update(d.public_key for d in drift if d.public_key is not None)
        return drift, again


def _cut_up(operations: list[_T], size: int) -> Iterator[list[_T]]:
    return (operations[at : at + size] for at in range(0, len(operations), size))


def _found(observed: ObservedPeer, tenure: int) -> Held:
    return Held(
        observed.preshared_key,
        observed.allowed_ips,
        observed.persistent_keepalive,
        observed.endpoint is not None,
        tenure,
    )


def _updated(held: Held, update: UpdatePeer) -> Held:
    allowed_ips = held.allowed_ips
    if not isinstance(update.allowed_ips, Keep):
        gained = update.allowed_ips
        allowed_ips = gained if update.replace_allowed_ips else tuple(sorted({*allowed_ips, *gained}))
    return Held(
        held.preshared_key if isinstance(update.preshared_key, Keep) else update.preshared_key,
        allowed_ips,
        held.persistent_keepalive
        if isinstance(update.persistent_keepalive, Keep)
        else update.persistent_keepalive,
        held.has_endpoint,
        held.tenure,
    )


def _compare(key: PublicKey, held: Held, observed: ObservedPeer) -> list[Drift]:
    drift = []
    if observed.preshared_key != held.preshared_key:
        drift.append(Drift(DriftKind.PRESHARED_KEY, key, "has another pre-shared key"))
    if observed.allowed_ips != held.allowed_ips and set(observed.allowed_ips) != set(held.allowed_ips):
        drift.append(
            Drift(
                DriftKind.ALLOWED_IPS,
                key,
                f"has {_shown(observed.allowed_ips)} instead of {_shown(held.allowed_ips)}",
            )
        )
    if observed.persistent_keepalive != held.persistent_keepalive:
        drift.append(
            Drift(
                DriftKind.PERSISTENT_KEEPALIVE,
                key,
                f"has {observed.persistent_keepalive} instead of {held.persistent_keepalive}",
            )
        )
    return drift


def _shown(prefixes: tuple[Prefix, ...]) -> str:
    return ", ".join(map(str, prefixes[:8])) + (", …" if len(prefixes) > 8 else "") or "none"


def make_plan(wanted: Iterable[tuple[PublicKey, Wanted]], mirror: Mirror) -> Plan:
    """Return what turns the mirror into what is wanted of these peers; others are not touched.

    A peer found on the interface is taken over in place only if it has the wanted PSK and some
    allowed IPs (it was cut otherwise); those are adopted in the mirror at once, which sends nothing.
    """
    removes: list[RemovePeer] = []
    updates: list[UpdatePeer] = []
    adds: list[AddPeer] = []
    tenures: dict[PublicKey, int] = {}
    adopted: list[PublicKey] = []
    for key, want in wanted:
        held = mirror.peers.get(key)
        if isinstance(want, Leave):
            continue
        if want is None:
            if held is not None:
                removes.append(RemovePeer(key))
            continue
        if held is not None and held.tenure == FOUND and _is_the_wanted(held, want):
            mirror.adopt(key, want.tenure)
            adopted.append(key)
            held = mirror.peers[key]
        if held is not None and held.tenure == want.tenure:
            update = _update(held, want)
            if update is not None:
                updates.append(update)
            continue
        if held is not None:
            removes.append(RemovePeer(key))
        adds.append(AddPeer(key, want.preshared_key, want.allowed_ips))
        tenures[key] = want.tenure
    return Plan(tuple(removes), tuple(updates), tuple(adds), tenures, tuple(adopted))


def _is_the_wanted(held: Held, want: DesiredPeer) -> bool:
    return held.preshared_key == want.preshared_key and bool(held.allowed_ips or not want.allowed_ips)


def _update(held: Held, want: DesiredPeer) -> UpdatePeer | None:
    """The change in place from held to wanted, None if there is none.

    Allowed IPs that do not change are left out, and gained ones are added: replacing them empties
    the peer for a moment. Keepalive only with an endpoint: without one the kernel would shake
    hands with nobody for ever.
    """
    preshared_key: PresharedKey | Keep | None = KEEP
    if want.preshared_key != held.preshared_key:
        preshared_key = want.preshared_key
    allowed_ips: tuple[Prefix, ...] | Keep = KEEP
    replace_allowed_ips = False
    if want.allowed_ips != held.allowed_ips:
        have, need = set(held.allowed_ips), set(want.allowed_ips)
        if have - need:
            allowed_ips, replace_allowed_ips = want.allowed_ips, True
        elif need - have:
            allowed_ips = tuple(sorted(need - have))
    keepalive = want.persistent_keepalive if held.has_endpoint else 0
    persistent_keepalive: int | Keep = keepalive if keepalive != held.persistent_keepalive else KEEP
    if preshared_key is KEEP and allowed_ips is KEEP and persistent_keepalive is KEEP:
        return None
    return UpdatePeer(want.public_key, preshared_key, allowed_ips, replace_allowed_ips, persistent_keepalive)


def describe(operation: Operation) -> str:
    """One operation for people, without secrets or the key: what ``wg-agent plan`` prints."""
    match operation:
        case RemovePeer():
            return "remove"
        case CutPeer():
            return "cut"
        case AddPeer(_, preshared_key, allowed_ips):
            psk = "with" if preshared_key is not None else "without"
            return f"add {psk} pre-shared key, allowed ips {_shown(allowed_ips)}"
        case UpdatePeer(_, preshared_key, allowed_ips, replace, keepalive):
            parts = []
            if not isinstance(preshared_key, Keep):
                parts.append("clear pre-shared key" if preshared_key is None else "new pre-shared key")
            if not isinstance(allowed_ips, Keep):
                parts.append(f"{'allowed ips' if replace else 'gain allowed ips'} {_shown(allowed_ips)}")
            if not isinstance(keepalive, Keep):
                parts.append(f"persistent keepalive {keepalive or 'off'}")
            return "update: " + "; ".join(parts)
        case _:
            assert_never(operation)
