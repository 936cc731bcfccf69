"""The one writer: takes events off one queue, moves the state, and makes the interface follow.

Each step takes what has queued up, applies it to the pure state, journals new sessions, carries the
plan out, journals what ended, and only then answers whoever delivered the events (rules 15 and 16).
Nothing else writes to the interface or the journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, assert_never

import structlog

from agent import __version__, clock, explanation, overview
from agent.audit import Audit
from agent.books import Books
from agent.encoding import format_key
from agent.errors import AgentError, DeviceError, InvalidMessage
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
)
from agent.fence import Fence, Position, Verdict
from agent.journal import Contact, Journal
from agent.keeper import Keeper
from agent.metrics import Metrics
from agent.model import (
    Change,
    Now,
    Peer,
    PublicKey,
    Snapshot,
)
from agent.patience import Patience
from agent.plan import CUT
from agent.ports import Link, Outcome
from agent.reporting import Reporting
from agent.sessions import Limits
from agent.state import State, UnknownPeer
from agent.warden import Warden

_log = structlog.get_logger(__name__)

LATE: Final = 1.0
"""Seconds past a deadline from which on a peer still on the interface makes the agent not ready."""
_LAST_EVENTS: Final = 10
"""Occurrences of a peer that explaining it shows."""
SKEW: Final = 5.0
"""Seconds by which this host's clock may go apart from core's, or come nearer, without a word in the log."""


class _PullWanted(asyncio.Event):
    """That core's state is to be pulled; ``doubted`` until it has been, also while it is on its way."""

    doubted = True

    def set(self) -> None:
        self.doubted = True
        super().set()


