"""The kernel's own guard as values: whom it admits and for how long, what it holds, what to repair.

The guard is the nftables table that ends sessions without the agent's help (rules 11 to 13). Here is
what can be said about it without touching it; ``agent.firewall`` puts it in force.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from agent.model import Prefix, PublicKey

TOLERANCE: Final = 2.0
"""Seconds by which an element's life may differ from its session's: reading takes time, the kernel's
timers count in ticks of up to 10 ms, and the agent looks at its deadlines once a second."""

SLEEP: Final = 0.25
"""Seconds of suspend after which all elements are written anew; two clocks are never read at once."""


class Admission(NamedTuple):
    """A peer that the guard lets through.

    ``remaining`` is its session's life in seconds; None for a peer that needs no session. ``fresh``: the
    table has nothing of these prefixes, which costs a third as much to write (``cold_sync_10k``).
    """

    prefixes: tuple[Prefix, ...]
    remaining: float | None
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class GuardContents:
    """What our table holds.

    ``elements`` maps each admitted prefix to its remaining seconds (infinity for one that would never
    expire where it should) or to None in an exempt peer's place. ``barred`` are the prefixes that only
    a session admits, even inside an exempt peer's wider prefix. ``lease`` is the lease's remaining
    seconds, None without one; ``lease_demanded`` whether the chains look at it. ``faults`` say in words
    what of the table itself (sets, chains, rules, the hook on the link) is missing or not ours.
    ``spread``: a remaining time may be so many seconds more than is said here, since reading took them.
    """

    elements: dict[Prefix, float | None]
    barred: frozenset[Prefix] = frozenset()
    lease: float | None = None
    lease_demanded: bool = True
    faults: tuple[str, ...] = ()
    spread: float = 0.0

    def read_over(self, seconds: float) -> GuardContents:
        """Return the contents as of now, where the kernel was asked ``seconds`` ago, or since then."""
        elements = {
            prefix: None if left is None else max(0.0, left - seconds)
            for prefix, left in self.elements.items()
        }
        lease = None if self.lease is None else max(0.0, self.lease - seconds)
        return replace(self, elements=elements, lease=lease, spread=seconds)

    def of(self, prefixes: Iterable[Prefix]) -> GuardContents:
        """Return what there is of these prefixes; the table itself counts as whole."""
        own = tuple(prefixes)
        elements = {prefix: self.elements[prefix] for prefix in own if prefix in self.elements}
        return GuardContents(elements, self.barred.intersection(own), spread=self.spread)

    def remaining(self, prefixes: Iterable[Prefix]) -> float:
        """Return for how many seconds the kernel will let all of these through as a session; 0 if not.

        An element that would never expire counts as none.
        """
        get = self.elements.get
        shortest = min([get(prefix) or 0.0 for prefix in prefixes], default=0.0)
        return shortest if math.isfinite(shortest) else 0.0

    def session_left(self, prefixes: Iterable[Prefix]) -> float | None:
        """Return how long the session of a peer with these prefixes lives on, as far as the table knows.

        In seconds, 0 for one that is over; None if the table knows of no session of theirs. This is an
        adopted peer's deadline where the journal was lost.
        """
        own = tuple(prefixes)
        return None if self.barred.isdisjoint(own) else self.remaining(own)


class GuardDrift(NamedTuple):
    """A difference that the agent did not make; ``public_key`` where it concerns one peer."""

    public_key: PublicKey | None
    detail: str


@dataclass(frozen=True, slots=True)
class Repair:
    """What makes the table right again, in this order; all empty if it is.

    ``rebuild``: raise the table (with everybody who is wanted). ``dismiss``: prefixes that nobody
    wanted has. ``admit``: peers to be written anew. ``drift`` says why, for the log and the metrics.
    """

    rebuild: bool = False
    dismiss: tuple[Prefix, ...] = ()
    admit: Mapping[PublicKey, Admission] = field(default_factory=dict)
    drift: tuple[GuardDrift, ...] = ()


def compare(
    wanted: Mapping[PublicKey, Admission], contents: GuardContents | None, *, lease_demanded: bool
) -> Repair:
    """Return what turns ``contents`` (None: there is no table) into ``wanted``.

    ``remaining`` of both is judged as of the same moment, give or take ``TOLERANCE`` and the spread. A
    session that is over before that need not have an element any more; an element that outlives its
    session has drifted, however it came to that.
    """
    if contents is None:
        return Repair(True, (), wanted, (GuardDrift(None, "the nftables table is gone"),))
    drift = [GuardDrift(None, fault) for fault in contents.faults]
    rebuild = bool(drift) or contents.lease_demanded != lease_demanded
    if not drift and rebuild:
        drift.append(GuardDrift(None, "the chains and the configuration differ about the agent's lease"))
    admit: dict[PublicKey, Admission] = {}
    mine: set[Prefix] = set()
    for key, admission in wanted.items():
        mine.update(admission.prefixes)
        for prefix in admission.prefixes:
            if (fault := _difference(prefix, admission.remaining, contents)) is not None:
                admit[key] = admission
                drift.append(GuardDrift(key, f"{prefix} {fault}"))
    foreign = [prefix for prefix in contents.elements if prefix not in mine]
    drift += [GuardDrift(None, f"{prefix} was let through, and belongs to nobody") for prefix in foreign]
    left_over = [p for p in contents.barred if p not in mine and p not in contents.elements]
    return Repair(rebuild, (*foreign, *left_over), admit, tuple(drift))


_ABSENT: Final = -1.0


def _difference(prefix: Prefix, wanted: float | None, contents: GuardContents) -> str | None:
    held = contents.elements.get(prefix, _ABSENT)
    if wanted is None:
        if held is not None:
            return "of a peer that needs no session is not let through for good"
        return "of a peer that needs no session is barred" if prefix in contents.barred else None
    if held is None:
        return "of a session is let through for good"
    if held == _ABSENT:
        return "of a live session is not let through" if wanted > TOLERANCE else None
    if held > wanted + TOLERANCE:
        return f"is let through for {held - wanted:.0f} s longer than its session lives"
    if held + contents.spread < wanted - TOLERANCE:
        return f"is let through for {wanted - held:.0f} s less than its session lives"
    return None if prefix in contents.barred else "of a session is not barred without one"


def slept_since(offset: float, boot: float, monotonic: float) -> bool:
    """Whether the host slept so long since the elements were written that all must be written anew.

    nftables' timers stand still during suspend, as CLOCK_MONOTONIC does; deadlines are in boot time,
    which does not. ``offset`` is ``boot - monotonic`` when all elements were last right.
    """
    return boot - monotonic - offset > SLEEP
