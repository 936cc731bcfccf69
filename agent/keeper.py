"""Keeps the interface as the state wants it: looks at it, has plans carried out, mends what fails.

Set messages are not transactional. After a failure the interface is read and planned for again, a
bounded number of rounds; then it goes peer by peer, so that one cannot hold back the others (rule 16).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final

import structlog

from agent import clock, overview
from agent.audit import Audit
from agent.books import Books
from agent.errors import DeviceError
from agent.guard import GuardContents
from agent.metrics import Metrics
from agent.model import InterfaceAddress, Now, ObservedDevice, PublicKey
from agent.observed import forget
from agent.patience import Patience
from agent.plan import Drift, DriftKind
from agent.ports import Link
from agent.removals import Removals
from agent.rollout import Between, Rollout
from agent.state import State
from agent.upkeep import Upkeep
from agent.warden import Warden
from agent.writer import Writer

_log = structlog.get_logger(__name__)

ROUNDS: Final = 3
"""Whole plans tried after failures, before it goes peer by peer."""
_ENOUGH: Final = 10
"""Plans carried out in a row, after which it is somebody else's turn: the state moves all the time."""


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
        self._state = state
        self._link = link
        self._books = books
        self._audit = audit
        self._metrics = metrics
        self._clock = read_clock
        self._warden = warden
        self._upkeep = Upkeep(state=state, link=link, books=books, patience=patience)
        self._removals = Removals(state=state, writer=self.writer, read_clock=read_clock, warden=warden)
        self._rollout = Rollout(
            state=state,
            writer=self.writer,
            removals=self._removals,
            books=books,
            read_clock=read_clock,
            patience=patience,
            warden=warden,
        )

    async def start(self) -> ObservedDevice:
        """Find or make the interface, and take over whom the restored state knows; what was found.

        An interface that was found is not touched while nobody has said what it should be like.
        """
        contents = None if self._warden is None else await self._warden.start()
        await self._ensure()
        await self._upkeep.configure()
        device = await self._link.device.read()
        self.writer.mirror.find(device)
        left = {} if contents is None else _elements_left(device, contents)
        self._state.adopt(device, left, self._clock())
        if self._warden is not None and contents is not None and not self._upkeep.made:
            self._warden.adopt(contents)
        changed = self._state.observe(device, self._clock())
        forget(device.peers)
        await self._books.observed(changed)
        return device

    def own(self, addresses: tuple[InterfaceAddress, ...]) -> None:
        """These addresses were put on the interface by the agent, in an earlier life."""
        self._upkeep.own(addresses)

    async def look(self) -> bool:
        """Read the interface and take in what has changed on it, by us or by somebody else.

        Returns whether there is traffic to report. Raises DeviceError.
        """
        with self._metrics.observation_seconds.time():
            return await self._look()

    async def _look(self) -> bool:
        if self._upkeep.dismantled:
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
        of_the_device = list(self._upkeep.drift_of(device))
        self._note_drift(*(of_the_device if self.writer.behind else (*drift, *of_the_device)))
        self.writer.behind = False
        if of_the_device:
            # Perhaps another interface of this name, which is down.
            self._upkeep.doubt()
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
        if not self._upkeep.configured:
            return True
        drift = await self._upkeep.drift()
        self._note_drift(*drift)
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
        if self._rollout.added_early:
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
        if self._upkeep.dismantled:
            state.dirty.clear()
            if self._warden is not None:
                await self._warden.settle()
            return True
        started, did_something, failures, rounds = clock.monotonic(), False, 0, 0
        todo: set[PublicKey] = set()
        while True:
            try:
                await self._removals.retry_stuck()
                todo |= state.dirty
                await self._upkeep.configure()
                while not todo.isdisjoint(state.dirty) and rounds < _ENOUGH:
                    did_something |= await self._rollout.carry_out(between, one_by_one=failures >= ROUNDS)
                    rounds += 1
                if self._warden is not None and not self.late():
                    await self._warden.settle()
                if todo.isdisjoint(state.dirty):
                    await self._upkeep.bring_up()
                self._removals.raise_what_was_left()
                break
            except DeviceError as error:
                self.writer.behind = True
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
        await self._removals.let_go()

    async def cut_expired(self) -> bool:
        """Cut whose deadline has passed, where they are many, before the state has ended them.

        Return whether all of them went, so that it is known how late. The rest is left to ``follow``.
        """
        return await self._removals.cut_expired()

    @property
    def up(self) -> bool:
        """Whether the interface is up, as far as is known."""
        return self._upkeep.up

    @property
    def may_be_up(self) -> bool:
        """Whether it was found, and is left as it is while nobody has said what it should be like."""
        return self._upkeep.may_be_up

    @property
    def link_fault(self) -> DeviceError | None:
        """Why the link does not have its settings, if it does not."""
        return self._upkeep.fault

    @property
    def stuck(self) -> set[PublicKey]:
        """Peers that the device did not remove: tried again, each by itself, at each step."""
        return self._removals.stuck

    def overstaying(self, *, broken: bool) -> int:
        """How many have to go and are on the interface as they were, because the device refuses.

        ``broken``: it does not follow at all.
        """
        return self._removals.overstaying(broken=broken)

    def late(self) -> set[PublicKey]:
        """Who has to go and is still on the interface."""
        return self._removals.late()

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
        await self._upkeep.remove()
        self.writer.mirror.peers.clear()
        self.writer.reconsider()
        self._removals.forget()
        if self._warden is not None:
            self._warden.link_made()
        await self._books.addresses(())
        _log.info("interface removed")

    def build(self) -> None:
        """There is a state again: the interface is made anew when it is found to be missing."""
        self._upkeep.build()

    async def close(self) -> None:
        """Let go of device and guard; interface and table stay."""
        if self._warden is not None:
            self._warden.close()
        await self._link.close()

    async def _ensure(self) -> None:
        if await self._upkeep.ensure():
            if self._warden is not None:
                self._warden.link_made()
            self._state.traffic.interface_made()

    async def _read_again(self, error: DeviceError) -> None:
        if self._upkeep.dismantled:
            return
        if error.errno == errno.ENODEV:
            await self._make_interface_again(error)
            return
        again = await self.writer.read_again()
        self.writer.reconsider()
        self.writer.behind = False
        self._state.dirty |= again

    async def _make_interface_again(self, error: DeviceError) -> None:
        if self._upkeep.up:
            self._note_drift(Drift(DriftKind.INTERFACE, None, str(error)))
        self._upkeep.doubt()
        await self._ensure()
        if self._warden is not None:
            # Whoever has made the link that there is now, the guard's chain went with the old one.
            self._warden.link_made()
        await self._upkeep.configure()
        await self.writer.read_again()
        self.writer.reconsider()
        self.writer.behind = False
        self._state.dirty.update(self._state.roster.peers, self.writer.mirror.peers)

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
