"""A guard in memory whose elements run out, as ``agent.ports.Guard`` says; it records and fails on demand."""

from collections.abc import Callable, Collection, Iterable, Mapping

import pytest

from agent.errors import GuardDrifted, GuardError
from agent.guard import Admission, GuardContents
from agent.model import Prefix, PublicKey
from tests.support.heard import Heard

SHORTEST = 0.01
"""Seconds of life below which a session is not admitted."""


class TimedGuard:
    """What outlives the agent's process, as the kernel's table does.

    ``clock`` is CLOCK_MONOTONIC, which elements live by. ``fails`` names the calls that raise
    GuardError, ``refuses`` the peers that can't be admitted; ``log`` takes what was done.
    """

    def __init__(self, clock: Callable[[], float], log: list[tuple[str, object]]) -> None:
        self.clock = clock
        self.log = log
        self.fails: Collection[str] = ()
        self.refuses: set[PublicKey] = set()
        self.up = False
        self.ends: dict[Prefix, float | None] = {}
        self.barred: set[Prefix] = set()
        self.lease_until: float | None = None
        self.lease_demanded = True
        self.faults: tuple[str, ...] = ()
        self.owners: dict[Prefix, PublicKey] = {}
        self.heard = Heard(lambda: (self.up, dict(self.ends), set(self.barred), self.faults))

    def left(self, prefix: Prefix) -> float | None:
        """Seconds for which a prefix is let through: None for good, 0 not at all."""
        end = self.ends.get(prefix, 0.0)
        return None if end is None else max(0.0, end - self.clock())

    def delete(self) -> None:
        """Somebody deletes the table."""
        self.up, self.lease_until = False, None
        self.ends.clear()
        self.barred.clear()
        self.owners.clear()

    def calls(self, verb: str) -> list[object]:
        """What was asked of the guard by this name so far."""
        return [what for kind, what in self.log if kind == f"guard: {verb}"]

    def mute(self) -> None:
        """It is heard all the same."""

    async def unmute(self) -> None:
        self._check("unmute", None)

    async def read(self) -> GuardContents | None:
        self._check("read", None, whole=False)
        self.heard.touched = False
        self.heard.after()
        if not self.up:
            return None
        lease = None if self.lease_until is None else max(0.0, self.lease_until - self.clock())
        elements = {prefix: left for prefix in self.ends if (left := self.left(prefix)) != 0.0}
        return GuardContents(elements, frozenset(self.barred), lease, self.lease_demanded, self.faults)

    def untouched(self) -> bool:
        self.heard.before()
        return not self.heard.touched

    async def raise_(
        self,
        admissions: Mapping[PublicKey, Admission],
        lease: float | None,
        there: Collection[PublicKey] = (),
    ) -> Mapping[PublicKey, str]:
        self._check("raise", sorted(admissions), whole=False)
        if self.up:
            for key in there:
                prefixes, remaining, _ = admissions[key]
                for prefix in prefixes:
                    held = self.left(prefix)
                    assert held == pytest.approx(remaining, abs=2.5), f"{prefix} is not as it is said to be"
                    assert (prefix in self.barred) == (remaining is not None)
            admissions = {key: a for key, a in admissions.items() if key not in there}
        self.up, self.faults = True, ()
        # Who owned what is not known of a table that is adopted.
        self.owners.clear()
        self._lease(lease)
        return self._write(admissions)

    async def lower(self) -> bool:
        self._check("lower", None, whole=False)
        was = self.up
        self.delete()
        self.heard.after()
        return was

    async def admit(self, admissions: Mapping[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        self._check("admit", sorted(admissions))
        return self._write(admissions)

    async def dismiss(self, prefixes: Iterable[Prefix]) -> None:
        gone = sorted(prefixes)
        self._check("dismiss", gone)
        for prefix in gone:
            self.ends.pop(prefix, None)
            self.barred.discard(prefix)
            self.owners.pop(prefix, None)
        self.heard.after()

    async def renew_lease(self, seconds: float | None) -> None:
        self._check("lease", seconds)
        self._lease(seconds)

    async def disturbed(self) -> None:
        raise AssertionError("the daemon's business")

    def close(self) -> None:
        self.log.append(("guard: close", None))

    def _check(self, verb: str, what: object, *, whole: bool = True) -> None:
        if verb in self.fails:
            self.log.append(("guard: failed", verb))
            raise GuardError("nftables fails", "mend it")
        if whole and not self.up:
            raise GuardDrifted("the table is not whole: it is gone", "the agent raises it again")
        self.log.append((f"guard: {verb}", what))
        self.heard.before()

    def _lease(self, seconds: float | None) -> None:
        self.lease_demanded = bool(seconds)
        self.lease_until = self.clock() + seconds if seconds else None

    def _write(self, admissions: Mapping[PublicKey, Admission]) -> dict[PublicKey, str]:
        refused = {key: "the kernel does not like it" for key in admissions if key in self.refuses}
        for key, (prefixes, remaining, fresh) in admissions.items():
            if key in refused:
                continue
            for prefix in prefixes:
                assert not (fresh and self.left(prefix) != 0), f"{prefix} is not fresh"
                assert not (fresh and prefix in self.barred), f"{prefix} is not fresh"
                assert self.owners.get(prefix, key) == key, f"{prefix} was not dismissed before it moved"
                self.owners[prefix] = key
                if remaining is None:
                    self.ends[prefix] = None
                    self.barred.discard(prefix)
                    continue
                self.barred.add(prefix)
                if remaining < SHORTEST:
                    refused[key] = "its session is over"
                    self.ends.pop(prefix, None)
                else:
                    self.ends[prefix] = self.clock() + remaining
        self.heard.after()
        return refused
