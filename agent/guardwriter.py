"""Peers written to the guard's table, in portions so small that no session's element comes too late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from agent import clock, ruleset
from agent.errors import GuardError
from agent.guard import Admission
from agent.hearing import Hearing
from agent.model import Prefix, PublicKey
from agent.nft import NftError
from agent.nftguard import NftGuardTable

_BATCH: Final = 500
"""Peers in one transaction at most. Within one the kernel's sets do not grow, and an element takes twenty
times as long in one of 10,000 (``cold_sync_10k``)."""
_WHOLE: Final = 10_000
"""Peers in the transaction that replaces a whole table."""
_LEAST: Final = 50
"""Peers in one at least, however slow the host."""
_PUNCTUAL: Final = 0.25
"""Seconds that one transaction is to take: a session's element is written so much too late at most."""
_LATE: Final = 0.5
"""Seconds after which what was written is written again, in smaller parts."""
_ADDRESS_SIZES: Final = (4, 16)
_HOPELESS: Final = 100
"""Refusals one by one, without a single success, after which the rest need not be tried."""


class Pace:
    """How many peers go into one transaction: as many as this host writes in time."""

    def __init__(self) -> None:
        self.portion = _BATCH

    def note(self, peers: int, took: float) -> None:
        """So many were written in so many seconds."""
        took = max(took, 1e-6)
        if peers == self.portion or took > _LATE:
            self.portion = min(max(int(peers * _PUNCTUAL / took), peers // 4, _LEAST), _BATCH)


class GuardWriter:
    """Writes and removes the elements of peers, and raises the table with them.

    Everything blocks and raises GuardError. ``asked`` is when sessions' lives were taken, in the seconds
    of ``clock.monotonic``. What is returned of peers is who could not be admitted, and why.
    """

    def __init__(self, table: NftGuardTable, hearing: Hearing) -> None:
        self._table = table
        self._hearing = hearing
        self._pace = Pace()

    def raise_(
        self,
        admissions: dict[PublicKey, Admission],
        lease: float | None,
        there: frozenset[PublicKey],
        asked: float,
    ) -> dict[PublicKey, str]:
        """Have the table whole and these peers in it; ``there`` need not be written if the table is."""
        listing = self._table.listing()
        if listing is None:
            return self._make(admissions, lease, asked)
        if listing.broken_sets:
            return self._replace(admissions, lease, asked)
        self._table.put_right(listing, lease)
        return self.admit({key: a for key, a in admissions.items() if key not in there}, asked)

    def admit(
        self, admissions: dict[PublicKey, Admission], asked: float, *, new_table: bool = False
    ) -> dict[PublicKey, str]:
        """Admit them in portions; a new table has no elements and no chains yet."""
        refused, usable = _sort_out(admissions)
        items = list(usable.items())
        done, empty = 0, new_table
        with self._hearing.quietly(0 if new_table else 2 * len(items), self._table.check):
            while done < len(items):
                some = items[done : done + self._pace.portion]
                began = clock.monotonic()
                failed = self._try(some, asked, hooked=not new_table, empty=empty)
                took = clock.monotonic() - began
                self._pace.note(len(some), took)
                if took > _LATE and len(some) > self._pace.portion and not failed:
                    items[done : done + len(some)] = [(key, a._replace(fresh=False)) for key, a in some]
                    empty = False
                    continue
                if took > _LATE:
                    # Some may be written too long.
                    self._hearing.doubt()
                refused |= failed
                done += len(some)
        return refused

    def dismiss(self, prefixes: tuple[Prefix, ...]) -> None:
        """Remove these prefixes' elements, whether they are there or not."""
        for start in range(0, len(prefixes), _BATCH):
            some = prefixes[start : start + _BATCH]
            try:
                self._table.write(ruleset.dismiss(some, self._table.known()))
            except NftError:
                self._table.check()
                self._table.write(ruleset.dismiss(some, self._table.known()))

    def _make(
        self, admissions: dict[PublicKey, Admission], lease: float | None, asked: float
    ) -> dict[PublicKey, str]:
        """Make a table that is not there: sets first, then everybody in them, and the hooks last.

        So nobody is without an element at any time, however many there are.
        """
        with self._hearing.quietly(2 * len(admissions), self._table.check):
            self._table.lay(lease)
            refused = self.admit(admissions, asked, new_table=True)
            self._table.hook_in()
        return refused

    def _replace(
        self, admissions: dict[PublicKey, Admission], lease: float | None, asked: float
    ) -> dict[PublicKey, str]:
        """Put a table in the place of one whose sets are not ours any more, in one transaction."""
        refused, usable = _sort_out(admissions)
        first = dict(list(usable.items())[:_WHOLE])
        began = clock.monotonic()
        interface = self._table.interface
        step = ruleset.admit(interface, first.values(), ruleset.ALWAYS, began - asked)
        try:
            self._table.replace(step, lease)
        except NftError:
            # A bad peer, or the table itself: which, is seen without the peers.
            self._table.replace(ruleset.admit(interface, (), ruleset.ALWAYS), lease)
            first = {}
        if clock.monotonic() - began > _LATE:
            # They are in, and too long: nobody was to be without an element in the meantime.
            first = {}
        rest = {key: a._replace(fresh=False) for key, a in usable.items() if key not in first}
        return refused | self.admit(rest, asked)

    def _try(
        self, admissions: list[tuple[PublicKey, Admission]], asked: float, *, hooked: bool, empty: bool
    ) -> dict[PublicKey, str]:
        """Admit them in one transaction, or in as few as it takes to leave out the bad ones.

        ``empty``: all of them are fresh.
        """
        refused: dict[PublicKey, str] = {}
        waiting, succeeded = [admissions], False
        while waiting:
            some = waiting.pop()
            late = clock.monotonic() - asked
            listed = (a for _, a in some)
            step = ruleset.admit(self._table.interface, listed, self._table.known(), late, empty=empty)
            try:
                self._table.take_in(step, hooked=hooked)
            except NftError as error:
                if hooked:
                    self._table.check()
                if len(some) > 1:
                    middle = len(some) // 2
                    waiting += [some[middle:], some[:middle]]
                else:
                    refused[some[0][0]] = error.message
                if not succeeded and len(refused) >= _HOPELESS:
                    raise GuardError(
                        f"no peer can be admitted: {error.message}", "look at the kernel's log and memory"
                    ) from None
            else:
                succeeded = True
        return refused


def _sort_out(
    admissions: Mapping[PublicKey, Admission],
) -> tuple[dict[PublicKey, str], dict[PublicKey, Admission]]:
    """Who can't be admitted whatever the kernel says, and why; and all whose elements are to be written.

    A session that is over is among both: its peer is barred from now on.
    """
    refused: dict[PublicKey, str] = {}
    misshapen: set[PublicKey] = set()
    for key, (prefixes, remaining, _) in admissions.items():
        if remaining is not None and not remaining >= ruleset.SHORTEST:
            refused[key] = "less than 10 ms of its session is left"
        for packed, length in prefixes:
            if not (0 <= length <= 8 * len(packed) and len(packed) in _ADDRESS_SIZES):
                refused[key] = "one of its prefixes is none"
                misshapen.add(key)
    return refused, {key: a for key, a in admissions.items() if key not in misshapen}
