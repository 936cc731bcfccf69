"""The kernel's own guard in force: one nftables table of ours for the interface (rules 11 to 13).

Inbound packets are judged at the link's ingress hook, where no flowtable passes by, outbound ones in
postrouting; what is admitted stands in sets, and a session's element carries the session's remaining
life, so that the kernel ends it whatever becomes of the agent.

All work is done in one worker thread, one call after another. A call is one transaction, or several where
there are so many elements that the last would be written late.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial

from agent import clock, nftlist, ruleset
from agent.guard import Admission, GuardContents
from agent.guardtrial import Lack, Trial
from agent.guardwriter import GuardWriter
from agent.hearing import Hearing
from agent.model import Prefix, PublicKey
from agent.nft import Nft
from agent.nftguard import NftGuardTable
from agent.owntable import OwnTable


class Firewall:
    """The ``Guard`` of ``agent.ports``, over nftables; every method raises GuardError.

    ``nft`` is for tests; by default it is libnftables or else the program, found at the first use.
    """

    def __init__(self, interface: str, nft: Nft | None = None) -> None:
        self._interface = interface
        name = partial(ruleset.table_name, interface)
        self._own = OwnTable(name, nft)
        self._table = NftGuardTable(interface, self._own)
        self._hearing = Hearing(name, lambda: self._own.port)
        self._writer = GuardWriter(self._table, self._hearing)

    async def read(self) -> GuardContents | None:
        """Return what our table holds now, None if there is no table."""
        self._hearing.forget()
        return await self._own.do(self._table.read)

    def untouched(self) -> bool:
        """Whether the table is as it was last read, but for what was changed here since."""
        return self._hearing.untouched

    def mute(self) -> None:
        """Hear nothing of changes until ``unmute``, which sees whether the table was left alone."""
        self._hearing.mute()

    async def unmute(self) -> None:
        """Hear of changes again, if muted; raises GuardDrifted if the table is not whole."""
        if self._hearing.unmute() and self._table.looks_whole():
            await self._own.do(self._table.check)

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
        work = partial(self._writer.raise_, dict(admissions), lease, frozenset(there), asked)
        return await self._own.do(work)

    async def lower(self) -> bool:
        """Remove the table; return whether it was there."""
        return await self._own.do(self._table.lower)

    async def admit(self, admissions: Mapping[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        """Write these peers' elements, new or not; return who could not be admitted, and why.

        A peer that needs a session is barred without one from here on, whoever else's wider prefix
        its own lie in, until it is dismissed. One bad peer does not hold back the others. Sessions'
        lives are taken as of the call, whenever their elements are written.
        """
        asked = clock.monotonic()
        return await self._own.do(partial(self._writer.admit, dict(admissions), asked))

    async def dismiss(self, prefixes: Iterable[Prefix]) -> None:
        """Remove these prefixes' elements, whether they are there or not.

        Where a prefix passes from one peer to another, dismiss it before the new owner is admitted.
        """
        await self._own.do(partial(self._writer.dismiss, tuple(prefixes)))

    async def renew_lease(self, seconds: float | None) -> None:
        """Let sessions' traffic pass for so many seconds from now; None or 0: for good."""
        await self._own.do(partial(self._table.renew, seconds))

    async def support(self) -> tuple[Lack, ...]:
        """Return what this host lacks for the guard; nothing is changed, the kernel is only asked."""
        return await self._own.do(Trial(self._interface, self._own).lacks)

    async def flowtables(self) -> tuple[str, ...]:
        """Return the foreign flowtables that take in the interface, by family, table and name.

        Established flows that they carry pass by postrouting: what is sent to a peer whose session is
        over is then stopped by the peer's removal only. What it sends is stopped all the same.
        """
        listed = await self._own.do(partial(self._own.run, "list flowtables"))
        return nftlist.flowtables(listed, self._interface)

    async def disturbed(self) -> None:
        """Return once the table itself was changed since the last call, by whomever: time to read it.

        The first call subscribes. Foreign changes of single elements do not end it; ``untouched`` tells.
        """
        await self._hearing.disturbed()

    def close(self) -> None:
        """Let go of nftables; the table stays."""
        self._own.close()
        self._hearing.close()
