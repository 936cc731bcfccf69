"""Keeps the interface as the state wants it: looks at it, plans, carries out, mends what fails.

Set messages are not transactional. After a failure the interface is read and planned for again, a
bounded number of rounds; then it goes peer by peer, so that one cannot hold back the others (rule 16).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import structlog

from agent import clock, overview
from agent.audit import Audit
from agent.books import Books
from agent.encoding import format_key
from agent.errors import DeviceError
from agent.guard import GuardContents
from agent.metrics import Metrics
from agent.model import (
    DesiredPeer,
    Identity,
    InterfaceAddress,
    InterfaceSettings,
    Now,
    ObservedDevice,
    PublicKey,
    Refusal,
    RemovePeer,
)
from agent.observed import forget
from agent.patience import Patience
from agent.plan import CUT, FOUND, Drift, DriftKind, Plan, make_plan
from agent.ports import Link
from agent.state import State
from agent.warden import Warden
from agent.writer import HANDFUL, OF_THE_INTERFACE, SLICE, Writer

_log = structlog.get_logger(__name__)

_RTNETLINK: Final = "the kernel's network configuration"
_DEVICE: Final = "the interface"

ROUNDS: Final = 3
"""Whole plans tried after failures, before it goes peer by peer."""
_ENOUGH: Final = 10
"""Plans carried out in a row, after which it is somebody else's turn: the state moves all the time."""

Between = Callable[[], Awaitable[bool]]
"""Awaited between the slices of a long plan; once it returns False the rest is planned anew."""


