"""Carries a plan out: for whom in which order, over journal, guard and device (rules 11 and 15).

Who has to go leaves the device first, and then the guard. Whoever else is planned for is journalled, let
through by the guard and given to the device, in this order; of many, a portion at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

import structlog

from agent.books import Books
from agent.encoding import format_key
from agent.errors import DeviceError
from agent.model import Now, PublicKey, Refusal, RemovePeer
from agent.patience import Patience
from agent.plan import Plan, make_plan
from agent.removals import Removals
from agent.state import State
from agent.warden import Warden
from agent.writer import SLICE, Writer

_log = structlog.get_logger(__name__)

_DEVICE: Final = "the interface"

Between = Callable[[], Awaitable[bool]]
"""Awaited between the slices of a long plan; once it returns False the rest is planned anew."""


class Rollout:
    """Plans for who is dirty, and carries that out; whoever moves meanwhile is dirty again."""

    def __init__(
        self,
        *,
        state: State,
        writer: Writer,
        removals: Removals,
        books: Books,
        read_clock: Callable[[], Now],
        patience: Patience,
        warden: Warden | None,
    ) -> None:
        self.added_early = False
        """Whether anybody was added before core's first state."""
        self._state = state
        self._writer = writer
        self._removals = removals
        self._books = books
        self._clock = read_clock
        self._patience = patience
        self._warden = warden

    async def carry_out(self, between: Between, *, one_by_one: bool) -> bool:
        """Plan for the dirty peers and carry it out; return whether there was anything to do.

        ``one_by_one``: each by itself, so that whom the device refuses holds back no other. Raises
        DeviceError.
        """
        state, writer, removals = self._state, self._writer, self._removals
        removals.raise_what_was_left()
        if self._warden is not None:
            await self._warden.before_removes(writer.mirror.peers)
        now = self._clock()
        state.tick(now)
        dirty, state.dirty = state.dirty - removals.stuck, set()
        plan = make_plan(((key, state.wanted(key, now)) for key in dirty), writer.mirror)
        for key in plan.adopted:
            state.adopted(key, now)
        try:
            if plan.removes:
                # Who has to go does not wait for the disk that the others' sessions are journalled on.
                going, plan = replace(plan, updates=(), adds=()), replace(plan, removes=())
                if not await self._remove(going, dirty, between, one_by_one=one_by_one):
                    state.dirty |= dirty
                    return True
            self.added_early |= bool(plan.adds) and state.epoch is None
            portions = [plan] if one_by_one else plan.portions(SLICE, self._journal_order)
            if self._warden is None or len(portions) == 1:
                followed = await self._bring(portions, dirty, between, one_by_one=one_by_one)
            else:
                async with self._warden.long_plan():
                    followed = await self._bring(portions, dirty, between, one_by_one=False)
            if followed is None:
                state.dirty |= dirty
                return False
            if self._warden is not None:
                await self._warden.after_kernel(followed - state.dirty, self._clock())
        except BaseException as error:
            state.dirty |= dirty
            if isinstance(error, DeviceError) and self._warden is not None:
                # Whoever has to go and can't be taken off the interface is let through no longer.
                await self._warden.after_kernel(dirty, self._clock(), judged=False)
            raise
        return bool(plan)

    async def _bring(
        self, portions: Sequence[Plan], dirty: set[PublicKey], between: Between, *, one_by_one: bool
    ) -> set[PublicKey] | None:
        """Carry out updates and adds, each once it is journalled and let through; return who has followed.

        That is None if somebody could not be, and is refused: all are planned anew then. Of many the device
        takes one portion while the next is journalled and let through (``cold_sync_10k``).
        """
        state, writer = self._state, self._writer
        later = {write.public_key for portion in portions[1:] for write in portion}
        keys, refused = dirty - later, False
        moved: set[PublicKey] = set()
        under_way: asyncio.Task[None] | None = None
        try:
            for number, whole in enumerate(portions):
                portion = whole
                if number:
                    keys = {write.public_key for write in portion}
                now = self._clock()
                for add in portion.adds:
                    state.added(add.public_key, now)
                whose = keys if number else (state.to_journal.keys() - later if later else None)
                unjournalled = await self._books.before_kernel(whose)
                unguarded = (
                    [] if self._warden is None else await self._warden.before_kernel(keys, self._clock())
                )
                # Whom core has not listed yet can't be refused: that peer is left as it was found.
                unguarded = [key for key in unguarded if key in state.roster.peers]
                if under_way is not None:
                    await self._patience.wait_for(_DEVICE, under_way)
                    under_way = None
                if number:
                    await asyncio.sleep(0)
                    if not await between():
                        state.dirty |= dirty
                        break
                moved |= state.dirty & dirty
                if moved:
                    # Meanwhile some of them had to go, or were given something else: they are planned anew.
                    portion, moved = portion.without(moved, writer.mirror)
                    state.dirty |= moved
                    unjournalled = [key for key in unjournalled if key not in moved]
                    unguarded = [key for key in unguarded if key not in moved]
                state.block(unjournalled, Refusal.NOT_JOURNALLED)
                state.block(unguarded, Refusal.NOT_GUARDED)
                refused |= bool(unjournalled or unguarded)
                if unjournalled:
                    # Those of later portions among them: the disk is not to be had for them either.
                    break
                if refused:
                    continue
                if one_by_one:
                    await self._one_by_one(portion, dirty, between)
                elif number < len(portions) - 1:
                    under_way = asyncio.create_task(writer.apply(tuple(portion), portion.tenures))
                elif not await writer.carry_out(portion, between):
                    state.dirty |= dirty
        finally:
            if under_way is not None:
                await asyncio.gather(under_way, return_exceptions=True)
        return None if refused else dirty - moved

    def _journal_order(self, key: PublicKey) -> str:
        """What the journal sorts its rows by: a portion then fills pages of its own."""
        session = self._state.sessions.get(key)
        return "" if session is None else session.id

    async def _remove(self, plan: Plan, dirty: set[PublicKey], between: Between, *, one_by_one: bool) -> bool:
        """Carry out a plan that only removes; False if all the rest is to be planned anew."""
        removals = self._removals
        removals.going = {remove.public_key for remove in plan.removes}
        try:
            if not one_by_one:
                return await self._writer.carry_out(plan, between)
            await self._one_by_one(plan, dirty, between)
            if self._warden is not None:
                # Whoever could not be removed is let through no longer.
                await self._warden.after_kernel(removals.going, self._clock(), judged=False)
            return False
        finally:
            removals.going = set()

    async def _one_by_one(self, plan: Plan, dirty: set[PublicKey], between: Between) -> None:
        failed, finished = await self._writer.one_by_one(plan, between)
        if not finished:
            self._state.dirty |= dirty
        if not failed:
            return
        for key, (operation, error) in failed.items():
            what = type(operation).__name__
            _log.error("the device refuses a peer", peer=format_key(key), operation=what, error=str(error))
        # The next look at the interface gives them another chance; until then they are kept off it.
        stuck = self._removals.stuck
        stuck.update(key for key, (operation, _) in failed.items() if isinstance(operation, RemovePeer))
        self._state.block(failed, Refusal.DEVICE)
        self._state.dirty.update(failed)
        # What of a refused operation was done is not known.
        again = await self._writer.read_again()
        self._state.dirty |= again
        self._state.dirty -= stuck
