"""The guard's table as it stands in the kernel: read, judged whole or not, put right, replaced.

Its elements are changed, it is not rebuilt while anybody uses it: replacing a table loses packets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from agent import clock, nftlist, ruleset
from agent.errors import GuardDrifted
from agent.guard import GuardContents
from agent.nft import NftError
from agent.nftelements import CATCH_ALL, ElementChange
from agent.nftlist import Listing
from agent.owntable import OwnTable


class NftGuardTable:
    """The table, and what is known of it without asking: which sets it has, and whether it is leased.

    All of it blocks and raises GuardError. ``lease`` is in seconds from now, None or 0 for none: sessions'
    traffic then passes for good.
    """

    def __init__(self, interface: str, table: OwnTable) -> None:
        self.interface = interface
        self._table = table
        self._sets: frozenset[ruleset.PrefixSet] | None = None
        self._leased = True

    def listing(self) -> Listing | None:
        """Return the table as it is, None without one."""
        return self._table.listing()

    def read(self) -> GuardContents | None:
        """Return what it holds as of now, None without a table."""
        began = clock.monotonic()
        listing = self.listing()
        if listing is None:
            self._sets = None
            return None
        self._remember(listing)
        names = [*map(str, listing.sets), *([ruleset.LEASE_SET] if listing.has_lease else [])]
        elements = {name: self._table.read(name) for name in names}
        open_ = [name for name, held in elements.items() if CATCH_ALL in held]
        for name in open_:
            # It is no prefix of ours, and lets everything through: it is not to wait for a repair.
            del elements[name][CATCH_ALL]
            self._table.run(f"delete element {self._table.address} {name} {{ * }}")
        contents = listing.contents(self.interface, elements)
        if open_:
            said = (f"the set {name} had an element for everything" for name in open_)
            contents = replace(contents, faults=(*contents.faults, *said))
        return contents.read_over(clock.monotonic() - began)

    def known(self) -> frozenset[ruleset.PrefixSet]:
        """Return the table's sets; asks the kernel if they are not known."""
        return self.check() if self._sets is None else self._sets

    def check(self) -> frozenset[ruleset.PrefixSet]:
        """Return the sets of a table that is whole; raises GuardDrifted if it is not."""
        self._sets = None
        listing = self.listing()
        if listing is None:
            faults = ["it is gone"]
        else:
            sets = self._remember(listing)
            faults = listing.faults(self.interface, leased=self._leased)
            if not faults:
                return sets
        self._sets = None
        raise GuardDrifted(
            f"the table {self._table.address} is not whole: {faults[0]}", "the agent raises it again"
        )

    def looks_whole(self) -> bool:
        """Whether there is a table that was whole when it was last looked at."""
        return self._sets is not None

    def lay(self, lease: float | None) -> None:
        """Make a table that is not there, with its sets of single hosts; it judges nothing yet."""
        self._table.run(ruleset.create_sets(self.interface, ruleset.ALWAYS))
        self._sets, self._leased = ruleset.ALWAYS, bool(lease)
        self._table.write(self._renewal(lease))

    def hook_in(self) -> None:
        """Have a table that was laid judge from now on, by all sets that it has."""
        self._table.run(ruleset.create_chains(self.interface, self.known(), leased=self._leased))

    def put_right(self, held: Listing, lease: float | None) -> None:
        """Have a table that is there whole, and renew the lease; its sets must not be broken."""
        leased = bool(lease)
        self._remember(held)
        if held.faults(self.interface, leased=leased):
            sets = ruleset.ALWAYS | held.sets
            self._mend(held, sets, lease)
            self._sets = sets
        else:
            self._table.write(self._renewal(lease))
        self._leased = leased

    def replace(self, step: ruleset.Admit, lease: float | None) -> None:
        """Put a new table with these peers in the place of the one that is there, in one transaction.

        ``step`` is what admits them to a table with ``ruleset.ALWAYS``.
        """
        leased = bool(lease)
        commands = [
            f"delete table {self._table.address}",
            *ruleset.create(self.interface, ruleset.ALWAYS, leased=leased),
            *ruleset.as_commands(self.interface, self._renewal(lease)),
            *step.commands,
            *ruleset.as_commands(self.interface, step.changes),
        ]
        self._table.run(commands)
        self._sets, self._leased = step.sets, leased

    def take_in(self, step: ruleset.Admit, *, hooked: bool) -> None:
        """Admit the peers of ``step``, which is for the sets that are known; NftError if nft refuses.

        ``hooked``: whether the table has its chains, or was only laid.
        """
        commands = step.commands if hooked else [c for c in step.commands if c.startswith("add set ")]
        self._table.run(commands)
        self._sets = step.sets
        self.write(step.changes)

    def write(self, changes: Sequence[ElementChange]) -> None:
        """Change elements in one transaction; NftError if nft refuses."""
        self._table.write(changes)

    def renew(self, lease: float | None) -> None:
        """Renew the lease, and have the chains look at one or not."""
        self.known()
        leased = bool(lease)
        renewal = self._renewal(lease)
        try:
            if leased == self._leased:
                self.write(renewal)
                return
        except NftError:
            self.check()
            raise
        listing = self.listing()
        if listing is None:
            self.check()
            return
        self._mend(listing, listing.sets, lease)
        self._leased = leased

    def lower(self) -> bool:
        """Remove the table; return whether it was there."""
        listing = self.listing()
        self._sets = None
        if listing is None:
            return False
        name = self._table.address
        self._table.run([f"add table {name}", f"delete table {name}"])
        return True

    def _remember(self, listing: Listing) -> frozenset[ruleset.PrefixSet]:
        self._sets = sets = frozenset(listing.sets)
        leased = listing.leased(self.interface)
        if leased is not None:
            self._leased = leased
        return sets

    def _renewal(self, lease: float | None) -> list[ElementChange]:
        return ruleset.renew(self.interface, lease) if lease else []

    def _mend(self, held: Listing, sets: Iterable[ruleset.PrefixSet], lease: float | None) -> None:
        commands = nftlist.mend(self.interface, held, sets, leased=bool(lease))
        self._table.run([*commands, *ruleset.as_commands(self.interface, self._renewal(lease))])
