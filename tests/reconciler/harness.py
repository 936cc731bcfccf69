"""A reconciler on a recording device, a real journal and a clock that the test moves."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.desk import Desk
from agent.errors import JournalError
from agent.journal import Entry, Journal
from agent.metrics import Metrics
from agent.model import (
    Change,
    ChangeBody,
    Grant,
    Now,
    PeerUpserted,
    PresharedKey,
    PublicKey,
    SessionEnd,
    SessionGranted,
    SessionRevoked,
    Snapshot,
)
from agent.plan import CUT
from agent.ports import Applied, Outcome
from agent.reconciler import Reconciler
from agent.sessions import Limits
from agent.state import State
from agent.warden import Warden
from tests.support.builders import NOW, OWN_KEY, grant, key, peer, snapshot
from tests.support.recording_device import Host
from tests.support.recording_guard import RecordingGuard

__all__ = ["CUT", "Agent", "Clock", "Core", "World", "granted", "revoked", "run", "upserted"]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def granted(number: int, session: Grant) -> SessionGranted:
    return SessionGranted(key(number), session)


def revoked(number: int, session_id: str) -> SessionRevoked:
    return SessionRevoked(key(number), session_id)


def upserted(number: int, *allowed_ips: str, **members: Any) -> PeerUpserted:
    return PeerUpserted(peer(number, *allowed_ips, **members))


class Clock:
    """The host's clocks."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> Now:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now = Now(self.now.boot + seconds, self.now.wall + seconds)

    def step(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.now = Now(self.now.boot, self.now.wall + seconds)


class WatchedJournal(Journal):
    """The real journal, its writes in the host's log; ``World.journal_fails`` breaks it."""

    def __init__(self, world: "World") -> None:
        super().__init__(world.folder, world.boot_id)
        self._world = world

    def load(self) -> Any:
        if self._world.journal_fails:
            raise JournalError("the disk is gone")
        return super().load()

    def write(self, entry: Entry) -> None:
        if not entry:
            return
        if self._world.journal_fails:
            raise JournalError("the disk is gone")
        host = self._world.host
        host.at("journal")
        self._world.disk_takes()
        super().write(entry)
        host.log.append(("journal", entry))
        host.at("journal, after")


@dataclass
class World:
    """What outlives the agent's process, and the time."""

    folder: Path
    host: Host = field(default_factory=Host)
    clock: Clock = field(default_factory=Clock)
    boot_id: str = "boot-1"
    journal_fails: bool = False
    disk_takes: Callable[[], None] = lambda: None
    guard: RecordingGuard | None = None
    guard_required: bool = True

    def agent(self, **members: Any) -> "Agent":
        return Agent(self, **members)

    def on_interface(self) -> dict[PublicKey, PresharedKey | None]:
        """The peers that the kernel would let in, with their PSKs."""
        peers = self.host.kernel.peers
        return {k: p.preshared_key for k, p in peers.items() if p.allowed_ips}

    def reboot(self, *, boot_id: str = "boot-2", step: float = 0.0) -> None:
        """The host starts anew; boot time does too."""
        self.boot_id = boot_id
        self.host.delete()
        self.clock.now = Now(10.0, self.clock.now.wall + step)

    def journalled(self) -> list[Entry]:
        return [what for kind, what in self.host.log if kind == "journal"]  # type: ignore[misc]


@dataclass
class Core:
    """Where core's history stands; ``asked_at`` is boot time."""

    clock: Clock
    epoch: str = "e1"
    revision: int = 0

    def state(self, peers: Sequence[Any] = (), **members: Any) -> Snapshot:
        """The next revision as a whole, requested now."""
        self.revision += 1
        return self.same(peers, **members)

    def same(self, peers: Sequence[Any] = (), **members: Any) -> Snapshot:
        """The present revision as a whole."""
        now = self.clock.now
        members.setdefault("server_time", NOW.wall + now.boot - NOW.boot)
        members.setdefault("requested_at", now.boot)
        members = {"epoch": self.epoch, "revision": self.revision, **members}
        return snapshot(peers, **members)

    def change(self, body: ChangeBody) -> Change:
        """The next revision as a change."""
        self.revision += 1
        return Change(self.epoch, self.revision, body)


class Agent:
    """One process; leaving the block stops it as SIGTERM does."""

    def __init__(
        self,
        world: World,
        *,
        limits: Limits | None = None,
        core_lost_grace: float = 0.0,
        service_result: str = "",
    ) -> None:
        self.world = world
        self.alive = 0
        self.state = State(limits, OWN_KEY)
        self.metrics = Metrics("wg0", "0")
        self.journal = WatchedJournal(world)
        self.warden = None if world.guard is None else self._warden(world.guard)
        self.reconciler = Reconciler(
            interface="wg0",
            state=self.state,
            link=world.host.link(),
            journal=self.journal,
            metrics=self.metrics,
            read_clock=world.clock,
            core_lost_grace=core_lost_grace,
            alive=self._alive,
            warden=self.warden,
            service_result=service_result,
        )
        self.inbox = self.reconciler.inbox
        self.desk = Desk(self.reconciler, self.metrics, self.warden, world.clock)
        self._task: asyncio.Task[None] | None = None

    def _warden(self, guard: RecordingGuard) -> Warden:
        return Warden(
            state=self.state,
            guard=guard,
            read_clock=self.world.clock,
            required=self.world.guard_required,
            lease=300.0,
        )

    def _alive(self) -> None:
        self.alive += 1

    async def __aenter__(self) -> Self:
        await self.reconciler.start()
        self._task = asyncio.create_task(self.reconciler.run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is None:
            return
        if error is None:
            self.reconciler.finish()
            await self._task
            await self.reconciler.stop()
        else:
            self.kill()

    def kill(self) -> None:
        """SIGKILL: nothing more is done."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        # A write under way is let through: the process would take its thread along.
        self.reconciler.books._disk.submit(self.journal.close).result()

    async def _wait(self, answer: "asyncio.Future[Any]") -> Any:
        assert self._task is not None
        await asyncio.wait({answer, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self._task.result()
        return answer.result()

    async def give(self, message: Snapshot | Sequence[Change]) -> Outcome:
        """Deliver it, wait for what came of it, and until the step is over, its list journalled."""
        outcome = await self._wait(self.inbox.submit(message, time.monotonic()))
        assert isinstance(outcome, Outcome)
        step = self.reconciler._under_way
        while step is not None and self.reconciler._under_way is step:  # noqa: ASYNC110 nobody sets an event
            await asyncio.sleep(0)
        return outcome

    async def tick(self) -> None:
        """A tick, through a whole step."""
        done = asyncio.get_running_loop().create_future()
        self.reconciler.tick(lambda: done.set_result(None))
        await self._wait(done)

    async def look(self) -> None:
        """An observation, through a whole step."""
        self.reconciler.observe()
        await self.tick()

    async def reaped(self) -> None:
        """Until no cut peer is left."""
        while self.reconciler.writer.to_reap:
            await self.tick()

    async def end(self, *numbers: int) -> dict[str, Any]:
        """The operator ends these sessions."""
        answer = asyncio.ensure_future(self.desk.end([key(n) for n in numbers]))
        ended = await self._wait(answer)
        assert isinstance(ended, dict)
        return ended

    # What it says.

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics._registry.get_sample_value(name, labels or None)
        assert value is not None, name
        return value

    def drift(self) -> dict[str, float]:
        """Counted drift by kind."""
        samples = (
            sample
            for family in self.metrics._registry.collect()
            if family.name == "wg_agent_drift"
            for sample in family.samples
        )
        return {sample.labels["kind"]: sample.value for sample in samples if sample.value}

    def ends(self) -> dict[str, str]:
        """Reasons of the ends that core has not taken, by session."""
        return {end.session_id: end.reason.value for end in self.unreported()}

    def unreported(self) -> tuple[SessionEnd, ...]:
        return self.reconciler.reports.ends(10_000)

    def applied(self) -> Applied | None:
        return self.reconciler.reports.applied()

    async def acknowledge(self) -> Applied:
        """Core takes what is to be said of the revision."""
        applied = self.applied()
        assert applied is not None
        self.reconciler.reports.applied_accepted(applied)
        return applied


def with_agent(
    world: World, scenario: Callable[[Agent, Core], Coroutine[Any, Any, None]], **members: Any
) -> None:
    """Run a scenario with an agent that has been started."""

    async def main() -> None:
        async with world.agent(**members) as agent:
            await scenario(agent, Core(world.clock))

    run(main())


def address(number: int) -> str:
    """Of a peer whose number may be above 255."""
    return f"10.8.{number >> 8}.{number & 255}"


def live(number: int, *, psk: int = 0, session: str = "", **members: Any) -> Any:
    """A listed peer with a session of an hour (``lasts``)."""
    return peer(number, address(number), session=grant(session or f"s{number}", psk or number, **members))
