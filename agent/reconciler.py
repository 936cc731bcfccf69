"""The one writer: takes events off one queue, moves the state, and makes the interface follow.

Each step takes what has queued up, applies it to the pure state, journals new sessions, carries the
plan out, journals what ended, and only then answers whoever delivered the events (rules 15 and 16).
Nothing else writes to the interface or the journal.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, assert_never

import structlog

from agent import audit, clock, overview
from agent.books import Books
from agent.encoding import format_key
from agent.errors import AgentError, DeviceError, InvalidMessage
from agent.fence import Fence, Position, Verdict
from agent.journal import Contact, Journal
from agent.metrics import Metrics
from agent.model import (
    Change,
    InterfaceSettings,
    Now,
    ObservedDevice,
    PublicKey,
    Refusal,
    Snapshot,
)
from agent.plan import Drift, DriftKind, make_plan
from agent.ports import Link, Outcome
from agent.reporting import Reporting
from agent.sessions import Limits
from agent.state import State, UnknownPeer
from agent.writer import Writer

_log = structlog.get_logger(__name__)

ROUNDS: Final = 3
"""Whole plans tried after failures, before it goes peer by peer."""
LATE: Final = 1.0
"""Seconds past a deadline from which on a peer still on the interface makes the agent not ready."""


@dataclass(slots=True)
class _Pulled:
    snapshot: Snapshot
    answer: asyncio.Future[Outcome]
    verdict: Verdict = Verdict.HELD


@dataclass(slots=True)
class _Changes:
    changes: Sequence[Change]
    received_at: float
    answer: asyncio.Future[Outcome]
    verdict: Verdict = Verdict.HELD


@dataclass(slots=True)
class _Tick:
    done: Callable[[], None]


@dataclass(slots=True)
class _Observe:
    """A look at the interface is due."""


@dataclass(slots=True)
class _Reap:
    """Cut peers are left to be removed."""


@dataclass(slots=True)
class _End:
    keys: Sequence[PublicKey] | None
    answer: asyncio.Future[dict[str, Any]]
    ended: Sequence[PublicKey] = ()


@dataclass(slots=True)
class _Configure:
    limits: Limits


@dataclass(slots=True)
class _Ask:
    """A question that is answered from a state at rest."""

    answer_it: Callable[[], dict[str, Any]]
    answer: asyncio.Future[dict[str, Any]]


_Item = _Pulled | _Changes | _Tick | _Observe | _Reap | _End | _Configure | _Ask


@dataclass(slots=True)
class _Step:
    """What one step has taken in."""

    items: Sequence[_Item] = ()
    pulled: bool = False
    changed: bool = False
    waiting: list[_Pulled | _Changes | _End | _Ask] = field(default_factory=list)


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
    ) -> None:
        self.pull_wanted = asyncio.Event()
        self.settled = asyncio.Event()
        """Set once the first state is in the kernel, or core could not be had."""
        self.state = state
        self.core_lost_grace = core_lost_grace
        self.core_connected = False
        self.core_error = ""
        self.expiry_late = False
        self.writer = Writer(lambda: link.device)
        self._books = Books(journal, state)
        self.reports = Reporting(state, read_clock, self._books.reported)
        self._interface = interface
        self._link = link
        self._metrics = metrics
        self._clock = read_clock
        self._alive = alive
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._fence = Fence()
        self._core_lost = False
        self._settings: InterfaceSettings | None = None
        self._up = False
        self._broken = ""
        self._finished = False
        self._moved = asyncio.Event()

    # Inbox.

    @property
    def position(self) -> Position | None:
        """What is held now; None before the first pull of this process."""
        return self._fence.position

    def submit(self, message: Snapshot | Sequence[Change], received_at: float) -> asyncio.Future[Outcome]:
        """Queue a snapshot, or changes in their order."""
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if isinstance(message, Snapshot):
            self._queue.put_nowait(_Pulled(message, answer))
        else:
            self._queue.put_nowait(_Changes(message, received_at, answer))
        return answer

    def heard(self) -> None:
        """Bytes came from core just now."""
        now = self._clock()
        self._books.heard = Contact(now.boot, now.wall)
        self._core_lost = False

    def core_answered(self) -> None:
        """The last exchange with core succeeded."""
        if not self.core_connected:
            _log.info("core found")
        self.core_connected, self.core_error = True, ""
        self._metrics.core_connected.set(1)

    def core_failed(self, error: Exception) -> None:
        """The last exchange with core failed."""
        if self.core_connected:
            _log.warning("core lost", error=str(error))
        self.core_connected, self.core_error = False, str(error)
        self._metrics.core_connected.set(0)
        self.settled.set()

    def core_sent_rubbish(self, error: Exception) -> None:
        """Core sent something invalid, which was refused whole."""
        _log.warning("core sent something invalid", error=str(error))
        self._metrics.core_invalid.inc()

    # The daemon's timers.

    def tick(self, done: Callable[[], None] = lambda: None) -> None:
        """Check every deadline; ``done`` is called once the tick has passed through a whole step."""
        self._queue.put_nowait(_Tick(done))

    def observe(self) -> None:
        """Look at the interface: handshakes, counters, drift, idle sessions."""
        self._queue.put_nowait(_Observe())

    def configure(self, limits: Limits, core_lost_grace: float) -> None:
        """Take other ceilings from the configuration."""
        self.core_lost_grace = core_lost_grace
        self._queue.put_nowait(_Configure(limits))

    def next_wait(self) -> float | None:
        """Seconds until the next deadline, None if there is none."""
        return self.state.next_wait(self._clock())

    async def deadline_moved(self) -> None:
        """Return when the next deadline may have moved."""
        await self._moved.wait()
        self._moved.clear()

    # Operator.

    def status(self) -> dict[str, Any]:
        """The document of ``wg-agent status --json``."""
        about = {
            "interface": self._interface,
            "core_connected": self.core_connected,
            "core_error": self.core_error,
            "expiry_late": self.expiry_late,
            "journal_ok": self._books.ok,
            "device_error": self._broken,
            "reap_backlog": len(self.writer.to_reap),
        }
        return overview.status(self.state, self.writer.mirror, self._clock(), about)

    async def plan(self) -> dict[str, Any]:
        """Read the interface and return what a reconcile would change now, changing nothing."""
        device = await self._link.device.read()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        mirror = self.writer.mirror
        self._queue.put_nowait(
            _Ask(lambda: overview.plan(self._interface, self.state, mirror, device, self._clock()), answer)
        )
        return await answer

    async def end(self, keys: Sequence[PublicKey] | None) -> dict[str, Any]:
        """End the sessions of these peers (None: all); returns once they are off the interface."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_End(keys, answer))
        return await answer

    def refresh_metrics(self) -> None:
        """Bring the totals up to date; for a scrape, since they cost a walk over all peers."""
        by_state, by_reason = overview.counts(self.state, self.writer.mirror)
        self._metrics.set_peers(by_state)
        self._metrics.set_refused(by_reason)

    # Life.

    async def start(self) -> None:
        """Expire, adopt, and bring the interface to what is known without core (rule 14).

        Raises DeviceError if the interface can't be made or read.
        """
        state = self.state
        loaded = await self._books.load(self._clock())
        if loaded is not None:
            self.reports.ended(loaded.ends)
            self._link.addresses = loaded.addresses
        state.tick(self._clock())
        made = await self._link.ensure()
        if made:
            state.traffic.interface_made()
        await self._configure_link(state.interface)
        device = await self._link.device.read()
        self.writer.mirror.observe(device)
        state.adopt(device)
        state.observe(device, self._clock())
        await self._step(())
        adopted = sum(session.preshared_key is not None for session in state.sessions.values())
        _log.info("started", peers_found=len(device.peers), sessions_adopted=adopted)

    async def run(self) -> None:
        """Work off the queue until ``finish`` is called."""
        while not self._finished:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            await self._step(items)

    def finish(self) -> None:
        """Let ``run`` return after the step under way."""
        self._finished = True
        self.tick()

    async def stop(self) -> None:
        """Let go of device and journal; tunnels stay up."""
        await self._books.close()
        await self._link.close()

    # One step: take the events, make the interface follow, answer.

    async def _step(self, items: Sequence[_Item]) -> None:
        step = _Step(items)
        try:
            if await self._books.retry(self._clock()):
                self.state.unblock(self._clock())
            for item in items:
                await self._take(item, step)
            now = self._clock()
            self.state.tick(now)
            self._check_core_lost(now)
            await self._reconcile(step)
        except AgentError as error:
            if str(error) != self._broken:
                _log.error("reconcile failed, tried again at each tick", error=str(error))
            self._broken = str(error)
            self._fail(step, error)
        else:
            self._broken = ""
            self._answer(step)
        now = self._clock()
        self.expiry_late = any(-deadline.remaining(now) > LATE for deadline in self.state.overdue)
        self._metrics.sessions_active.set(len(self.state.sessions))
        self._metrics.reap_backlog.set(len(self.writer.to_reap))
        self._moved.set()
        for item in items:
            if isinstance(item, _Tick):
                item.done()

    async def _take(self, item: _Item, step: _Step) -> None:
        match item:
            case _Pulled(snapshot):
                step.waiting.append(item)
                self._take_snapshot(item, snapshot, step)
            case _Changes(changes):
                step.waiting.append(item)
                item.verdict = self._take_changes(changes, step)
                if item.verdict is Verdict.PULL:
                    self.pull_wanted.set()
            case _Observe():
                await self._look()
            case _End(keys):
                step.waiting.append(item)
                item.ended = self.state.end(keys, self._clock())
            case _Configure(limits):
                self.state.configure(limits, self._clock())
            case _Ask():
                step.waiting.append(item)
            case _Tick() | _Reap():
                pass
            case _:
                assert_never(item)

    def _take_snapshot(self, pulled: _Pulled, snapshot: Snapshot, step: _Step) -> None:
        try:
            pulled.verdict = self._fence.judge_snapshot(snapshot)
        except InvalidMessage as error:
            pulled.answer.set_exception(error)
            return
        if pulled.verdict is not Verdict.APPLIED:
            return
        state, now = self.state, self._clock()
        state.load(snapshot, now)
        self._fence.advance(snapshot.epoch, snapshot.revision, now)
        self._metrics.clock_skew.set(now.wall - state.core_time(now))
        step.pulled = True
        _log.info(
            "state pulled",
            position=str(self.position),
            peers=len(snapshot.peers),
            sessions=len(state.sessions),
            refused=len(state.roster.refused) + len(snapshot.unreadable),
        )

    def _take_changes(self, changes: Sequence[Change], step: _Step) -> Verdict:
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
            audit.changed(change)
            step.changed = True
            applied = verdict
        return applied

    async def _look(self) -> None:
        """Read the interface and take in what has changed on it, by us or by somebody else."""
        try:
            device = await self._link.device.read()
        except DeviceError as error:
            if error.errno != errno.ENODEV:
                raise
            await self._make_interface_again(error)
            return
        now = self._clock()
        drift, again = self.writer.mirror.observe(device)
        of_the_device = list(self._device_drift(device))
        for difference in (*drift, *of_the_device):
            self._note_drift(difference)
        if of_the_device:
            self._settings = None
        changed = self.state.observe(device, now)
        self.state.dirty |= again
        self.state.unblock(now)
        if await self._books.observed(changed):
            self.reports.observed()

    def _device_drift(self, device: ObservedDevice) -> Iterable[Drift]:
        own_key = self.state.roster.own_key
        if own_key is not None and device.public_key != own_key:
            yield Drift(DriftKind.PRIVATE_KEY, None, "the interface has another private key")
        port, fwmark = self._link.listen_port, self._link.fwmark
        if port is not None and device.listen_port != port:
            yield Drift(DriftKind.LISTEN_PORT, None, f"listens on {device.listen_port} instead of {port}")
        if fwmark is not None and device.fwmark != fwmark:
            yield Drift(DriftKind.FWMARK, None, f"has {device.fwmark:#x} instead of {fwmark:#x}")

    async def _make_interface_again(self, error: DeviceError) -> None:
        self._note_drift(Drift(DriftKind.INTERFACE, None, str(error)))
        self._settings, self._up = None, False
        if await self._link.ensure():
            self.state.traffic.interface_made()
        await self._configure_link(self.state.interface)
        self.writer.mirror.observe(await self._link.device.read())
        self.writer.reconsider()
        self.state.dirty.update(self.state.roster.peers, self.writer.mirror.peers)

    async def _configure_link(self, settings: InterfaceSettings) -> None:
        before = self._link.addresses
        for change in await self._link.configure(settings):
            _log.info("interface changed", change=change)
        if self._link.addresses != before:
            await self._books.addresses(self._link.addresses)
        self._settings = settings

    async def _reconcile(self, step: _Step) -> None:
        """Make the interface follow the state; raises DeviceError if it will not."""
        state, writer = self.state, self.writer
        started, did_something, failures = clock.monotonic(), False, 0
        while True:
            try:
                if self._settings != state.interface:
                    await self._configure_link(state.interface)
                while state.dirty:
                    did_something |= await self._follow(one_by_one=failures >= ROUNDS)
                if not self._up:
                    await self._link.bring_up()
                    self._up = True
                break
            except DeviceError as error:
                failures += 1
                if failures > ROUNDS:
                    raise
                _log.warning("the device failed, reading it again", error=str(error), failures=failures)
                await self._read_again(error)
        await self._keep_books(step)
        if await writer.reap():
            self._queue.put_nowait(_Reap())
        if did_something:
            self._metrics.apply_seconds.observe(clock.monotonic() - started)

    async def _follow(self, *, one_by_one: bool) -> bool:
        """Plan for the dirty peers and carry it out; what turns up meanwhile is dirty again."""
        state, writer = self.state, self.writer
        now = self._clock()
        state.tick(now)
        dirty, state.dirty = state.dirty, set()
        plan = make_plan(((key, state.wanted(key, now)) for key in dirty), writer.mirror)
        try:
            for add in plan.adds:
                state.added(add.public_key, now)
            for key in plan.adopted:
                state.adopted(key, now)
            unjournalled = await self._books.before_kernel()
            if unjournalled:
                state.block(unjournalled, Refusal.NOT_JOURNALLED)
                state.dirty |= dirty
                return False
            if one_by_one:
                self._block(await writer.one_by_one(plan))
            elif not await writer.carry_out(plan, self._nothing_is_due):
                state.dirty |= dirty
        except BaseException:
            state.dirty |= dirty
            raise
        return bool(plan)

    async def _nothing_is_due(self) -> bool:
        """Between the slices of a long plan: deadlines do not wait for its end."""
        self._alive()
        before = len(self.state.ends)
        self.state.tick(self._clock())
        return len(self.state.ends) == before

    def _block(self, failed: dict[PublicKey, DeviceError]) -> None:
        for key, error in failed.items():
            _log.error("the device refuses a peer", peer=format_key(key), error=str(error))
        self.state.block(failed, Refusal.DEVICE)
        # Not again in this step: the next look at the interface gives them another chance.
        self.state.dirty.difference_update(failed)

    async def _read_again(self, error: DeviceError) -> None:
        if error.errno == errno.ENODEV:
            await self._make_interface_again(error)
            return
        _, again = self.writer.mirror.observe(await self._link.device.read())
        self.writer.reconsider()
        self.state.dirty |= again

    async def _keep_books(self, step: _Step) -> None:
        """Journal, count and report what ended, now that the interface has followed."""
        now = self._clock()
        for deadline in self.state.overdue:
            self._metrics.expiry_lag_seconds.observe(max(0.0, -deadline.remaining(now)))
        self.state.overdue.clear()
        ends = await self._books.after_kernel(now, listed=step.pulled or step.changed, pulled=step.pulled)
        for end in ends:
            self._metrics.session_ends.labels(end.reason.value).inc()
        audit.ended(ends)
        self.reports.ended(ends)

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

    def _answer(self, step: _Step) -> None:
        if step.pulled:
            self.settled.set()
        if step.pulled or step.changed:
            self._metrics.last_sync.set(self._clock().wall)
            self._metrics.applied_revision.set(self.state.revision)
        self.reports.in_kernel(pulled=step.pulled)
        refused = self.reports.refused() if step.waiting else ()
        for item in step.waiting:
            if item.answer.done():
                continue
            match item:
                case _Pulled(_, answer, verdict):
                    answer.set_result(Outcome(verdict, self.position, refused))
                case _Changes(_, received_at, answer, verdict):
                    answer.set_result(Outcome(verdict, self.position, refused))
                    if verdict is Verdict.APPLIED:
                        self._metrics.push_to_kernel_seconds.observe(clock.monotonic() - received_at)
                case _End(_, answer, ended):
                    answer.set_result({"ended": [format_key(key) for key in ended]})
                case _Ask(answer_it, answer):
                    answer.set_result(answer_it())

    def _fail(self, step: _Step, error: AgentError) -> None:
        for item in step.waiting:
            if not item.answer.done():
                item.answer.set_exception(error)
                # Whoever follows a stream need not look at each answer.
                item.answer.exception()

    def _note_drift(self, drift: Drift) -> None:
        self._metrics.drift.labels(drift.kind.value).inc()
        audit.drifted(drift)
