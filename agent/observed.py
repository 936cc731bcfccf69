"""The peers of one look at the interface, read no further than somebody asks.

Of ten thousand peers a hundred have moved since the last look. The others' bytes are the same, and these
are what two looks are compared by (``stats_tick_10k``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, KeysView, Mapping

from agent.model import ObservedPeer, PublicKey


class RawPeers(Mapping[PublicKey, ObservedPeer]):
    """Peers by key, each as the bytes that it was told in; ``decode`` reads them, and may raise DeviceError.

    ``raw`` is never changed afterwards. Bytes that are as they were in an earlier look are the same object;
    ``changed`` are the peers whose bytes are not those of the look ``base``.
    What was read is kept until ``forget``, since several look at the same peers.
    """

    def __init__(
        self,
        raw: Mapping[PublicKey, bytes],
        decode: Callable[[bytes], ObservedPeer],
        base: RawPeers | None = None,
        changed: Collection[PublicKey] = (),
    ) -> None:
        self.raw = raw
        self._decode = decode
        self._read: dict[PublicKey, ObservedPeer] = {}
        # Looks do not keep one another.
        self._base = None if base is None else weakref.ref(base)
        self._changed = changed

    def since(self, before: RawPeers) -> Collection[PublicKey]:
        """Return whose bytes are not those of an earlier look."""
        if self._base is not None and self._base() is before:
            return self._changed
        earlier = before.raw
        return [key for key, raw in self.raw.items() if earlier.get(key) is not raw]

    def __getitem__(self, key: PublicKey) -> ObservedPeer:
        read = self._read.get(key)
        if read is None:
            read = self._read[key] = self._decode(self.raw[key])
        return read

    def forget(self) -> None:
        """Let go of what was read: everybody has seen it."""
        self._read.clear()

    def __contains__(self, key: object) -> bool:
        return key in self.raw

    def __iter__(self) -> Iterator[PublicKey]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def keys(self) -> KeysView[PublicKey]:
        """The keys, without reading a peer."""
        return self.raw.keys()

    def __repr__(self) -> str:
        return f"<{len(self.raw)} peers>"


def moved(
    before: Mapping[PublicKey, ObservedPeer] | None, now: Mapping[PublicKey, ObservedPeer]
) -> Collection[PublicKey]:
    """Return the peers of a look that may differ from an earlier one (None: there was none).

    Who is left out does not differ. Where a look can't tell, that is nobody.
    """
    if not isinstance(now, RawPeers) or not isinstance(before, RawPeers):
        return now.keys()
    return now.since(before)


def forget(peers: Mapping[PublicKey, ObservedPeer]) -> None:
    """Let go of what was read of a look's peers, if that is kept."""
    if isinstance(peers, RawPeers):
        peers.forget()
