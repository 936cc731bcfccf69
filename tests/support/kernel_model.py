"""A small model of what WireGuard in the kernel does with peers, and of clients that use them.

What it knows, by the kernel's sources and what was measured: adding a peer that is there changes it;
an update of one that is not does nothing; a prefix that another peer gets is taken from its old
owner; transport keys outlive a changed PSK for 180 s and end with the peer.
"""

from dataclasses import dataclass, field
from itertools import count
from typing import assert_never

from agent.model import (
    AddPeer,
    CutPeer,
    Endpoint,
    Keep,
    Now,
    ObservedDevice,
    ObservedPeer,
    Operation,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)
from agent.observed import RawPeers

TRANSPORT_LIFETIME = 180.0
_CUT_KEY = PresharedKey(b"\xcc" * 32)
_ENDPOINT = Endpoint(b"\xcb\x00\x71\x09", 51000)


@dataclass
class Tunnel:
    """Transport keys of one handshake; ``label`` says by whose right it was made."""

    label: str
    made_at: float


@dataclass
class KernelPeer:
    """``incarnation`` tells one stay of a key on the interface from another."""

    incarnation: int
    preshared_key: PresharedKey | None = None
    allowed_ips: set[Prefix] = field(default_factory=set)
    persistent_keepalive: int = 0
    endpoint: Endpoint | None = None
    latest_handshake: float = 0.0
    rx_bytes: int = 0
    tx_bytes: int = 0
    tunnels: list[Tunnel] = field(default_factory=list)


class Kernel:
    """One interface."""

    def __init__(self) -> None:
        self.peers: dict[PublicKey, KernelPeer] = {}
        self._incarnations = count(1)
        self._looks = count()
        self._shown: dict[PublicKey, tuple[bytes, ObservedPeer]] = {}

    # What an agent does.

    def apply(self, operation: Operation) -> None:
        """Carry out one operation of a plan."""
        match operation:
            case RemovePeer(key):
                self.peers.pop(key, None)
            case CutPeer(key):
                if key in self.peers:
                    self.peers[key].preshared_key = _CUT_KEY
                    self.peers[key].allowed_ips = set()
            case UpdatePeer(key):
                if key in self.peers:
                    self._update(key, operation)
            case AddPeer(key, preshared_key, allowed_ips):
                peer = self.peers.setdefault(key, KernelPeer(next(self._incarnations)))
                peer.preshared_key = preshared_key
                self._give(key, allowed_ips)
            case _:
                assert_never(operation)

    def _update(self, key: PublicKey, update: UpdatePeer) -> None:
        peer = self.peers[key]
        if not isinstance(update.preshared_key, Keep):
            peer.preshared_key = update.preshared_key
        if not isinstance(update.allowed_ips, Keep):
            if update.replace_allowed_ips:
                peer.allowed_ips = set()
            self._give(key, update.allowed_ips)
        if not isinstance(update.persistent_keepalive, Keep):
            peer.persistent_keepalive = update.persistent_keepalive

    def _give(self, key: PublicKey, allowed_ips: tuple[Prefix, ...]) -> None:
        for other in self.peers.values():
            other.allowed_ips.difference_update(allowed_ips)
        self.peers[key].allowed_ips.update(allowed_ips)

    def read(self) -> ObservedDevice:
        """What a dump shows: as bytes, and of who is as before the very same bytes."""
        looked = {}
        for key, peer in self.peers.items():
            shown = ObservedPeer(
                key,
                peer.preshared_key,
                tuple(sorted(peer.allowed_ips)),
                peer.endpoint,
                peer.persistent_keepalive,
                peer.latest_handshake,
                peer.rx_bytes,
                peer.tx_bytes,
            )
            before = self._shown.get(key)
            looked[key] = before if before and before[1] == shown else (b"%d" % next(self._looks), shown)
        self._shown = looked
        raw = {key: bytes_ for key, (bytes_, _) in looked.items()}
        decode = dict(looked.values()).__getitem__
        return ObservedDevice("wg0", None, 51820, 0, RawPeers(raw, decode))

    def reboot(self) -> None:
        """The host starts anew: the interface is gone."""
        self.peers.clear()

    # What clients do.

    def knock(self, key: PublicKey) -> None:
        """A client without the right PSK tries: its bytes count, nothing comes of it."""
        if key in self.peers:
            self.peers[key].rx_bytes += 148

    def handshake(self, key: PublicKey, preshared_key: PresharedKey | None, label: str, now: Now) -> bool:
        """A client shakes hands with this PSK; whether it got a tunnel."""
        peer = self.peers.get(key)
        if peer is None:
            return False
        if peer.preshared_key != preshared_key:
            self.knock(key)
            return False
        peer.tunnels.append(Tunnel(label, now.boot))
        peer.endpoint = _ENDPOINT
        peer.latest_handshake = max(now.wall, peer.latest_handshake + 0.001)
        peer.rx_bytes += 148
        peer.tx_bytes += 92
        return True

    def send(self, key: PublicKey, size: int, now: Now) -> bool:
        """A client sends through its newest tunnel; whether it came through."""
        if not self.working_tunnels(key, now):
            return False
        self.peers[key].rx_bytes += size
        self.peers[key].tx_bytes += size // 2
        return True

    def working_tunnels(self, key: PublicKey, now: Now) -> list[Tunnel]:
        """Those whose packets still get in: young enough, and the peer has addresses."""
        peer = self.peers.get(key)
        if peer is None or not peer.allowed_ips:
            return []
        return [t for t in peer.tunnels if now.boot - t.made_at < TRANSPORT_LIFETIME]
