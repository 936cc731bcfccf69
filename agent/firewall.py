"""The kernel's own guard in force: one nftables table of ours for the interface (rules 11 to 13).

Inbound packets are judged at the link's ingress hook, where no flowtable passes by, outbound ones in
postrouting; what is admitted stands in sets, and a session's element carries the session's remaining
life, so that the kernel ends it whatever becomes of the agent. Elements are changed, the table is not
rebuilt while anybody uses it: replacing a table loses packets.

All work is done in one worker thread, one call after another. A call is one transaction, or several where
there are so many elements that the last would be written late.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple, TypeVar

from agent import clock, nftlist, ruleset
from agent.errors import GuardDrifted, GuardError
from agent.guard import Admission, GuardContents
from agent.model import Prefix, PublicKey
from agent.nft import INSTALL, Nft, NftError, Worker, open_nft
from agent.nftelements import CATCH_ALL, ElementChange
from agent.nftlist import Listing
from agent.nftwatch import Watch

T = TypeVar("T")

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
_LOUD: Final = 300
"""Elements from which on writing takes ten times as long while the kernel has to tell us of each."""
_ADDRESS_SIZES: Final = (4, 16)
_HOPELESS: Final = 100
"""Refusals one by one, without a single success, after which the rest need not be tried."""


class Lack(NamedTuple):
    """Something that the guard needs and this host has not: what it is, and what to do."""

    message: str
    hint: str


class Firewall:
    """The ``Guard`` of ``agent.ports``, over nftables; every method raises GuardError.

    ``nft`` is for tests; by default it is libnftables or else the program, found at the first use.
    """

    def __init__(self, interface: str, nft: Nft | None = None) -> None:
        self._interface = interface
        self._nft = nft
        self._worker = Worker()
        self._sets: frozenset[ruleset.PrefixSet] | None = None
        self._leased = True
        self._batch = _BATCH
        self._watch: Watch | None = None
        self._muted: contextlib.ExitStack | None = None

    async def read(self) -> GuardContents | None:
        """Return what our table holds now, None if there is no table."""
        if self._watch is not None:
            self._watch.listen()
            self._watch.touched = False
        return await self._do(self._read)

    def untouched(self) -> bool:
        """Whether the table is as it was last read, but for what was changed here since."""
        return self._watch is not None and self._watch.untouched

    def mute(self) -> None:
        """Hear nothing of changes until ``unmute``, which sees whether the table was left alone.

        The kernel would tell of each element, and each telling be read (``cold_sync_10k``).
        """
        if self._watch is not None and self._muted is None:
            self._muted = contextlib.ExitStack()
            self._muted.enter_context(self._watch.deaf())

    async def unmute(self) -> None:
        """Hear of changes again, if muted; raises GuardDrifted if the table is not whole."""
        if self._muted is None:
            return
        self._muted.close()
        self._muted = None
        if self._sets is not None:
            await self._do(self._check)

    async def raise_(
        self,
        admissions: Mapping[PublicKey, Admission],
        lease: float | None,
        there: Collection[PublicKey] = (),
    ) -> Mapping[PublicKey, str]:
        """Have the table, whole, and these peers admitted; return who could not be, and why.

        A table that is missing is made with them in it, in one transaction. One that is there keeps
        its elements; only what is missing or foreign in its chains and rules is put right, such as
        the hook on a link that was made again. ``there`` are peers whose elements need not be written
        to a table that is there. ``lease`` as for ``renew_lease``. The link must exist.
        Sessions' lives are taken as of the call, whenever their elements are written.
        """
        asked = clock.monotonic()
        return await self._do(lambda: self._raise(dict(admissions), lease, frozenset(there), asked))

    async def lower(self) -> bool:
        """Remove the table; return whether it was there."""
        return await self._do(self._lower)

    async def admit(self, admissions: Mapping[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        """Write these peers' elements, new or not; return who could not be admitted, and why.

        A peer that needs a session is barred without one from here on, whoever else's wider prefix
        its own lie in, until it is dismissed. One bad peer does not hold back the others. Sessions'
        lives are taken as of the call, whenever their elements are written.
        """
        asked = clock.monotonic()
        return await self._do(lambda: self._admit(dict(admissions), asked))

    async def dismiss(self, prefixes: Iterable[Prefix]) -> None:
        """Remove these prefixes' elements, whether they are there or not.

        Where a prefix passes from one peer to another, dismiss it before the new owner is admitted.
        """
        gone = tuple(prefixes)
        await self._do(lambda: self._dismiss(gone))

    async def renew_lease(self, seconds: float | None) -> None:
        """Let sessions' traffic pass for so many seconds from now; None or 0: for good."""
        await self._do(lambda: self._renew_lease(seconds))

    async def support(self) -> tuple[Lack, ...]:
        """Return what this host lacks for the guard; nothing is changed, the kernel is only asked."""
        return await self._do(self._support)

    async def flowtables(self) -> tuple[str, ...]:
        """Return the foreign flowtables that take in the interface, by family, table and name.

        Established flows that they carry pass by postrouting: what is sent to a peer whose session is
        over is then stopped by the peer's removal only. What it sends is stopped all the same.
        """
        return await self._do(lambda: nftlist.flowtables(self._run("list flowtables"), self._interface))

    async def disturbed(self) -> None:
        """Return once the table itself was changed since the last call, by whomever: time to read it.

        The first call subscribes. Foreign changes of single elements do not end it; ``untouched`` tells.
        """
        if self._watch is None:
            self._watch = Watch(ruleset.table_name(self._interface), self._own_port)
        await self._watch.changed()

    def close(self) -> None:
        """Let go of nftables; the table stays."""
        self._worker.close(self._nft)
        if self._muted is not None:
            self._muted.close()
            self._muted = None
        if self._watch is not None:
            self._watch.close()

    def _own_port(self) -> int | None:
        return None if self._nft is None else self._nft.port

    async def _do(self, work: Callable[[], T]) -> T:
        return await self._worker.do(work)

    # In the worker thread.

    def _open(self) -> Nft:
        if self._nft is None:
            self._nft = open_nft()
        return self._nft

    def _run(self, commands: Iterable[str] | str, *, dry_run: bool = False) -> str:
        text = commands if isinstance(commands, str) else "\n".join(commands)
        return self._open().run(f"{text}\n", dry_run=dry_run) if text else ""

    def _write(self, changes: Sequence[ElementChange]) -> None:
        self._open().write(ruleset.table_name(self._interface), changes)

    @contextlib.contextmanager
    def _quietly(self, elements: int) -> Iterator[None]:
        """Make no noise of so many elements in this block; whether the table is whole is seen afterwards."""
        if self._watch is None or self._muted is not None or elements < _LOUD:
            yield
            return
        with self._watch.deaf():
            yield
        self._check()

    def _list(self) -> Listing | None:
        """The table as it is, None without one; raises GuardError for one that is not ours.

        Asked for by name, nft fetches all elements of all tables (1.0.6), and an error tells nothing.
        """
        text = nftlist.own_table(self._run("list ruleset inet"), self._interface)
        if text is None:
            return None
        name = ruleset.table(self._interface)
        try:
            listing = nftlist.parse(text)
        except ValueError as error:
            raise GuardError(
                f"the table {name} can't be read: {error}", "report it with nft's version"
            ) from None
        if not listing.owned:
            raise GuardError(
                f"there is a table {name} that wg-agent did not make",
                f"rename it, or remove it by: nft delete table {name}",
            )
        return listing

    def _read(self) -> GuardContents | None:
        began = clock.monotonic()
        listing = self._list()
        if listing is None:
            self._sets = None
            return None
        self._remember(listing)
        nft, table = self._open(), ruleset.table_name(self._interface)
        names = [*map(str, listing.sets), *([ruleset.LEASE_SET] if listing.has_lease else [])]
        elements = {name: nft.read(table, name) for name in names}
        open_ = [name for name, held in elements.items() if CATCH_ALL in held]
        for name in open_:
            # It is no prefix of ours, and lets everything through: it is not to wait for a repair.
            del elements[name][CATCH_ALL]
            self._run(f"delete element {ruleset.table(self._interface)} {name} {{ * }}")
        contents = listing.contents(self._interface, elements)
        if open_:
            said = (f"the set {name} had an element for everything" for name in open_)
            contents = replace(contents, faults=(*contents.faults, *said))
        return contents.read_over(clock.monotonic() - began)

    def _remember(self, listing: Listing) -> frozenset[ruleset.PrefixSet]:
        self._sets = sets = frozenset(listing.sets)
        leased = listing.leased(self._interface)
        if leased is not None:
            self._leased = leased
        return sets

    def _known(self) -> frozenset[ruleset.PrefixSet]:
        """The table's sets; asks the kernel if they are not known."""
        return self._check() if self._sets is None else self._sets

    def _check(self) -> frozenset[ruleset.PrefixSet]:
        """Return the sets of a table that is whole; raises GuardDrifted if it is not."""
        self._sets = None
        listing = self._list()
        if listing is None:
            faults = ["it is gone"]
        else:
            sets = self._remember(listing)
            faults = listing.faults(self._interface, leased=self._leased)
            if not faults:
                return sets
        self._sets = None
        raise GuardDrifted(
            f"the table {ruleset.table(self._interface)} is not whole: {faults[0]}",
            "the agent raises it again",
        )

    def _raise(
        self,
        admissions: dict[PublicKey, Admission],
        lease: float | None,
        there: frozenset[PublicKey],
        asked: float,
    ) -> dict[PublicKey, str]:
        leased = bool(lease)
        renewal = ruleset.renew(self._interface, lease) if lease else []
        listing = self._list()
        if listing is None:
            return self._make(admissions, asked, renewal, leased=leased)
        if listing.broken_sets:
            return self._replace(admissions, asked, renewal, leased=leased)
        self._remember(listing)
        if listing.faults(self._interface, leased=leased):
            sets = ruleset.ALWAYS | listing.sets
            commands = nftlist.mend(self._interface, listing, sets, leased=leased)
            self._run([*commands, *ruleset.as_commands(self._interface, renewal)])
            self._sets = frozenset(sets)
        else:
            self._write(renewal)
        self._leased = leased
        return self._admit({key: a for key, a in admissions.items() if key not in there}, asked)

    def _make(
        self,
        admissions: dict[PublicKey, Admission],
        asked: float,
        renewal: list[ElementChange],
        *,
        leased: bool,
    ) -> dict[PublicKey, str]:
        """Make a table that is not there: sets first, then everybody in them, and the hooks last.

        So nobody is without an element at any time, however many there are.
        """
        with self._quietly(2 * len(admissions)):
            self._run(ruleset.create_sets(self._interface, ruleset.ALWAYS))
            self._sets, self._leased = ruleset.ALWAYS, leased
            self._write(renewal)
            refused = self._admit(admissions, asked, new_table=True)
            self._run(ruleset.create_chains(self._interface, self._known(), leased=leased))
        return refused

    def _replace(
        self,
        admissions: dict[PublicKey, Admission],
        asked: float,
        renewal: list[ElementChange],
        *,
        leased: bool,
    ) -> dict[PublicKey, str]:
        """Put a table in the place of one whose sets are not ours any more, in one transaction."""
        refused, usable = _sort_out(admissions)
        first = dict(list(usable.items())[:_WHOLE])
        start = [f"delete table {ruleset.table(self._interface)}"]
        start += ruleset.create(self._interface, ruleset.ALWAYS, leased=leased)
        start += ruleset.as_commands(self._interface, renewal)
        began = clock.monotonic()
        step = ruleset.admit(self._interface, first.values(), ruleset.ALWAYS, began - asked)
        sets = step.sets
        try:
            self._run([*start, *step.commands, *ruleset.as_commands(self._interface, step.changes)])
        except NftError:
            # A bad peer, or the table itself: which, is seen without the peers.
            self._run(start)
            first, sets = {}, ruleset.ALWAYS
        self._sets, self._leased = sets, leased
        if clock.monotonic() - began > _LATE:
            # They are in, and too long: nobody was to be without an element in the meantime.
            first = {}
        rest = {key: a._replace(fresh=False) for key, a in usable.items() if key not in first}
        return refused | self._admit(rest, asked)

    def _lower(self) -> bool:
        listing = self._list()
        self._sets = None
        if listing is None:
            return False
        name = ruleset.table(self._interface)
        self._run([f"add table {name}", f"delete table {name}"])
        return True

    def _admit(
        self, admissions: dict[PublicKey, Admission], asked: float, *, new_table: bool = False
    ) -> dict[PublicKey, str]:
        """Admit them in parts; a new table has no elements and no chains yet."""
        refused, usable = _sort_out(admissions)
        items = list(usable.items())
        done, empty = 0, new_table
        with self._quietly(0 if new_table else 2 * len(items)):
            while done < len(items):
                some = items[done : done + self._batch]
                began = clock.monotonic()
                failed = self._try(some, asked, hooked=not new_table, empty=empty)
                took = max(clock.monotonic() - began, 1e-6)
                if len(some) == self._batch or took > _LATE:
                    self._batch = min(max(int(len(some) * _PUNCTUAL / took), len(some) // 4, _LEAST), _BATCH)
                if took > _LATE and len(some) > self._batch and not failed:
                    items[done : done + len(some)] = [(key, a._replace(fresh=False)) for key, a in some]
                    empty = False
                    continue
                if took > _LATE and self._watch is not None:
                    # Some may be written too long: the next look has to see.
                    self._watch.touched = True
                refused |= failed
                done += len(some)
        return refused

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
            step = ruleset.admit(self._interface, (a for _, a in some), self._known(), late, empty=empty)
            try:
                self._run(step.commands if hooked else [c for c in step.commands if c.startswith("add set ")])
                self._sets = step.sets
                self._write(step.changes)
            except NftError as error:
                if hooked:
                    self._check()
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

    def _dismiss(self, prefixes: tuple[Prefix, ...]) -> None:
        for start in range(0, len(prefixes), _BATCH):
            some = prefixes[start : start + _BATCH]
            try:
                self._write(ruleset.dismiss(some, self._known()))
            except NftError:
                self._check()
                self._write(ruleset.dismiss(some, self._known()))

    def _renew_lease(self, seconds: float | None) -> None:
        self._known()
        leased = bool(seconds)
        renewal = ruleset.renew(self._interface, seconds) if seconds else []
        try:
            if leased == self._leased:
                self._write(renewal)
                return
        except NftError:
            self._check()
            raise
        listing = self._list()
        if listing is None:
            self._check()
            return
        commands = nftlist.mend(self._interface, listing, listing.sets, leased=leased)
        self._run([*commands, *ruleset.as_commands(self._interface, renewal)])
        self._leased = leased

    def _support(self) -> tuple[Lack, ...]:
        try:
            name = ruleset.table_name(self._interface)
            self._run("list tables")
        except ValueError as error:
            return (Lack(str(error), "give the interface another name, such as wg0"),)
        except NftError as error:
            return (_no_access(error),)
        except GuardError as error:
            return (Lack(error.message, error.hint),)
        names = {interface for _, interface in socket.if_nameindex()}
        device = self._interface if self._interface in names else "lo"
        trial = [
            line.replace(f"inet {name}", "inet wg_agent_trial").replace(
                f'device "{self._interface}"', f'device "{device}"'
            )
            for line in ruleset.create(self._interface, ruleset.ALWAYS, leased=True)
        ]
        try:
            self._run(trial, dry_run=True)
        except NftError as error:
            return tuple(self._lacking(device)) or (
                Lack(
                    f"the kernel refuses the guard's table ({error.message})",
                    f"run Linux 5.10 or newer; {INSTALL}",
                ),
            )
        return ()

    def _lacking(self, device: str) -> Iterable[Lack]:
        table = "inet wg_agent_trial"
        ingress = f'type filter hook ingress device "{device}" priority 0; policy drop;'
        parts: tuple[tuple[str, list[str], str], ...] = (
            (
                "tables of nftables",
                [],
                "the kernel needs CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET (modprobe nf_tables)",
            ),
            (
                "sets whose elements time out",
                [f"add set {table} s {{ type ipv4_addr; timeout 1s; }}"],
                "run Linux 5.10 or newer with nftables' hash sets (modprobe nf_tables)",
            ),
            (
                "inet chains at the ingress hook",
                [f"add chain {table} c {{ {ingress} }}"],
                "run Linux 5.10 or newer with CONFIG_NETFILTER_INGRESS",
            ),
            (
                "inet chains in postrouting",
                [f"add chain {table} c {{ type filter hook postrouting priority 0; }}"],
                "the kernel needs CONFIG_NF_TABLES_INET",
            ),
        )
        for what, commands, hint in parts:
            with contextlib.suppress(NftError):
                self._run([f"add table {table}", *commands], dry_run=True)
                continue
            yield Lack(f"the kernel has no {what}", hint)


def _no_access(error: NftError) -> Lack:
    if "permitted" in error.message or "denied" in error.message:
        return Lack(
            "no permission to use nftables: CAP_NET_ADMIN is missing",
            "run as root, or by the unit wg-agent@.service, which grants it; "
            "a container needs --cap-add NET_ADMIN",
        )
    return Lack(
        f"the kernel does not answer for nftables ({error.message})",
        "the kernel needs CONFIG_NF_TABLES (modprobe nf_tables)",
    )


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
