"""The pure core driven in the reconciler's order, against the kernel model and a journal of the same kind.

One step is: an event moves the state, a tick ends what is due, the plan is made over the dirty peers,
sessions are journalled, the plan is carried out, ends are journalled. It can crash between any two of
those.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from agent.model import (
    AddPeer,
    ChangeBody,
    InterfaceSettings,
    Location,
    Now,
    Operation,
    Peer,
    PublicKey,
    SessionEnd,
    SessionPolicy,
    Snapshot,
)
from agent.plan import CUT, Mirror, Plan, make_plan
from agent.sessions import Deadline, Limits, Liveness, Session
from agent.state import Restored, State
from agent.traffic import Traffic
from tests.support.builders import NOW, OWN_KEY
from tests.support.kernel_model import Kernel


class Crashed(Exception):
    """The process was killed; the kernel and the journal are what is left."""


@dataclass
class Journal:
    """What outlives the process, without a secret."""

    boot_id: int = 0
    sessions: dict[tuple[str, PublicKey], tuple[Session, Liveness | None, int]] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    ends: list[SessionEnd] = field(default_factory=list)
    traffic: dict[PublicKey, Traffic] = field(default_factory=dict)
    location: Location | None = None
    policy: SessionPolicy = field(default_factory=SessionPolicy)
    peers: dict[PublicKey, Peer] = field(default_factory=dict)

    def restored(self) -> Restored:
        """What a new process of this boot is given."""
        return Restored(
            location=self.location,
            interface=InterfaceSettings(),
            session_policy=self.policy,
            peers=tuple(self.peers.values()),
            sessions=tuple(
                self._session(*self.sessions[row]) for row in sorted(self.sessions, key=lambda row: row)
            ),
            ended=tuple(self.ended.items()),
        )

    def _session(
        self, session: Session, liveness: Liveness | None, boot_id: int
    ) -> tuple[Session, Liveness | None]:
        if boot_id == self.boot_id:
            return session, liveness
        session = replace(session, deadline=Deadline(None, session.deadline.wall))
        if liveness is not None:
            seen = None if liveness.last_sign_at is None else 0.0
            liveness = Liveness(0.0, liveness.latest_handshake, None, seen)
        return session, liveness


class PureAgent:
    """One process; ``crash_after`` counts the points at which it may be killed."""

    def __init__(self, kernel: Kernel, journal: Journal, limits: Limits | None = None) -> None:
        self.kernel = kernel
        self.journal = journal
        self.state = State(limits, OWN_KEY)
        self.mirror = Mirror()
        self.reported: list[SessionEnd] = []
        self.crash_after: int | None = None

    def start(self, now: Now, elements_left: Mapping[PublicKey, float] | None = None) -> list[Operation]:
        """Expire, adopt, reconcile with what is known without core, and with what the guard's table tells."""
        state = self.state
        state.traffic.restore(self.journal.traffic.items())
        state.restore(self.journal.restored(), now)
        state.tick(now)
        device = self.kernel.read()
        self.mirror.observe(device)
        state.adopt(device, elements_left or {}, now)
        for key in state.observe(device, now):
            self.journal.traffic[key] = state.traffic.get(key)
        return self.reconcile(now)

    def load(self, snapshot: Snapshot, now: Now) -> list[Operation]:
        first = self.state.epoch is None
        self.state.load(snapshot, now)
        if first:
            # What was added before the first state may have taken prefixes of peers left as found.
            self.state.dirty |= self.mirror.observe(self.kernel.read())[1]
        return self.reconcile(now)

    def change(self, body: ChangeBody, now: Now) -> list[Operation]:
        self.state.change(body, now)
        return self.reconcile(now)

    def tick(self, now: Now) -> list[Operation]:
        self.state.tick(now)
        return self.reconcile(now)

    def end(self, keys: list[PublicKey] | None, now: Now) -> list[Operation]:
        self.state.end(keys, now)
        return self.reconcile(now)

    def core_lost(self, now: Now) -> list[Operation]:
        self.state.core_lost(now)
        return self.reconcile(now)

    def observe(self, now: Now) -> list[Operation]:
        device = self.kernel.read()
        _, again = self.mirror.observe(device)
        for key in self.state.observe(device, now):
            self.journal.traffic[key] = self.state.traffic.get(key)
        self.state.dirty |= again
        return self.reconcile(now)

    def reconcile(self, now: Now) -> list[Operation]:
        """Make the kernel follow the state; return what was done to it."""
        state, done = self.state, []
        state.tick(now)
        while state.dirty:
            dirty, state.dirty = state.dirty, set()
            self._check_that_dirty_is_enough(dirty, now)
            plan = make_plan(((key, state.wanted(key, now)) for key in sorted(dirty)), self.mirror)
            self._may_crash()
            for add in plan.adds:
                state.added(add.public_key, now)
            for key in plan.adopted:
                state.adopted(key, now)
            self._journal_sessions()
            self._may_crash()
            for operation in plan:
                self.kernel.apply(operation)
                self._may_crash()
                if isinstance(operation, AddPeer):
                    state.traffic.added(operation.public_key)
                self.mirror.acknowledge(operation, plan.tenures.get(operation.public_key, CUT))
                done.append(operation)
        self._journal_sessions()
        self._journal_ends()
        self._may_crash()
        return done

    def plan_over_all(self, now: Now) -> Plan:
        """What would be done if everything were looked at."""
        keys = sorted(self.state.roster.peers.keys() | self.mirror.peers.keys())
        return make_plan(((key, self.state.wanted(key, now)) for key in keys), self.mirror.copy())

    def _check_that_dirty_is_enough(self, dirty: set[PublicKey], now: Now) -> None:
        some = make_plan(((key, self.state.wanted(key, now)) for key in sorted(dirty)), self.mirror.copy())
        missed = set(self.plan_over_all(now)) - set(some)
        assert not missed, f"not dirty, but to be changed: {missed}"

    def _may_crash(self) -> None:
        if self.crash_after is not None:
            if self.crash_after == 0:
                raise Crashed
            self.crash_after -= 1

    def _journal_sessions(self) -> None:
        state = self.state
        for key in list(state.to_journal):
            session = state.sessions.get(key)
            if session is not None:
                kept = replace(session, preshared_key=None, journalled_digest=session.psk_digest)
                self.journal.sessions[session.id, key] = kept, state.liveness.get(key), self.journal.boot_id
        state.to_journal.clear()

    def _journal_ends(self) -> None:
        state, journal = self.state, self.journal
        for end in state.ends:
            journal.sessions.pop((end.session_id, end.public_key), None)
            journal.ended.setdefault(end.session_id, state.roster.ended[end.session_id])
            journal.ends.append(end)
            self.reported.append(end)
        state.ends.clear()
        state.overdue.clear()
        for key in state.relisted:
            listed = state.roster.peers.get(key)
            if listed is None:
                journal.peers.pop(key, None)
            else:
                journal.peers[key] = listed._replace(
                    fault=listed.fault or listed.session_fault,
                    session=None,
                    session_fault=None,
                    preshared_key=None,
                    static_key_unknown=listed.preshared_key is not None,
                )
        state.relisted.clear()
        if state.epoch is not None:
            journal.location, journal.policy = state.location, state.session_policy


def adds(operations: list[Operation]) -> set[PublicKey]:
    """Keys of the peers that were added."""
    return {operation.public_key for operation in operations if isinstance(operation, AddPeer)}


def running(snapshot: Snapshot | None = None, now: Now = NOW, *, limits: Limits | None = None) -> PureAgent:
    """An agent started on an empty host, with this state of core's."""
    agent = PureAgent(Kernel(), Journal(), limits)
    agent.start(now)
    if snapshot is not None:
        agent.load(snapshot, now)
    return agent


def restarted(agent: PureAgent, now: Now, *, limits: Limits | None = None, reboot: bool = False) -> PureAgent:
    """Another process on what the last one left behind."""
    if reboot:
        agent.kernel.reboot()
        agent.journal.boot_id += 1
    again = PureAgent(agent.kernel, agent.journal, limits)
    again.start(now)
    return again
