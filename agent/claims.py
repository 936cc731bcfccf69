"""Which peer may have which prefix: a prefix belongs to one peer (rule 3).

Two peers that list the same prefix contest it. Among peers that must do MFA, one prefix that contains
another's is contested too: their liveness could not be told apart. Judged over all listed peers, in
the same way however the list came about.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator

from agent.model import Prefix, PublicKey

_Owners = PublicKey | frozenset[PublicKey]


class Claims:
    """The prefixes of all listed peers, by owner; asks and changes cost O(log n) and the overlaps met."""

    def __init__(self) -> None:
        self._prefixes: dict[PublicKey, tuple[Prefix, ...]] = {}
        self._exempt: set[PublicKey] = set()
        """Who need not do MFA; where a location requires it these are few (``rss_100k``)."""
        self._owners: dict[Prefix, _Owners] = {}
        # By address size: the prefixes in order, so that what one contains is a run of it.
        self._ordered: dict[int, list[Prefix]] = {4: [], 16: []}
        self._lengths: dict[int, Counter[int]] = {4: Counter(), 16: Counter()}

    def load(self, claims: Iterable[tuple[PublicKey, tuple[Prefix, ...], bool]]) -> None:
        """Replace everything by (key, prefixes, must do MFA) of each listed peer."""
        self.__init__()  # type: ignore[misc]
        owners = self._owners
        for key, prefixes, must_do_mfa in claims:
            self._prefixes[key] = prefixes
            if not must_do_mfa:
                self._exempt.add(key)
            for prefix in prefixes:
                if owners.setdefault(prefix, key) is not key:
                    self._own(prefix, key)
        for size in self._ordered:
            self._ordered[size] = sorted(prefix for prefix in owners if len(prefix.packed) == size)
            self._lengths[size] = Counter(prefix.length for prefix in self._ordered[size])

    def put(self, key: PublicKey, prefixes: tuple[Prefix, ...], must_do_mfa: bool) -> set[PublicKey]:
        """Set what one peer claims; return the peers (it among them) to be judged again."""
        if self._prefixes.get(key) == prefixes and (key in self._exempt) != must_do_mfa:
            return {key}
        affected = self.drop(key)
        self._prefixes[key] = prefixes
        if not must_do_mfa:
            self._exempt.add(key)
        for prefix in prefixes:
            if self._own(prefix, key):
                size = len(prefix.packed)
                insort(self._ordered[size], prefix)
                self._lengths[size][prefix.length] += 1
        affected.update(self._neighbours(key))
        affected.add(key)
        return affected

    def drop(self, key: PublicKey) -> set[PublicKey]:
        """Forget what a peer claims; return the others to be judged again."""
        prefixes = self._prefixes.get(key)
        if prefixes is None:
            return set()
        affected = set(self._neighbours(key))
        del self._prefixes[key]
        self._exempt.discard(key)
        for prefix in prefixes:
            if self._disown(prefix, key):
                size = len(prefix.packed)
                ordered = self._ordered[size]
                del ordered[bisect_left(ordered, prefix)]
                self._lengths[size][prefix.length] -= 1
                if not self._lengths[size][prefix.length]:
                    del self._lengths[size][prefix.length]
        return affected

    def contested(self, key: PublicKey) -> bool:
        """Whether another peer claims one of this peer's prefixes."""
        return any(True for _ in self._neighbours(key))

    def neighbours(self, key: PublicKey) -> set[PublicKey]:
        """Return the peers that contest a prefix with this one."""
        return set(self._neighbours(key))

    def all_contested(self) -> set[PublicKey]:
        """Return the peers of which ``contested`` is true, by one walk over everything."""
        found: set[PublicKey] = set()
        for held in self._owners.values():
            if isinstance(held, frozenset):
                found |= held
        for size, ordered in self._ordered.items():
            # Prefixes of one length do not contain each other.
            if len(self._lengths[size]) > 1:
                found.update(self._nested(ordered, size * 8))
        return found

    def _nested(self, ordered: list[Prefix], bits: int) -> Iterator[PublicKey]:
        """Yield the peers that must do MFA of which one's prefix contains another's.

        In their order a prefix stands right behind all those that contain it.
        """
        around: list[tuple[int, frozenset[PublicKey]]] = []
        for prefix in ordered:
            held = self._owners[prefix]
            inner = (held if isinstance(held, frozenset) else frozenset({held})) - self._exempt
            if not inner:
                continue
            first = int.from_bytes(prefix.packed, "big")
            while around and around[-1][0] < first:
                around.pop()
            for _, outer in around:
                yield from (key for key in outer if inner != {key})
                yield from (key for key in inner if outer != {key})
            around.append((first | ((1 << (bits - prefix.length)) - 1), inner))

    def _own(self, prefix: Prefix, key: PublicKey) -> bool:
        held = self._owners.get(prefix)
        if held is None:
            self._owners[prefix] = key
            return True
        if held == key:
            return False
        self._owners[prefix] = (held if isinstance(held, frozenset) else frozenset({held})) | {key}
        return False

    def _disown(self, prefix: Prefix, key: PublicKey) -> bool:
        held = self._owners.get(prefix)
        if held == key:
            del self._owners[prefix]
            return True
        if not isinstance(held, frozenset):
            return False
        rest = held - {key}
        self._owners[prefix] = rest if len(rest) > 1 else next(iter(rest))
        return False

    def _others(self, prefix: Prefix, key: PublicKey) -> Iterator[PublicKey]:
        held = self._owners.get(prefix)
        if isinstance(held, frozenset):
            yield from (k for k in held if k != key)
        elif held is not None and held != key:
            yield held

    def _neighbours(self, key: PublicKey) -> Iterator[PublicKey]:
        """Yield the peers that contest a prefix with this one."""
        must_do_mfa = key not in self._exempt
        for prefix in self._prefixes.get(key, ()):
            yield from self._others(prefix, key)
            if must_do_mfa:
                for related in self._containing(prefix):
                    yield from (k for k in self._others(related, key) if k not in self._exempt)
                for related in self._contained(prefix):
                    yield from (k for k in self._others(related, key) if k not in self._exempt)

    def _containing(self, prefix: Prefix) -> Iterator[Prefix]:
        size = len(prefix.packed)
        shorter = [length for length in self._lengths[size] if length < prefix.length]
        if not shorter:
            return
        number = int.from_bytes(prefix.packed, "big")
        for length in shorter:
            host_bits = size * 8 - length
            yield Prefix((number >> host_bits << host_bits).to_bytes(size, "big"), length)

    def _contained(self, prefix: Prefix) -> Iterator[Prefix]:
        size = len(prefix.packed)
        host_bits = size * 8 - prefix.length
        if not host_bits:
            return
        last = int.from_bytes(prefix.packed, "big") | ((1 << host_bits) - 1)
        ordered = self._ordered[size]
        first = bisect_right(ordered, prefix)
        end = bisect_right(ordered, Prefix(last.to_bytes(size, "big"), size * 8))
        # By index: a copy of the run would cost as much as the run is long, before the first look.
        for index in range(first, end):
            yield ordered[index]