class Keeper:
    """The keeper of one interface; ``start`` it, then ``look`` and ``follow`` from one task only."""

    def __init__(
        self,
        *,
        state: State,
        link: Link,
        books: Books,
        audit: Audit,
        metrics: Metrics,
        read_clock: Callable[[], Now],
        patience: Patience,
        warden: Warden | None = None,
    ) -> None:
        self.writer = Writer(lambda: link.device, state.traffic.added)
        self.stuck: set[PublicKey] = set()
        """Peers that the device did not remove: tried again, each by itself, at each step."""
        self._told_faults: set[str] = set()
        self.link_fault: DeviceError | None = None
        """Why the link does not have its settings, if it does not."""
        self._state = state
        self._link = link
        self._books = books
        self._audit = audit
        self._metrics = metrics
        self._clock = read_clock
        self._patience = patience
        self._warden = warden
        self._settings: tuple[InterfaceSettings, Identity | None] | None = None
        self._made = False
        self._up = False
        self._dismantled = False
        """Whether the interface is not to be there: core has deleted this gateway."""
        self._behind = False
        self._added_early = False
        self._left: DeviceError | None = None
        """A failure amid something else, which the next plan has to begin with."""
        self._not_let_go: set[PublicKey] = set()
        """Whom the device did not remove then: that is not tried again before."""
        self._going: set[PublicKey] = set()
        """Who is being removed by the plan under way."""

    async def start(self) -> ObservedDevice:
        """Find or make the interface, and take over whom the restored state knows; what was found.

        An interface that was found is not touched while nobody has said what it should be like.
        """
        contents = None if self._warden is None else await self._warden.start()
        await self._ensure()
        await self._configure_link()
        device = await self._link.device.read()
        self.writer.mirror.find(device)
        left = {} if contents is None else _elements_left(device, contents)
        self._state.adopt(device, left, self._clock())
        if self._warden is not None and contents is not None and not self._made:
            self._warden.adopt(contents)
        changed = self._state.observe(device, self._clock())
        forget(device.peers)
        await self._books.observed(changed)
        return device

    def own(self, addresses: tuple[InterfaceAddress, ...]) -> None:
        """These addresses were put on the interface by the agent, in an earlier life."""
        self._link.addresses = addresses

    async def look(self) -> bool:
        """Read the interface and take in what has changed on it, by us or by somebody else.

        Returns whether there is traffic to report. Raises DeviceError.
        """
        with self._metrics.observation_seconds.time():
            return await self._look()

    async def _look(self) -> bool:
        if self._dismantled:
            return False
        try:
            device = await self._link.device.read()
        except DeviceError as error:
            if error.errno != errno.ENODEV:
                raise
            await self._make_interface_again(error)
            return False
        now = self._clock()
        drift, again = self.writer.mirror.observe(device)
        of_the_device = [] if self._settings is None else list(self._device_drift(device))
        self._note_drift(*(of_the_device if self._behind else (*drift, *of_the_device)))
        self._behind = False
        if of_the_device:
            # Perhaps another interface of this name, which is down.
            self._settings, self._up = None, False
        changed = self._state.observe(device, now)
        forget(device.peers)
        self._state.dirty |= again
        self._state.unblock(now)
        something_to_report = await self._books.observed(changed)
        closely = True
        try:
            # With another link the guard's chain at its hook has gone, of which nobody tells.
            closely = await self._look_at_link() or bool(of_the_device)
        finally:
            await self.look_at_guard(closely=closely)
        return something_to_report

    async def _look_at_link(self) -> bool:
        """Look for drift of the link; return whether there is any, or may be."""
        if self._settings is None:
            return True
        drift = await self._patience.wait_for(_RTNETLINK, self._link.drift())
        self._note_drift(*drift)
        if drift:
            self._settings, self._up = None, False
        return bool(drift)

    async def look_at_guard(self, *, closely: bool = False) -> None:
        """See whether somebody changed the kernel's own guard, and repair it; ``closely``: read it anyhow."""
        if self._warden is not None:
            await self._warden.look(closely=closely)
            self._note_guard_drift()

    async def tick(self) -> None:
        """Show the kernel that the agent is alive; not while the guard is waited for."""
        if self._warden is not None and not self._warden.busy:
            await self._warden.tick()
            self._note_guard_drift()

    async def before_first_state(self) -> None:
        """What was added before core's first state may have taken prefixes from peers left as found.

        Only a look shows it: the mirror does not follow prefixes from peer to peer. Raises DeviceError.
        """
        if self._added_early:
            await self.look()

    async def describe(self, interface: str) -> dict[str, Any]:
        """What ``follow`` would change on the interface as it is now. Raises DeviceError."""
        device = await self._link.device.read()
        described = overview.plan(interface, self._state, self.writer.mirror, device, self._clock())
        forget(device.peers)
        return described

    async def follow(self, between: Between) -> bool:
        """Make the interface follow the state as it is now; raises DeviceError if it will not.

        What moves the state from here on may be left over, and is dirty then: it must not keep those who
        wait for what was there before. Returns False if it moved the same peers again and again.
        """
        state = self._state
        if self._dismantled:
            state.dirty.clear()
            if self._warden is not None:
                await self._warden.settle()
            return True
        started, did_something, failures, rounds = clock.monotonic(), False, 0, 0
        todo: set[PublicKey] = set()
        while True:
            try:
                await self._retry_stuck()
                todo |= state.dirty
                await self._configure_link()
                while not todo.isdisjoint(state.dirty) and rounds < _ENOUGH:
                    did_something |= await self._carry_out(between, one_by_one=failures >= ROUNDS)
                    rounds += 1
                if self._warden is not None and not self.late():
                    await self._warden.settle()
                if todo.isdisjoint(state.dirty):
                    await self._bring_up()
                self._raise_what_was_left()
                break
            except DeviceError as error:
                self._behind = True
                failures += 1
                if failures > ROUNDS:
                    raise
                _log.warning("the device failed, reading it again", error=str(error), failures=failures)
                await self._read_again(error)
        if did_something:
            self._metrics.apply_seconds.observe(clock.monotonic() - started)
        return todo.isdisjoint(state.dirty)

    async def let_go(self) -> None:
        """Take off the interface who has to go, amid whatever else is under way.

        All else that these peers need (the guard's elements, another session) and what fails here is left
        to ``follow``.
        """
        going = self._due() - self._not_let_go
        if not going:
            return
        if self._warden is not None and not self._warden.busy:
            await self._warden.before_removes(self.writer.mirror.peers)
        await self._let_go(going)

    async def cut_expired(self) -> bool:
        """Cut whose deadline has passed, where they are many, before the state has ended them.

        Return whether all of them went, so that it is known how late. The rest is left to ``follow``.
        """
        held = self.writer.mirror.peers
        expiring = {key for key in self._state.expiring(self._clock()) if key in held}
        going = expiring - self._not_let_go - self.stuck
        if len(going) <= HANDFUL:
            return False
        return await self._let_go(going) and going == expiring

    async def _let_go(self, going: Collection[PublicKey]) -> bool:
        refused = await self.writer.let_go(going)
        self._not_let_go |= refused.keys()
        self._left = next(iter(refused.values()), self._left)
        # What was done of what failed is not known: a look before the next plan finds no drift in it.
        self._behind |= bool(refused)
        return not refused

    @property
    def up(self) -> bool:
        """Whether the interface is up, as far as is known."""
        return self._up

    @property
    def may_be_up(self) -> bool:
        """Whether it was found, and is left as it is while nobody has said what it should be like."""
        return not (self._up or self._knows_settings)

    @property
    def overstaying(self) -> int:
        """How many have to go and are on the interface as they were, because the device refuses."""
        held = self.writer.mirror.peers
        return sum(key in held and held[key].tenure != CUT for key in self.stuck)

    def late(self) -> set[PublicKey]:
        """Who has to go and is still on the interface."""
        return self.stuck | self._due()

    def _due(self) -> set[PublicKey]:
        now = self._clock()
        return {key for key in (self._state.dirty | self._going) - self.stuck if self._has_to_go(key, now)}

    def _has_to_go(self, key: PublicKey, now: Now) -> bool:
        """Whether the interface has the peer for a session, or another reason, that is over."""
        held = self.writer.mirror.peers.get(key)
        if held is None or held.tenure == CUT:
            return False
        want = self._state.wanted(key, now)
        return want is None or (isinstance(want, DesiredPeer) and held.tenure not in {want.tenure, FOUND})

    def _raise_what_was_left(self) -> None:
        if self._left is not None:
            error, self._left = self._left, None
            self._not_let_go.clear()
            raise error

    async def reap(self) -> bool:
        """Remove a handful of the peers that were cut; return whether there are more."""
        try:
            return await self.writer.reap()
        except DeviceError as error:
            await self._read_again(error)
            return False

    async def before_removal(self) -> None:
        """The interface is about to be removed for good. Not within a step: commands take time."""
        await self._link.before_removal()

    async def after_removal(self) -> None:
        """It has been removed. Not within a step."""
        await self._link.after_removal()

    async def dismantle(self) -> None:
        """Remove the interface, and do without until ``build``; raises DeviceError."""
        await self._patience.wait_for(_RTNETLINK, self._link.remove())
        self._dismantled, self._settings, self._up = True, None, False
        self.writer.mirror.peers.clear()
        self.writer.reconsider()
        self.stuck.clear()
        self._not_let_go.clear()
        self._left = None
        if self._warden is not None:
            self._warden.link_made()
        await self._books.addresses(())
        _log.info("interface removed")

    def build(self) -> None:
        """There is a state again: the interface is made anew when it is found to be missing."""
        self._dismantled = False

    async def close(self) -> None:
        """Let go of device and guard; interface and table stay."""
        if self._warden is not None:
            self._warden.close()
        await self._link.close()

    @property
    def _knows_settings(self) -> bool:
        return self._made or self._state.location is not None

    async def _ensure(self) -> None:
        if await self._patience.wait_for(_RTNETLINK, self._link.ensure()):
            self._made = True
            if self._warden is not None:
                self._warden.link_made()
            self._state.traffic.interface_made()

    async def _configure_link(self) -> None:
        """Give the link its settings where they differ; ENODEV is raised, other faults are kept.

        Settings that it can't have, such as a port that is taken, are no reason to leave a peer on it.
        """
        settings = self._state.interface, self._state.identity
        if self._settings == settings or not self._knows_settings:
            return
        before = self._link.addresses
        try:
            for change in await self._patience.wait_for(_RTNETLINK, self._link.configure(*settings)):
                _log.info("interface changed", change=change)
        except DeviceError as error:
            self._keep_fault(error)
        else:
            self._settings, self.link_fault = settings, None
        if self._link.addresses != before:
            await self._books.addresses(self._link.addresses)

    async def _bring_up(self) -> None:
        if self._up or not self._knows_settings:
            return
        try:
            self._up = await self._patience.wait_for(_RTNETLINK, self._link.bring_up())
        except DeviceError as error:
            self._keep_fault(error)
        else:
            if self._settings == (self._state.interface, self._state.identity):
                self.link_fault = None
                self._told_faults.clear()

    def _keep_fault(self, error: DeviceError) -> None:
        if error.errno == errno.ENODEV:
            raise error
        if str(error) not in self._told_faults:
            self._told_faults.add(str(error))
            _log.error("the interface can't be set up, tried again at each tick", error=str(error))
        self.link_fault = error

    async def _carry_out(self, between: Between, *, one_by_one: bool) -> bool:
        """Plan for the dirty peers and carry it out; what turns up meanwhile is dirty again."""
        state, writer = self._state, self.writer
        self._raise_what_was_left()
        if self._warden is not None:
            await self._warden.before_removes(self.writer.mirror.peers)
        now = self._clock()
        state.tick(now)
        dirty, state.dirty = state.dirty - self.stuck, set()
        plan = make_plan(((key, state.wanted(key, now)) for key in dirty), writer.mirror)
        for key in plan.adopted:
            state.adopted(key, now)
        try:
            if plan.removes:
                # Who has to go does not wait for the disk that the others' sessions are journalled on.
                removes, plan = replace(plan, updates=(), adds=()), replace(plan, removes=())
                if not await self._remove(removes, dirty, between, one_by_one=one_by_one):
                    state.dirty |= dirty
                    return True
            self._added_early |= bool(plan.adds) and state.epoch is None
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
        state, writer = self._state, self.writer
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
                    await self._carry_out_one_by_one(portion, dirty, between)
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
        self._going = {remove.public_key for remove in plan.removes}
        try:
            if not one_by_one:
                return await self.writer.carry_out(plan, between)
            await self._carry_out_one_by_one(plan, dirty, between)
            if self._warden is not None:
                # Whoever could not be removed is let through no longer.
                await self._warden.after_kernel(self._going, self._clock(), judged=False)
            return False
        finally:
            self._going = set()

    async def _carry_out_one_by_one(self, plan: Plan, dirty: set[PublicKey], between: Between) -> None:
        failed, finished = await self.writer.one_by_one(plan, between)
        if not finished:
            self._state.dirty |= dirty
        if not failed:
            return
        for key, (operation, error) in failed.items():
            what = type(operation).__name__
            _log.error("the device refuses a peer", peer=format_key(key), operation=what, error=str(error))
        # The next look at the interface gives them another chance; until then they are kept off it.
        self.stuck.update(key for key, (operation, _) in failed.items() if isinstance(operation, RemovePeer))
        self._state.block(failed, Refusal.DEVICE)
        self._state.dirty.update(failed)
        # What of a refused operation was done is not known.
        _, again = self.writer.mirror.observe(await self._link.device.read())
        self._state.dirty |= again
        self._state.dirty -= self.stuck

    async def _retry_stuck(self) -> None:
        for key in list(self.stuck):
            try:
                await self.writer.apply([RemovePeer(key)], {})
            except DeviceError as error:
                if error.errno == errno.ENODEV:
                    self.stuck.clear()
                if error.errno in OF_THE_INTERFACE:
                    raise
            else:
                self.stuck.discard(key)
                self._state.dirty.add(key)

    async def _read_again(self, error: DeviceError) -> None:
        if self._dismantled:
            return
        if error.errno == errno.ENODEV:
            await self._make_interface_again(error)
            return
        _, again = self.writer.mirror.observe(await self._link.device.read())
        self.writer.reconsider()
        self._behind = False
        self._state.dirty |= again

    async def _make_interface_again(self, error: DeviceError) -> None:
        if self._up:
            self._note_drift(Drift(DriftKind.INTERFACE, None, str(error)))
        self._settings, self._up = None, False
        await self._ensure()
        if self._warden is not None:
            # Whoever has made the link that there is now, the guard's chain went with the old one.
            self._warden.link_made()
        await self._configure_link()
        self.writer.mirror.observe(await self._link.device.read())
        self.writer.reconsider()
        self._behind = False
        self._state.dirty.update(self._state.roster.peers, self.writer.mirror.peers)

    def _device_drift(self, device: ObservedDevice) -> Iterable[Drift]:
        own_key = self._state.roster.own_key
        if own_key is not None and device.public_key != own_key:
            yield Drift(DriftKind.PRIVATE_KEY, None, "the interface has another private key")
        port, fwmark = self._link.listen_port, self._link.fwmark
        if port is not None and device.listen_port != port:
            yield Drift(DriftKind.LISTEN_PORT, None, f"listens on {device.listen_port} instead of {port}")
        if fwmark is not None and device.fwmark != fwmark:
            yield Drift(DriftKind.FWMARK, None, f"has {device.fwmark:#x} instead of {fwmark:#x}")

    def _note_guard_drift(self) -> None:
        if self._warden is not None:
            found, self._warden.drift = self._warden.drift, []
            self._note_drift(*(Drift(DriftKind.GUARD, drift.public_key, drift.detail) for drift in found))

    def _note_drift(self, *drift: Drift) -> None:
        for one in drift:
            self._metrics.drift.labels(one.kind.value).inc()
        self._audit.drifted(drift)


def _elements_left(device: ObservedDevice, contents: GuardContents) -> dict[PublicKey, float]:
    """For how many seconds the guard's table lets each found peer through, where it knows of a session."""
    return {
        key: left
        for key, peer in device.peers.items()
        if (left := contents.session_left(peer.allowed_ips)) is not None
    }
