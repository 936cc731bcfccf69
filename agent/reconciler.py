"""The one writer: takes events off one queue, moves the state, and makes the interface follow.

Each step takes what has queued up, applies it to the pure state, journals new sessions, carries the
plan out, journals what ended, and only then answers whoever delivered the events (rules 15 and 16).
Nothing else writes to the interface or the journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, assert_never

import structlog

from agent import clock
from agent.audit import Audit
from agent.books import Books
from agent.errors import AgentError, DeviceError
from agent.events import (
    AskPlan,
    Changes,
    Configure,
    Dismantle,
    End,
    Event,
    LookAtGuard,
    Observe,
    Pulled,
    Reap,
    Step,
    Tick,
    answer_with,
)
from agent.fence import Position
from agent.intake import Intake
from agent.journal import Journal
from agent.keeper import Keeper
from agent.metrics import Metrics
from agent.model import Now, PublicKey
from agent.patience import Patience
from agent.ports import Link
from agent.reporting import Reporting
from agent.sessions import Limits
from agent.state import State
from agent.warden import Warden

_log = structlog.get_logger(__name__)

LATE: Final = 1.0
"""Seconds past a deadline from which on a peer still on the interface makes the agent not ready."""


class Reconciler:
    """The reconciler of one interface. Its ``inbox`` takes what core says, its ``reports`` are for core.

    ``read_clock`` is the host's clock, ``alive`` is called between the slices of long work. ``start``
    brings the interface to what is known without core, ``run`` then works until ``finish``.
    """

    def __init__(
        self,
        *,
        interface: str,
        state: State,
        link: Link,
        journal: Journal,
        metrics: Metrics,
        read_clock: Callable[[], Now] = clock.read,
        core_lost_grace: float = 0.0,
        alive: Callable[[], None] = lambda: None,
        warden: Warden | None = None,
        service_result: str = "",
    ) -> None:
        self.state = state
        self.interface = interface
        patience = Patience(self._meanwhile)
        self.books = Books(journal, state, patience, service_result)
        if warden is not None:
            warden.patience = patience
        self.audit = Audit(state, read_clock)
        self.keeper = Keeper(
            state=state,
            link=link,
            books=self.books,
            audit=self.audit,
            patience=patience,
            metrics=metrics,
            read_clock=read_clock,
            warden=warden,
        )
        self.writer = self.keeper.writer
        self.inbox = Intake(
            state=state,
            keeper=self.keeper,
            books=self.books,
            audit=self.audit,
            metrics=metrics,
            read_clock=read_clock,
            put=self.put,
            core_lost_grace=core_lost_grace,
        )
        self.reports = Reporting(state, read_clock, self.books.reported)
        self.fault = ""
        """Why the interface does not follow the state as it should, or can't be read."""
        self.synced_at: float | None = None
        """Boot time when a state or a change of core's was last put in force."""
        self._metrics = metrics
        self._clock = read_clock
        self._alive = alive
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._next = Step()
        """What the next step answers for: also what is taken in while one is under way."""
        self._under_way: Step | None = None
        self._loading = False
        """Whether a state is about to be taken in, and changes on top of it have to wait."""
        self._not_seen: DeviceError | None = None
        """Why the interface could not be read at the last look."""
        self._finished = False
        self._moved = asyncio.Event()

    # How it stands.

    @property
    def expiry_late(self) -> bool:
        """Whether a session past its deadline is still on the interface."""
        now = self._clock()
        return any(-deadline.remaining(now) > LATE for deadline in self.state.overdue)

    @property
    def overstaying(self) -> int:
        """How many have to go and stay on the interface, since the device refuses or does not answer."""
        return self.keeper.overstaying(broken=bool(self.fault))

    @property
    def in_step(self) -> bool:
        """Whether all that core has said by now is known to be in the kernel."""
        waiting = self._next.waiting or (self._under_way is not None and self._under_way.waiting)
        behind = waiting or self.state.dirty or self.fault or not self._queue.empty()
        return self.inbox.certain and not behind

    # Events.

    def put(self, event: Event) -> None:
        """Queue an event for the next step."""
        self._queue.put_nowait(event)

    def tick(self, done: Callable[[], None] = lambda: None) -> None:
        """Check every deadline; ``done`` is called once the tick has passed through a whole step."""
        self.put(Tick(done))

    def observe(self) -> None:
        """Look at the interface: handshakes, counters, drift, idle sessions."""
        self.put(Observe())

    def guard_disturbed(self) -> None:
        """The kernel says that the guard's table was changed."""
        self.put(LookAtGuard())

    def configure(self, limits: Limits, core_lost_grace: float) -> None:
        """Take other ceilings from the configuration."""
        self.inbox.core_lost_grace = core_lost_grace
        self.put(Configure(limits))

    def next_wait(self) -> float | None:
        """Seconds until the next deadline, None if there is none."""
        return self.state.next_wait(self._clock())

    async def deadline_moved(self) -> None:
        """Return when the next deadline may have moved."""
        await self._moved.wait()
        self._moved.clear()

    # Life.

    async def start(self) -> None:
        """Expire, adopt, and bring the interface to what is known without core (rule 14).

        Raises DeviceError if the interface can't be made or read.
        """
        state = self.state
        loaded = await self.books.load(self._clock())
        if loaded is not None:
            self.reports.ended(loaded.ends)
            self.keeper.own(loaded.addresses)
        state.tick(self._clock())
        device = await self.keeper.start()
        await self._step(())
        adopted = sum(session.preshared_key is not None for session in state.sessions.values())
        self.audit.started(len(device.peers), adopted)

    async def run(self) -> None:
        """Work off the queue until ``finish`` is called."""
        while not self._finished:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            await self._step(items)
        if self._next.waiting or self.state.dirty or self.state.ends:
            # Taken in while the last step was under way: an end must not be forgotten by stopping.
            await self._step(())

    def finish(self) -> None:
        """Let ``run`` return after the step under way."""
        self._finished = True
        self.tick()

    async def stop(self, *, told: bool = True) -> None:
        """Let go of device and journal; tunnels stay up. ``told``: somebody wanted the agent to stop."""
        await self.books.close(told=told)
        await self.keeper.close()

    # One step: take the events, make the interface follow, answer.

    async def _step(self, events: Sequence[Event]) -> None:
        step, self._next = self._next, Step()
        step.pending.extend(events)
        self._under_way = step
        try:
            await self._work_off(step)
        finally:
            self._under_way = None
        self.inbox.tell_taken()
        self.audit.followed()
        self._metrics.sessions_active.set(len(self.state.sessions))
        self._metrics.reap_backlog.set(len(self.writer.to_reap))
        self._moved.set()
        for tick in step.ticks:
            tick.done()

    async def _work_off(self, step: Step) -> None:
        try:
            ends = await self.books.retry() if not self.books.ok else None
            if ends is not None:
                self.reports.ended(ends)
                self.state.unblock(self._clock())
            if not all(isinstance(event, Tick | Reap) for event in step.pending):
                # A look, or a large list, takes long enough for deadlines not to wait for it.
                await self._pass_time()
            while step.pending:
                await self._take(step.pending.popleft(), step)
            await self._pass_time()
            position = self.inbox.position
            done = await self._reconcile(pulled=step.pulled)
        except AgentError as error:
            self._note_broken(error)
            step.fail(error)
            step.put_off(self._next)
            # Those whose sessions live on are not to lapse because the device does not follow.
            await self.keeper.tick()
        else:
            self._note_broken(self._not_seen or self.keeper.link_fault)
            pulled = step.pulled
            if done:
                self._answer(step, position)
            else:
                step.put_off(self._next)
            # What core lists is only for a restart to know: nobody waits for it.
            await self._keep_books(pulled=pulled)
            if self._next.waiting or self.state.dirty:
                # Taken in meanwhile: it is answered once a whole step has passed over it.
                self.put(Reap())

    def _note_broken(self, error: AgentError | None) -> None:
        if error is not None and str(error) != self.fault:
            _log.error("reconcile failed, tried again at each tick", error=str(error))
        self.fault = "" if error is None else str(error)

    async def _take(self, event: Event, step: Step) -> None:
        match event:
            case Pulled():
                step.waiting.append(event)
                if self.inbox.position is None:
                    self._loading = True
                    try:
                        await self.keeper.before_first_state()
                    except DeviceError as error:
                        self._not_seen = error
                    finally:
                        self._loading = False
                step.pulled |= self.inbox.take_snapshot(event)
            case Changes():
                step.waiting.append(event)
                step.changed |= self.inbox.take_changes(event)
            case Observe():
                try:
                    if await self.keeper.look():
                        self.reports.observed()
                except DeviceError as error:
                    # Whatever else there is to do does not wait for the interface to be readable.
                    self._not_seen = error
                else:
                    self._not_seen = None
            case End(keys):
                step.waiting.append(event)
                event.ended = self.state.end(keys, self._clock())
            case Configure(limits):
                self.state.configure(limits, self._clock())
            case LookAtGuard():
                await self.keeper.look_at_guard()
            case Dismantle(answer):
                await answer_with(answer, self.keeper.dismantle())
            case AskPlan(answer):
                await answer_with(answer, self.keeper.describe(self.interface))
            case Tick():
                step.ticks.append(event)
            case Reap():
                pass
            case _:
                assert_never(event)

    async def _reconcile(self, *, pulled: bool) -> bool:
        """Make the interface follow the state, then the books; whether both have followed.

        What is taken in meanwhile may be left over, and then is dirty still.
        """
        done = await self.keeper.follow(self._may_go_on)
        if self.state.ends:
            await self._keep_books(pulled=pulled)
        await self.keeper.tick()
        if await self.keeper.reap():
            self.put(Reap())
        return done

    async def _pass_time(self) -> None:
        if await self.keeper.cut_expired():
            self._note_lag(self._clock())
        now = self._clock()
        self.state.tick(now)
        self.inbox.check_lost(now)

    async def _may_go_on(self) -> bool:
        """Between the slices of a long plan: neither a deadline nor a revocation waits for its end.

        The plan goes on unless somebody has to go because of what has arrived.
        """
        self._alive()
        state, before = self.state, len(self.state.ends)
        await self.keeper.tick()
        await self._take_news(snapshots=True)
        await self._pass_time()
        now = self._clock()
        return len(state.ends) == before and not any(state.wanted(key, now) is None for key in state.dirty)

    async def _meanwhile(self) -> None:
        """While a step waits: no deadline and no revocation does, and the lease does not lapse for it.

        Whoever has to go goes; all else follows when the step goes on.
        """
        if self._under_way is None:
            return
        await self._take_news(snapshots=False)
        await self._pass_time()
        await self.keeper.let_go()
        await self.keeper.tick()

    async def _take_news(self, *, snapshots: bool) -> None:
        """Take in what core and the operator want by now, for the next step to answer.

        Without ``snapshots`` what core says after one waits for it, and so it does while one is taken in.
        """
        waiting: list[Event] = []
        if self._under_way is not None:
            waiting += self._under_way.pending
            self._under_way.pending.clear()
        while not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        cores_turn = not self._loading
        for item in waiting:
            cores_turn &= snapshots or not isinstance(item, Pulled)
            if isinstance(item, End) or (cores_turn and isinstance(item, Pulled | Changes)):
                await self._take(item, self._next)
            else:
                self.put(item)

    async def _keep_books(self, *, pulled: bool) -> None:
        """Journal, count and report what ended, now that the interface has followed."""
        now = self._clock()
        late = self._note_lag(now)
        self.inbox.tell_taken()
        self.audit.ended([end for end in self.state.ends if end.public_key not in late])
        ends = await self.books.after_kernel(now, pulled=pulled, except_for=late)
        for end in ends:
            self._metrics.session_ends.labels(end.reason.value).inc()
        self.audit.kept(ends)
        self.reports.ended(ends)

    def _note_lag(self, now: Now) -> set[PublicKey]:
        """Measure how late those went who had to; return who is still there."""
        late = self.keeper.late()
        if not late:
            for deadline in self.state.overdue:
                self._metrics.expiry_lag_seconds.observe(max(0.0, -deadline.remaining(now)))
            self.state.overdue.clear()
        return late

    def _answer(self, step: Step, position: Position | None) -> None:
        if step.pulled:
            self.inbox.settled.set()
        if step.pulled or step.changed:
            now = self._clock()
            self.synced_at = now.boot
            self._metrics.last_sync.set(now.wall)
            self._metrics.applied_revision.set(0 if position is None else position.revision)
        self.reports.in_kernel(position, pulled=step.pulled)
        refused = self.reports.refused() if step.waiting else ()
        step.answer(position, refused, self.keeper.stuck, self._metrics.push_to_kernel_seconds.observe)
