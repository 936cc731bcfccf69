"""What core has told on one connection, and what that makes of the next thing it tells.

Defguard numbers nothing: a connection is an epoch here, and each thing told on it a revision, so that the
rules about order hold as they do for the core API. A peer is judged for itself: one with a PSK has to have
a session, one without is on the interface always, unless ``mfa_required`` says that it may not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import assert_never

from agent.core.defguard.messages import (
    AclPut,
    Configuration,
    LocationGone,
    LocationPut,
    PeerGone,
    PeerPut,
    Update,
)
from agent.model import (
    Change,
    ChangeBody,
    InterfaceSettings,
    Location,
    LocationChanged,
    Now,
    Peer,
    PeerRemoved,
    PeerUpserted,
    Prefix,
    PublicKey,
    Refusal,
    SessionPolicy,
    Snapshot,
)


class Picture:
    """The location as core has told it on the connection that ``epoch`` names."""

    def __init__(
        self, epoch: str, location: str, *, mfa_required: bool, policy: SessionPolicy | None = None
    ) -> None:
        self.barred: Callable[[Peer], bool] = lambda _: False
        """Who is not to be let in for now, for a reason of ours."""
        self.held_back: dict[PublicKey, Peer] = {}
        """Who is barred, as core lists them."""
        self.in_doubt = False
        """Whether only the whole can tell what the location is like now."""
        self.peers: dict[PublicKey, Peer] = {}
        self._epoch = epoch
        self._location = location
        self._mfa_required = mfa_required
        self._policy = policy or SessionPolicy()
        self._revision = 0
        self._owners: dict[Prefix, PublicKey] = {}

    def whole(self, told: Configuration, now: Now) -> Snapshot:
        """Return the state that a whole configuration is, received at ``now``."""
        self._revision += 1
        self.in_doubt = False
        self.held_back.clear()
        peers = tuple(map(self._judged, told.peers))
        self.peers = {peer.public_key: peer for peer in peers}
        self._owners = {prefix: peer.public_key for peer in peers for prefix in peer.allowed_ips}
        return Snapshot(
            epoch=self._epoch,
            revision=self._revision,
            # Core does not tell the time: the host's own is as good as another.
            server_time=now.wall,
            requested_at=now.boot,
            location=self._place(told),
            interface=told.interface,
            session_policy=self._policy,
            peers=peers,
            unreadable=told.unreadable,
            identity=told.identity,
        )

    def nothing(self, now: Now) -> Snapshot:
        """Return the state of a location that was deleted: with nobody in it, nothing needs MFA."""
        nobody = self.whole(Configuration("", None, InterfaceSettings(), ()), now)
        return replace(nobody, location=replace(nobody.location, mfa_required=False))

    def release(self) -> tuple[Change, ...]:
        """Return what lets in those who are barred no longer."""
        waiting = [peer for peer in self.held_back.values() if not self.barred(peer)]
        return self._changes(body for peer in waiting for body in self._put(self._judged(peer)))

    def is_whole(self, told: Configuration) -> bool:
        """Whether a location that is told of anew comes with everybody, and not its settings alone.

        An empty list is never taken for nobody.
        """
        return bool(told.peers or told.unreadable or not self.peers)

    def take(self, update: Update, now: Now) -> Snapshot | tuple[Change, ...]:
        """Return what an update changes, perhaps nothing."""
        match update:
            case PeerPut(peer):
                return self._changes(self._put(self._judged(peer)))
            case PeerGone(key):
                return self._changes(self._gone((key,)))
            case LocationGone():
                return self._changes(self._gone(list(self.peers)))
            case LocationPut(told):
                if not self.is_whole(told):
                    self.in_doubt = True
                    settled = LocationChanged(self._place(told), told.interface, self._policy, told.identity)
                    return self._changes([settled])
                return self.whole(told, now)
            case AclPut():
                return ()
            case _:
                assert_never(update)

    def _place(self, told: Configuration) -> Location:
        return Location(self._location, told.name, mfa_required=True)

    def _judged(self, peer: Peer) -> Peer:
        if self._mfa_required:
            peer = peer._replace(mfa_exempt=False)
        if not self.barred(peer):
            self.held_back.pop(peer.public_key, None)
            return peer
        self.held_back[peer.public_key] = peer
        return peer._replace(fault=Refusal.NOT_GUARDED)

    def _put(self, peer: Peer) -> Iterable[ChangeBody]:
        """A device whose key was changed comes with its new one only: the prefix's old owner has to go.

        It is refused and not forgotten, for it may be told of next: two devices may have changed places,
        and a session that had ended for it could not begin again.
        """
        key = peer.public_key
        if peer.fault is None:
            taken = set(peer.allowed_ips)
            for owner in sorted({self._owners.get(prefix, key) for prefix in taken} - {key}):
                held = self.peers[owner]
                left = tuple(prefix for prefix in held.allowed_ips if prefix not in taken)
                yield self._list(held._replace(allowed_ips=left, fault=Refusal.PREFIX_CLAIMED))
        yield self._list(peer)

    def _list(self, peer: Peer) -> PeerUpserted:
        key = peer.public_key
        self._disown(key)
        self.peers[key] = peer
        self._owners.update(dict.fromkeys(peer.allowed_ips, key))
        return PeerUpserted(peer)

    def _gone(self, keys: Iterable[PublicKey]) -> Iterable[ChangeBody]:
        for key in keys:
            self.held_back.pop(key, None)
            if key in self.peers:
                self._disown(key)
                del self.peers[key]
                yield PeerRemoved(key)

    def _disown(self, key: PublicKey) -> None:
        held = self.peers.get(key)
        for prefix in () if held is None else held.allowed_ips:
            if self._owners.get(prefix) == key:
                del self._owners[prefix]

    def _changes(self, bodies: Iterable[ChangeBody]) -> tuple[Change, ...]:
        changes = []
        for body in bodies:
            self._revision += 1
            changes.append(Change(self._epoch, self._revision, body))
        return tuple(changes)