class Reconciler:
    """The reconciler of one interface. It implements ``Inbox`` and ``Operator`` of ``agent.ports``.

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
        self._pull = _PullWanted()
        self.pull_wanted: asyncio.Event = self._pull
        self.settled = asyncio.Event()
        """Set once the first state is in the kernel, or core could not be had."""
        self.state = state
        self.core_lost_grace = core_lost_grace
        self.core_connected = False
        self.core_error = ""
        self._losses = 0
        patience = Patience(self._meanwhile)
        self._books = Books(journal, state, patience, service_result)
        self._warden = warden
        if warden is not None:
            warden.patience = patience
        self.audit = Audit(state, read_clock)
        self._keeper = Keeper(
            state=state,
            link=link,
            books=self._books,
            audit=self.audit,
            patience=patience,
            metrics=metrics,
            read_clock=read_clock,
            warden=warden,
        )
        self.writer = self._keeper.writer
        self.reports = Reporting(state, read_clock, self._books.reported)
        self._interface = interface
        self._metrics = metrics
        self._clock = read_clock
        self._alive = alive
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._fence = Fence()
        self._core_lost = False
        self._born = read_clock().boot
        self._core_since: float | None = None
        """Boot time since when core has been connected, or has not; None before the first exchange."""
        self._synced: float | None = None
        """Boot time when a state or a change of core's was last put in force."""
        self._next = Step()
        """What the next step answers for: also what is taken in while one is under way."""
        self._loading = False
        """Whether a state is about to be taken in, and changes on top of it have to wait."""
        self._taken: list[Change] = []
        """Changes that the log has yet to tell of."""
        self._told_skew = 0.0
        self._broken = ""
        self._not_seen: DeviceError | None = None
        """Why the interface could not be read at the last look."""
        self._finished = False
        self._moved = asyncio.Event()
        self._under_way: Step | None = None

    # Inbox.

    @property
    def position(self) -> Position | None:
        """What is held now; None before the first pull of this process."""
        return self._fence.position

    def holds(self, peer: Peer) -> bool:
        """Whether this peer is listed and let in already, by the session that its entry shows."""
        state, key = self.state, peer.public_key
        held, there = state.roster.peers.get(key), self.writer.mirror.peers.get(key)
        if held is None or there is None or there.tenure == CUT or key in state.roster.refused:
            return False
        if (held.mfa_exempt, held.allowed_ips) != (peer.mfa_exempt, peer.allowed_ips):
            return False
        session = state.sessions.get(key)
        if peer.session is None or session is None:
            return peer.session is None and session is None
        return session.id == peer.session.id

    def submit(self, message: Snapshot | Sequence[Change], received_at: float) -> asyncio.Future[Outcome]:
        """Queue a snapshot, or changes in their order."""
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if isinstance(message, Snapshot):
            self._queue.put_nowait(Pulled(message, answer, losses=self._losses))
        else:
            self._queue.put_nowait(Changes(message, received_at, answer))
        return answer

    async def dismantle(self) -> None:
        """Remove the interface, of which nobody is on any more; the next state makes it anew."""
        await self._keeper.before_removal()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Dismantle(answer))
        await answer
        await self._keeper.after_removal()

    def heard(self) -> None:
        """Bytes came from core just now."""
        now = self._clock()
        self._books.heard = Contact(now.boot, now.wall)
        self._core_lost = False

    def core_answered(self) -> None:
        """The last exchange with core succeeded."""
        if not self.core_connected:
            self.audit.core_found()
            self._core_since = self._clock().boot
        self.core_connected, self.core_error = True, ""
        self._metrics.core_connected.set(1)

    def core_failed(self, error: Exception) -> None:
        """The last exchange with core failed."""
        self._losses += 1
        if self.core_connected or self._core_since is None:
            self.audit.core_lost(error)
            self._core_since = self._clock().boot
        self.core_connected, self.core_error = False, str(error)
        self._metrics.core_connected.set(0)
        self.settled.set()

    def core_sent_rubbish(self, error: Exception) -> None:
        """Core sent something invalid, which was refused whole."""
        self.audit.core_invalid(error)
        self._metrics.core_invalid.inc()

    @property
    def expiry_late(self) -> bool:
        """Whether a session past its deadline is still on the interface."""
        now = self._clock()
        return any(-deadline.remaining(now) > LATE for deadline in self.state.overdue)

    @property
    def up(self) -> bool:
        """Whether the interface is up: core has to have said what it should be like, if it was found."""
        return self._keeper.up

    # The daemon's timers.

    def tick(self, done: Callable[[], None] = lambda: None) -> None:
        """Check every deadline; ``done`` is called once the tick has passed through a whole step."""
        self._queue.put_nowait(Tick(done))

    def observe(self) -> None:
        """Look at the interface: handshakes, counters, drift, idle sessions."""
        self._queue.put_nowait(Observe())

    def guard_disturbed(self) -> None:
        """The kernel says that the guard's table was changed."""
        self._queue.put_nowait(LookAtGuard())

    def configure(self, limits: Limits, core_lost_grace: float) -> None:
        """Take other ceilings from the configuration."""
        self.core_lost_grace = core_lost_grace
        self._queue.put_nowait(Configure(limits))

    def next_wait(self) -> float | None:
        """Seconds until the next deadline, None if there is none."""
        return self.state.next_wait(self._clock())

    async def deadline_moved(self) -> None:
        """Return when the next deadline may have moved."""
        await self._moved.wait()
        self._moved.clear()

    # Operator.

    async def status(self) -> dict[str, Any]:
        """The document of ``wg-agent status --json``; ``link_up`` is None while nobody knows."""
        now = self._clock()
        about = {
            "interface": self._interface,
            "version": __version__,
            "started_at": overview.moment(self._born, now),
            "link_up": None if self._keeper.may_be_up else self.up,
            "core_connected": self.core_connected,
            "core_error": self.core_error,
            "core_since": overview.moment(self._core_since, now),
            "synced_at": overview.moment(self._synced, now),
            "expiry_late": self.expiry_late,
            "overstaying": self._keeper.overstaying,
            "journal_ok": self._books.ok,
            "device_error": self._broken,
            "guard": "none" if self._warden is None else self._warden.condition,
            "guard_error": "" if self._warden is None else self._warden.fault,
            "reap_backlog": len(self.writer.to_reap),
        }
        return await overview.status(self.state, self.writer.mirror, self._clock, about)

    def explain(self, what: str) -> dict[str, Any]:
        """Why the peers that ``what`` names are on the interface or not."""
        now = self._clock()
        surroundings = explanation.Surroundings(
            interface=self._interface,
            core="connected" if self.core_connected else self.core_error,
            stuck=self._keeper.stuck.__contains__,
            device_error=self._broken,
            guard_error="" if self._warden is None else self._warden.fault,
            trail=self.audit.trail,
            guarded=lambda key: None if self._warden is None else self._warden.guarded(key, now),
        )
        trail = self.audit.trail
        found = explanation.explain(what, self.state, self.writer.mirror, now, surroundings)
        for one in found["peers"]:
            key = explanation.key_of(one)
            one["events"] = [] if key is None else self.audit.documents(trail.of(key, _LAST_EVENTS))
        return found

    async def events(
        self, after: int | None, limit: int, wait: float, process: str | None = None, who: str | None = None
    ) -> dict[str, Any]:
        """The audit trail behind a number; None: its last ``limit`` occurrences."""
        return {"interface": self._interface, **await self.audit.events(after, limit, wait, process, who)}

    async def plan(self) -> dict[str, Any]:
        """Read the interface and return what a reconcile would change now, changing nothing."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(AskPlan(answer))
        return await answer

    async def end(self, keys: Sequence[PublicKey] | None) -> dict[str, Any]:
        """End the sessions of these peers (None: all); returns once they are off the interface."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(End(keys, answer))
        return await answer

    def refresh_metrics(self) -> None:
        """Bring up to date what is only known at a scrape: totals, since they cost a walk over all peers, and
        what time changes by itself.
        """
        by_state, by_reason = overview.counts(self.state, self.writer.mirror)
        metrics, now = self._metrics, self._clock()
        metrics.set_peers(by_state)
        metrics.set_refused(by_reason)
        metrics.set_grants(self._books.granted)
        metrics.set_starts(None if self._books.lives is None else self._books.lives.starts)
        metrics.interface_up.set(self.up)
        metrics.overdue_seconds.set(max((-d.remaining(now) for d in self.state.overdue), default=0.0))
        metrics.set_faults(
            device=bool(self._broken or self._keeper.overstaying),
            guard=self._warden is not None and bool(self._warden.fault),
            journal=not self._books.ok,
        )
        if self.state.core_clock is not None:
            metrics.clock_skew.set(now.wall - self.state.core_time(now))
        if self._follows_core():
            metrics.last_sync.set(now.wall)

    def _follows_core(self) -> bool:
        """Whether all that core has said by now is known to be in the kernel."""
        doubt = not self.core_connected or self.position is None or self._pull.doubted
        waiting = self._next.waiting or (self._under_way is not None and self._under_way.waiting)
        return not (doubt or waiting or self.state.dirty or self._broken) and self._queue.empty()

    # Life.

    async def start(self) -> None:
        """Expire, adopt, and bring the interface to what is known without core (rule 14).

        Raises DeviceError if the interface can't be made or read.
        """
        state = self.state
        loaded = await self._books.load(self._clock())
        if loaded is not None:
            self.reports.ended(loaded.ends)
            self._keeper.own(loaded.addresses)
        state.tick(self._clock())
        device = await self._keeper.start()
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
        await self._books.close(told=told)
        await self._keeper.close()

    # One step: take the events, make the interface follow, answer.

    async def _step(self, events: Sequence[Event]) -> None:
        step, self._next = self._next, Step()
        step.pending.extend(events)
        self._under_way = step
        try:
            await self._work_off(step)
        finally:
            self._under_way = None
        self._tell_taken()
        self.audit.followed()
        self._metrics.sessions_active.set(len(self.state.sessions))
        self._metrics.reap_backlog.set(len(self.writer.to_reap))
        self._moved.set()
        for tick in step.ticks:
            tick.done()

    async def _work_off(self, step: Step) -> None:
        try:
            ends = await self._books.retry() if not self._books.ok else None
            if ends is not None:
                self.reports.ended(ends)
                self.state.unblock(self._clock())
            if not all(isinstance(event, Tick | Reap) for event in step.pending):
                # A look, or a large list, takes long enough for deadlines not to wait for it.
                await self._pass_time()
            while step.pending:
                await self._take(step.pending.popleft(), step)
            await self._pass_time()
            position = self.position
            done = await self._reconcile(pulled=step.pulled)
        except AgentError as error:
            self._note_broken(error)
            self._fail(step, error)
            # Those whose sessions live on are not to lapse because the device does not follow.
            await self._keeper.tick()
        else:
            self._note_broken(self._not_seen or self._keeper.link_fault)
            pulled = step.pulled
            if done:
                self._answer(step, position)
            else:
                self._put_off(step)
            # What core lists is only for a restart to know: nobody waits for it.
            await self._keep_books(pulled=pulled)
            if self._next.waiting or self.state.dirty:
                # Taken in meanwhile: it is answered once a whole step has passed over it.
                self._queue.put_nowait(Reap())

    def _note_broken(self, error: AgentError | None) -> None:
        if error is not None and str(error) != self._broken:
            _log.error("reconcile failed, tried again at each tick", error=str(error))
        self._broken = "" if error is None else str(error)

    async def _take(self, event: Event, step: Step) -> None:
        match event:
            case Pulled(snapshot):
                step.waiting.append(event)
                if self.position is None:
                    self._loading = True
                    try:
                        await self._keeper.before_first_state()
                    except DeviceError as error:
                        self._not_seen = error
                    finally:
                        self._loading = False
                self._take_snapshot(event, snapshot, step)
            case Changes(changes):
                step.waiting.append(event)
                event.verdict = self._take_changes(changes, step)
                if event.verdict is Verdict.PULL:
                    self.pull_wanted.set()
            case Observe():
                try:
                    if await self._keeper.look():
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
                await self._keeper.look_at_guard()
            case Dismantle(answer):
                await self._dismantle(answer)
            case AskPlan(answer):
                await self._answer_plan(answer)
            case Tick():
                step.ticks.append(event)
            case Reap():
                pass
            case _:
                assert_never(event)

    async def _dismantle(self, answer: asyncio.Future[None]) -> None:
        try:
            await self._keeper.dismantle()
        except DeviceError as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(None)

    async def _answer_plan(self, answer: asyncio.Future[dict[str, Any]]) -> None:
        try:
            described = await self._keeper.describe(self._interface)
        except DeviceError as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(described)

    def _take_snapshot(self, pulled: Pulled, snapshot: Snapshot, step: Step) -> None:
        try:
            pulled.verdict = self._fence.judge_snapshot(snapshot)
        except InvalidMessage as error:
            if not pulled.answer.done():
                pulled.answer.set_exception(error)
            return
        if pulled.verdict is not Verdict.APPLIED:
            return
        self._pull.doubted = self._pull.is_set()
        # Said here as well, so that whoever waits for the first state does not find core unreachable. Core
        # may have gone since it sent this, though.
        if pulled.losses == self._losses:
            self.core_answered()
        state, now = self.state, self._clock()
        self._keeper.build()
        state.load(snapshot, now)
        self._fence.advance(snapshot.epoch, snapshot.revision, now)
        self._note_skew(now.wall - state.core_time(now))
        step.pulled = True
        _log.info(
            "state pulled",
            position=str(self.position),
            peers=len(snapshot.peers),
            sessions=len(state.sessions),
            refused=len(state.roster.refused) + len(snapshot.unreadable),
        )

    def _note_skew(self, skew: float) -> None:
        """Deadlines are anchored on core's time and do not mind; certificates and handshakes may."""
        self._metrics.clock_skew.set(skew)
        if abs(skew - self._told_skew) < SKEW:
            return
        self._told_skew = skew
        if abs(skew) < SKEW:
            _log.info("this host's clock agrees with core's again", seconds_ahead=round(skew, 1))
            return
        _log.warning(
            "this host's clock differs from core's",
            seconds_ahead=round(skew, 1),
            meaning="sessions end when core means them to; certificates are judged by this host's clock,"
            " and after a step back clients can't shake hands until it has caught up",
            hint="set the clocks right (NTP), here and at core",
        )

    def _take_changes(self, changes: Sequence[Change], step: Step) -> Verdict:
        """Apply what fits; one that does not ends it, since nothing after it can."""
        applied = Verdict.HELD
        for change in changes:
            verdict = self._fence.judge(change)
            if verdict is Verdict.HELD:
                continue
            now = self._clock()
            if verdict is Verdict.APPLIED:
                try:
                    self.state.change(change.body, now)
                except UnknownPeer:
                    verdict = Verdict.PULL
            if verdict is not Verdict.APPLIED:
                _log.info("change does not fit", verdict=verdict.value, revision=change.revision)
                return verdict
            self._fence.advance(change.epoch, change.revision, now)
            self._taken.append(change)
            step.changed = True
            applied = verdict
        return applied

    async def _reconcile(self, *, pulled: bool) -> bool:
        """Make the interface follow the state, then the books; whether both have followed.

        What is taken in meanwhile may be left over, and then is dirty still.
        """
        done = await self._keeper.follow(self._may_go_on)
        if self.state.ends:
            await self._keep_books(pulled=pulled)
        await self._keeper.tick()
        if await self._keeper.reap():
            self._queue.put_nowait(Reap())
        return done

    async def _pass_time(self) -> None:
        if await self._keeper.cut_expired():
            self._note_lag(self._clock())
        now = self._clock()
        self.state.tick(now)
        self._check_core_lost(now)

    async def _may_go_on(self) -> bool:
        """Between the slices of a long plan: neither a deadline nor a revocation waits for its end.

        The plan goes on unless somebody has to go because of what has arrived.
        """
        self._alive()
        state, before = self.state, len(self.state.ends)
        await self._keeper.tick()
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
        await self._keeper.let_go()
        await self._keeper.tick()

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
                self._queue.put_nowait(item)

    async def _keep_books(self, *, pulled: bool) -> None:
        """Journal, count and report what ended, now that the interface has followed."""
        now = self._clock()
        late = self._note_lag(now)
        self._tell_taken()
        self.audit.ended([end for end in self.state.ends if end.public_key not in late])
        ends = await self._books.after_kernel(now, pulled=pulled, except_for=late)
        for end in ends:
            self._metrics.session_ends.labels(end.reason.value).inc()
        self.audit.kept(ends)
        self.reports.ended(ends)

    def _tell_taken(self) -> None:
        self.audit.changed(self._taken)
        self._taken.clear()

    def _note_lag(self, now: Now) -> set[PublicKey]:
        """Measure how late those went who had to; return who is still there."""
        late = self._keeper.late()
        if not late:
            for deadline in self.state.overdue:
                self._metrics.expiry_lag_seconds.observe(max(0.0, -deadline.remaining(now)))
            self.state.overdue.clear()
        return late

    def _check_core_lost(self, now: Now) -> None:
        """Without a contact under this boot, the wall clock tells how long core has been away."""
        if not self.core_lost_grace or self._core_lost:
            return
        heard = self._books.heard
        away = now.wall - heard.wall if heard.boot is None else now.boot - heard.boot
        if away >= self.core_lost_grace:
            self._core_lost = True
            if self.state.sessions:
                _log.error("core lost for too long, all sessions end", away=round(away))
            self.state.core_lost(now)

    def _answer(self, step: Step, position: Position | None) -> None:
        if step.pulled:
            self.settled.set()
        if step.pulled or step.changed:
            now = self._clock()
            self._synced = now.boot
            self._metrics.last_sync.set(now.wall)
            self._metrics.applied_revision.set(0 if position is None else position.revision)
        self.reports.in_kernel(position, pulled=step.pulled)
        refused = self.reports.refused() if step.waiting else ()
        for item in step.waiting:
            if item.answer.done():
                continue
            match item:
                case Pulled(_, answer, verdict):
                    answer.set_result(Outcome(verdict, position, refused))
                case Changes(_, received_at, answer, verdict):
                    answer.set_result(Outcome(verdict, position, refused))
                    if verdict is Verdict.APPLIED:
                        self._metrics.push_to_kernel_seconds.observe(clock.monotonic() - received_at)
                case End(_, answer, ended):
                    if left := self._keeper.stuck.intersection(ended):
                        answer.set_exception(
                            DeviceError(
                                f"the device did not remove {len(left)} of {len(ended)} peers",
                                "their sessions are over, and removing them is tried again at each tick",
                            )
                        )
                    else:
                        answer.set_result({"ended": [format_key(key) for key in ended]})

    def _put_off(self, step: Step) -> None:
        """What has been taken in is not known to be in the kernel: the next step answers for it, too."""
        self._next.pulled |= step.pulled
        self._next.changed |= step.changed
        self._next.waiting[:0] = step.waiting
        step.waiting = []

    def _fail(self, step: Step, error: AgentError) -> None:
        for item in step.waiting:
            if not item.answer.done():
                item.answer.set_exception(error)
                # Whoever follows a stream need not look at each answer.
                item.answer.exception()
        step.waiting.clear()
        self._put_off(step)
