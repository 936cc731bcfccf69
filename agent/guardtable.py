"""The guard's nftables table as the agent has it: found, raised, written to and taken down.

Whatever is asked of nftables is asked here; what has become of it goes to ``agent.admitted``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Final, TypeVar

import structlog

from agent import clock
from agent.admitted import Admitted
from agent.errors import GuardError
from agent.guard import TOLERANCE, Admission, GuardContents, slept_since
from agent.model import Now, Prefix, PublicKey
from agent.patience import Patience
from agent.ports import Guard

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

RAISE_EVERY: Final = 5.0
"""Seconds between two attempts at a table that could not be made: each is work over all peers."""


class GuardTable:
    """The table of one guard; for one task only. What it is asked for raises GuardError.

    ``lease`` in seconds, 0 for none.
    """

    def __init__(self, guard: Guard, admitted: Admitted, read_clock: Callable[[], Now], lease: float) -> None:
        self.lease = lease
        self.up = False
        """Whether the table is in force, as far as is known."""
        self.left_over = False
        """Whether there may be a table of an earlier life that was not taken over."""
        self.unread = False
        """Whether that is not known, since it could not be read."""
        self.failed: GuardError | None = None
        """Why the table could not be made, or taken down, at the last attempt."""
        self.patience = Patience()
        """What the guard is waited for with: the state may move meanwhile."""
        self.busy = False
        """Whether the guard is waited for right now: it is not to be asked anything else."""
        self._guard = guard
        self._admitted = admitted
        self._clock = read_clock
        self._failed_at = 0.0
        self._offset = 0.0
        self._wall_offset = 0.0
        """Wall clock less boot time when all elements were last right."""

    @property
    def hopeless(self) -> bool:
        """Whether the table could not be made just now, and need not be tried at each change."""
        return self.failed is not None and clock.monotonic() - self._failed_at < RAISE_EVERY

    async def find(self) -> GuardContents | None:
        """See whether an earlier life has left a table, and return what it holds."""
        try:
            contents = await self.read()
        except GuardError as error:
            _log.warning("the guard can't be read", error=str(error))
            self.left_over = self._admitted.untidy = self.unread = True
            return None
        self.left_over = self._admitted.untidy = contents is not None
        return contents

    async def read(self) -> GuardContents | None:
        """What the table holds now, None if there is none."""
        return await self._ask(self._guard.read())

    def untouched(self) -> bool:
        """Whether nobody else has changed the table since it was last read."""
        return self._guard.untouched()

    def link_made(self) -> None:
        """The link was made anew: the chain at its ingress hook went with the old one."""
        self._admitted.lose_link()
        self.up, self.failed = False, None

    async def raise_(self, whom: Collection[PublicKey] | None = None) -> Mapping[PublicKey, str]:
        """Have the table, with everybody in it or, of everybody, these; return who could not be let in."""
        admitted = self._admitted
        everybody = admitted.everybody()
        keys = everybody if whom is None else [key for key in everybody if key in whom]
        admissions = admitted.admissions(keys, self._clock())
        if whom is not None:
            admitted.keep_only(admissions)
        held = admitted.as_held(admissions)
        there = admitted.already_there(held)
        try:
            refused = await self._ask(self._guard.raise_(admissions, self.lease or None, there))
        except GuardError as error:
            self._failed_now(error)
            raise
        self.failed = None
        if not self.up:
            _log.info("guard in force")
        self.up, self.left_over = True, False
        self._note_offsets(self._clock())
        admitted.take(held, refused)
        return refused

    async def admit(self, admissions: dict[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        """Write these peers' elements, whoever had their prefixes; return who could not be let in."""
        if not admissions:
            return {}
        admitted = self._admitted
        moved = admitted.moving(admissions)
        if moved:
            await self.dismiss(moved)
            admitted.moved(moved)
            # That took a while, and the guard counts sessions' lives from when it is asked.
            admissions = admitted.admissions(admissions, self._clock())
        held = admitted.as_held(admissions)
        refused = await self._ask(self._guard.admit(admissions))
        admitted.take(held, refused)
        return refused

    async def dismiss(self, prefixes: Iterable[Prefix]) -> None:
        """Remove what there is of these prefixes."""
        await self._ask(self._guard.dismiss(prefixes))

    async def lower(self) -> None:
        """Take the table down."""
        try:
            await self._ask(self._guard.lower())
        except GuardError as error:
            self._failed_now(error)
            raise
        self.up = self.left_over = False
        self._admitted.forget()

    async def renew(self, now: Now) -> None:
        """Renew the agent's lease, and write all elements anew after a suspend or a step of the clock."""
        await self._ask(self._guard.renew_lease(self.lease or None))
        stepped = abs(now.wall - now.boot - self._wall_offset) > TOLERANCE
        if self.up and (stepped or slept_since(self._offset, now.boot, clock.monotonic())):
            self._note_offsets(now)
            await self.admit(self._admitted.admissions(self._admitted.everybody(), now))

    def mute(self) -> None:
        """Hear nothing of changes until ``unmute``: a long change of our own begins."""
        self._guard.mute()

    async def unmute(self) -> None:
        """It is over; raises GuardDrifted if the table is not whole any more."""
        await self._ask(self._guard.unmute())

    async def disturbed(self) -> None:
        """Return once the table was changed, perhaps by us."""
        await self._guard.disturbed()

    def close(self) -> None:
        """Let go of nftables; the table stays."""
        self._guard.close()

    def _failed_now(self, error: GuardError) -> None:
        self.failed, self._failed_at = error, clock.monotonic()

    def _note_offsets(self, now: Now) -> None:
        self._offset = now.boot - clock.monotonic()
        self._wall_offset = now.wall - now.boot

    async def _ask(self, work: Awaitable[_T]) -> _T:
        self.busy = True
        try:
            return await self.patience.wait_for("nftables", work)
        except GuardError:
            # Of several transactions some may be in force.
            self._admitted.untidy = True
            raise
        finally:
            self.busy = False
