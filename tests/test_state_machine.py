"""The pure core under everything that can happen to it, held to a naive reading of the rules.

Core sends snapshots and changes, good and bad ones; clocks are stepped, time passes, hosts reboot,
clients connect, an outsider uses ``wg set``, and the process is killed between any two steps.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from agent import roster
from agent.model import (
    AddPeer,
    ChangeBody,
    Grant,
    LocationChanged,
    Now,
    Operation,
    Peer,
    PeerRemoved,
    PeerUpserted,
    PresharedKey,
    PublicKey,
    Refusal,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
    Snapshot,
)
from agent.sessions import Deadline, Limits
from agent.state import State
from tests.support.builders import CORE, OWN_KEY, key, location_changed, prefixes, psk, snapshot
from tests.support.kernel_model import Kernel, KernelPeer
from tests.support.oracle import Life, Live, Oracle, dated
from tests.support.pure_agent import Crashed, Journal, PureAgent

pytestmark = pytest.mark.timeout(300)  # a failure takes long to shrink; passing takes seconds

FEW = roster._FEW
KEYS = [key(1), key(2), key(3), key(4)]
PREFIXES = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.8/30", "10.0.0.9", "fd00::1"]
OUTSIDER = psk(10**6)

keys = st.sampled_from(KEYS)
seldom = st.sampled_from([False] * 9 + [True])
allowed_ips = st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=2, unique=True)
policies = st.builds(
    SessionPolicy,
    idle_timeout=st.sampled_from([None, 60.0, 1000.0]),
    connect_timeout=st.sampled_from([None, 60.0]),
    max_lifetime=st.sampled_from([None, None, 50.0, 500.0, 5000.0]),
    liveness=st.sampled_from(["gateway", "gateway", "core"]),
)
grant_kinds = st.sampled_from(
    ["fresh"] * 6 + ["renew", "renew", "new psk", "altered", "old id", "another's id", "stale", "faulty"]
)
lasts = st.sampled_from([30.0, 300.0, 300.0, 3000.0])


class Agent(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.booted_at = -1000.0
        self.wall_step = 0.0
        self.kernel = Kernel()
        self.journal = Journal()
        self.limits = Limits()
        self.oracle = Oracle()
        self.core: dict[PublicKey, Peer] = {}
        self.mfa, self.policy, self.location = True, SessionPolicy(), "7"
        self.epoch, self.revision = 1, 0
        self.minted: dict[str, PublicKey] = {}
        self.psk_owner: dict[PresharedKey | None, str] = {}
        self.psks: dict[str, list[PresharedKey]] = {}
        self.made = 0
        self.drifted: set[PublicKey] = set()
        self.deadlines: dict[str, tuple[int, float, Deadline]] = {}
        self.dead: set[str] = set()
        self.totals: dict[PublicKey, tuple[int, int]] = {}
        self.true_rx: dict[PublicKey, int] = {}
        self.agent = PureAgent(self.kernel, self.journal, self.limits)
        self.agent.start(self.now)

    # Clocks.

    @property
    def now(self) -> Now:
        return Now(self.seconds - self.booted_at, CORE + self.seconds + self.wall_step)

    @property
    def core_time(self) -> float:
        return CORE + self.seconds

    @rule(step=st.sampled_from([-100_000.0, -50.0, 50.0, 1000.0]))
    def the_wall_clock_is_stepped(self, step: float) -> None:
        self.wall_step += step
        self.step(None)

    @rule(seconds=st.sampled_from([0.5, 10.0, 50.0, 150.0, 400.0]), timer=st.booleans())
    def time_passes(self, seconds: float, timer: bool) -> None:
        self.seconds += seconds
        if timer:
            self.step(None)

    # Core.

    def grant(
        self, who: PublicKey, kind: str, lasting: float, pick: int
    ) -> tuple[Grant | None, Refusal | None]:
        """A grant as core may send it, right or wrong."""
        shown = self.core[who].session if who in self.core else None
        live = self.oracle.live.get(who)
        now = self.core_time
        match kind:
            case "faulty":
                return None, Refusal.INVALID_PRESHARED_KEY
            case "renew" if shown:
                return replace(shown, expires_at=max(now, dated(shown)) + lasting), None
            case "new psk" if live:
                grant = Grant(live.id, self.mint_psk(live.id), live.granted_at, live.expires_at)
                return grant, None
            case "altered" if shown:
                return replace(shown, granted_at=dated(shown) - 5.0), None
            case "old id" | "another's id" if self.minted:
                session_id = sorted(self.minted)[pick % len(self.minted)]
                held = [p.session for p in self.core.values() if p.session and p.session.id == session_id]
                if kind == "another's id" and held:
                    return held[0], None
                return Grant(session_id, self.psks[session_id][-1], now - 1.0, now + lasting), None
            case "stale":
                session_id = self.mint(who)
                return Grant(session_id, self.mint_psk(session_id), now - lasting, now), None
            case _:
                session_id = self.mint(who)
                return Grant(session_id, self.mint_psk(session_id), now, now + lasting), None

    def mint(self, who: PublicKey) -> str:
        self.made += 1
        session_id = f"s-{1000 - self.made}"
        self.minted[session_id] = who
        return session_id

    def mint_psk(self, session_id: str) -> PresharedKey:
        self.made += 1
        made = psk(self.made)
        self.psk_owner[made] = session_id
        self.psks.setdefault(session_id, []).append(made)
        return made

    @initialize(data=st.data(), mfa=st.booleans(), few=st.sampled_from([0, 8]))
    def core_has_peers(self, data: st.DataObject, mfa: bool, few: int) -> None:
        self.mfa = mfa
        # Lists are taken in one by one, however much of them is listed differently, or hardly ever.
        roster._FEW = few  # type: ignore[misc]
        for who in KEYS[: data.draw(st.integers(0, 4))]:
            self.core[who] = self.draw_peer(data, who)
        self.pull()

    def teardown(self) -> None:
        roster._FEW = FEW  # type: ignore[misc]

    def draw_peer(self, data: st.DataObject, who: PublicKey) -> Peer:
        session, fault = None, None
        if data.draw(st.booleans()):
            session, fault = self.grant(
                who, data.draw(grant_kinds), data.draw(lasts), data.draw(st.integers(0, 9))
            )
        return Peer(
            who,
            prefixes(*data.draw(allowed_ips)),
            persistent_keepalive=data.draw(st.sampled_from([0, 25])),
            mfa_exempt=data.draw(st.sampled_from([False, False, True])),
            preshared_key=data.draw(st.sampled_from([None, None, psk(10**7), psk(10**7 + 1)])),
            session=session,
            session_fault=fault,
            fault=Refusal.INVALID_KEEPALIVE if data.draw(seldom) else None,
        )

    def pull(self, crash_after: int | None = None, twice: PublicKey | None = None) -> None:
        peers = list(self.core.values())
        if twice in self.core:
            peers.append(self.core[twice]._replace(session=None, allowed_ips=prefixes(PREFIXES[0])))
        self.revision += 1
        self.step(
            snapshot(
                peers,
                epoch=str(self.epoch),
                revision=self.revision,
                server_time=self.core_time,
                requested_at=self.now.boot,
                mfa_required=self.mfa,
                location=self.location,
                policy=self.policy,
            ),
            crash_after,
        )

    crashes = st.none() | st.none() | st.integers(0, 8)

    @rule(crash=crashes, twice=st.none() | keys)
    def core_is_pulled(self, crash: int | None, twice: PublicKey | None) -> None:
        self.pull(crash, twice)

    @rule(data=st.data(), crash=crashes, epoch=seldom, location=seldom)
    def much_changes_and_core_is_pulled(
        self, data: st.DataObject, crash: int | None, epoch: bool, location: bool
    ) -> None:
        for who in sorted(data.draw(st.sets(keys))):
            if data.draw(seldom):
                self.core.pop(who, None)
            else:
                self.core[who] = self.draw_peer(data, who)
        self.mfa = data.draw(st.sampled_from([True, True, False]))
        self.epoch += epoch
        self.location = "8" if location else "7"
        self.pull(crash)

    def send(self, body: ChangeBody, crash: int | None, *, together: bool = False) -> None:
        """A change of the stream; to a process that has not pulled yet core is pulled instead.

        With ``together`` the reconciler takes it in one step with what comes next.
        """
        if self.agent.state.epoch is None:
            self.pull(crash)
            return
        self.revision += 1
        if together:
            self.oracle.take(body, self.now)
            self.agent.state.change(body, self.now)
        else:
            self.step(body, crash)

    @rule(data=st.data(), who=keys, crash=crashes, together=seldom)
    def a_peer_is_upserted(
        self, data: st.DataObject, who: PublicKey, crash: int | None, together: bool
    ) -> None:
        self.core[who] = self.draw_peer(data, who)
        self.send(PeerUpserted(self.core[who]), crash, together=together)

    @precondition(lambda self: self.core)
    @rule(who=keys, crash=crashes)
    def a_peer_is_removed(self, who: PublicKey, crash: int | None) -> None:
        if who in self.core:
            del self.core[who]
            self.send(PeerRemoved(who), crash)

    @precondition(lambda self: self.core)
    @rule(
        who=keys,
        kind=grant_kinds,
        lasting=lasts,
        pick=st.integers(0, 9),
        crash=crashes,
        together=seldom,
        late=st.sampled_from([False, False, False, True]),
    )
    def a_session_is_granted(
        self,
        who: PublicKey,
        kind: str,
        lasting: float,
        pick: int,
        crash: int | None,
        together: bool,
        late: bool,
    ) -> None:
        """One that is ``late`` comes when the deadline has just passed and no tick has seen it."""
        if who not in self.core:
            return
        live = self.oracle.live.get(who)
        if late and live is not None and live.boot is not None:
            self.seconds += max(0.0, live.boot - self.now.boot) + 0.5
        grant, fault = self.grant(who, kind, lasting, pick)
        self.core[who] = self.core[who]._replace(session=grant, session_fault=fault)
        self.send(SessionGranted(who, grant, fault), crash, together=together)

    @precondition(lambda self: self.core and self.minted)
    @rule(who=keys, own=st.booleans(), pick=st.integers(0, 9), crash=crashes, together=st.booleans())
    def a_session_is_revoked(
        self, who: PublicKey, own: bool, pick: int, crash: int | None, together: bool
    ) -> None:
        if who not in self.core:
            return
        shown = self.core[who].session
        session_id = shown.id if own and shown else sorted(self.minted)[pick % len(self.minted)]
        if shown and shown.id == session_id:
            self.core[who] = self.core[who]._replace(session=None)
        self.send(SessionRevoked(who, session_id), crash, together=together)

    @rule(mfa=st.booleans(), policy=policies, location=seldom, crash=crashes)
    def the_location_is_changed(
        self, mfa: bool, policy: SessionPolicy, location: bool, crash: int | None
    ) -> None:
        self.mfa, self.policy = mfa, policy
        self.location = "8" if location else "7"
        change: LocationChanged = location_changed(mfa_required=mfa, policy=policy, location=self.location)
        self.send(change, crash)

    # The host.

    @rule(who=st.none() | keys)
    def the_operator_ends_sessions(self, who: PublicKey | None) -> None:
        before = self.stays()
        self.oracle.pass_time(self.now)
        self.agent.state.tick(self.now)
        had = self.agent.state.end(None if who is None else [who], self.now)
        assert set(had) == set(self.oracle.live) & (set(KEYS) if who is None else {who})
        for ended in had:
            self.oracle.end(ended)
        self.finish(before, lambda: self.agent.reconcile(self.now))

    @rule(lifetime=st.sampled_from([100.0, 1000.0, 86400.0]))
    def the_configuration_is_reloaded(self, lifetime: float) -> None:
        before = self.stays()
        self.limits = Limits(max_lifetime=lifetime)
        self.oracle.pass_time(self.now)
        self.oracle.max_lifetime = lifetime
        self.oracle._lower()
        self.oracle.pass_time(self.now)
        self.agent.state.configure(self.limits, self.now)
        self.finish(before, lambda: self.agent.reconcile(self.now))

    @rule()
    def the_interface_is_looked_at(self) -> None:
        before = self.stays()
        now = self.now
        self.oracle.pass_time(now)
        self.agent.state.tick(now)
        for who, peer in self.kernel.peers.items():
            self.oracle.look(who, peer.latest_handshake, peer.rx_bytes, now)
        reported = len(self.agent.reported) + len(self.agent.state.ends)
        self.oracle.disturbed |= self.drifted
        expected = self.oracle.end_the_lifeless(set(self.kernel.peers), now)
        self.drifted = set()
        self.finish(before, lambda: self.agent.observe(now))
        assert {end.session_id for end in self.agent.reported[reported:]} == expected

    @rule(who=keys, pick=st.integers(0, 5), size=st.integers(1, 999))
    def a_client_connects(self, who: PublicKey, pick: int, size: int) -> None:
        peer = self.kernel.peers.get(who)
        if peer is None or who not in self.agent.mirror.peers:
            return
        known = [
            made for owner, made_for in self.psks.items() if self.minted[owner] == who for made in made_for
        ]
        tried = known[-1 - pick // 3] if known and pick in {3, 4} and len(known) > 1 else peer.preshared_key
        rx = peer.rx_bytes
        label = "outsider" if tried == OUTSIDER else self.psk_owner.get(tried, "static")
        self.kernel.handshake(who, tried, label, self.now)
        self.kernel.send(who, size, self.now)
        self.true_rx[who] = self.true_rx.get(who, 0) + peer.rx_bytes - rx

    @rule(who=keys, size=st.integers(1, 999))
    def a_client_sends(self, who: PublicKey, size: int) -> None:
        if self.kernel.send(who, size, self.now):
            self.true_rx[who] = self.true_rx.get(who, 0) + size

    @rule(
        who=keys,
        how=st.sampled_from(["psk", "no psk", "remove", "add", "steal", "empty", "keepalive"]),
        prefix=st.sampled_from(PREFIXES),
        then_connects=st.booleans(),
    )
    def an_outsider_uses_wg_set(self, who: PublicKey, how: str, prefix: str, then_connects: bool) -> None:
        there = who in self.kernel.peers
        peer = self.kernel.peers.get(who) or KernelPeer(-len(self.drifted) - self.made)
        match how:
            case "add" if not there:
                self.kernel.apply(AddPeer(who, OUTSIDER, prefixes(prefix)))
            case "psk":
                peer.preshared_key = OUTSIDER
            case "no psk":
                peer.preshared_key = None
            case "remove":
                self.kernel.peers.pop(who, None)
            case "steal" if there:
                self.kernel.apply(AddPeer(who, peer.preshared_key, prefixes(prefix)))
                self.drifted |= set(self.kernel.peers)
            case "empty":
                peer.allowed_ips = set()
            case "keepalive":
                peer.persistent_keepalive = 7
            case _:
                return
        self.drifted.add(who)
        if then_connects:
            self.a_client_connects(who, 0, 100)

    @rule(reboot=seldom)
    def the_agent_is_restarted(self, reboot: bool) -> None:
        self.restart(reboot=reboot)

    # One step of the reconciler, and what has to hold after it.

    def stays(self) -> dict[PublicKey, int]:
        return {who: peer.incarnation for who, peer in self.kernel.peers.items()}

    def step(self, event: Snapshot | ChangeBody | None, crash_after: int | None = None) -> None:
        before, agent, now = self.stays(), self.agent, self.now
        first = isinstance(event, Snapshot) and agent.state.epoch is None
        found = {who: peer.preshared_key for who, peer in self.kernel.peers.items()}
        if event is None:
            self.oracle.pass_time(now)
        else:
            self.oracle.take(event, now)
        if first:
            wanted = self.oracle.admitted(now)
            for who in wanted.keys() & found.keys():
                if found[who] != wanted[who][0] or not self.kernel.peers[who].allowed_ips:
                    self.oracle.disturbed.add(who)
            self.oracle.disturbed |= self.drifted
            self.drifted = set()
        agent.crash_after = crash_after

        def work() -> list[Operation]:
            match event:
                case None:
                    return agent.tick(now)
                case Snapshot():
                    return agent.load(event, now)
                case _:
                    return agent.change(event, now)

        self.finish(before, work)

    def finish(self, before: dict[PublicKey, int], work: object) -> None:
        try:
            done: list[Operation] = work()  # type: ignore[operator]
        except Crashed:
            self.restart(reboot=False)
            return
        self.agent.crash_after = None
        for operation in done:
            if isinstance(operation, AddPeer):
                self.oracle.was_added(operation.public_key, self.now)
        after = self.stays()
        for who in before.keys() & after.keys():
            assert before[who] == after[who] or who in self.oracle.disturbed, "added again without a reason"
        self.oracle.disturbed.clear()
        self.check()

    def restart(self, *, reboot: bool) -> None:
        """The process is gone, and another begins with the journal and the interface."""
        if reboot:
            self.kernel.reboot()
            self.journal.boot_id += 1
            self.booted_at = self.seconds - 5.0
            self.drifted = set()
        now = self.now
        self.oracle = self.what_is_left(now)
        admitted = self.oracle.admitted(now)
        surviving = {
            who: peer.incarnation
            for who, peer in self.kernel.peers.items()
            if who in admitted
            and who in self.oracle.live
            and self.oracle.live[who].in_use
            and peer.preshared_key == admitted[who][0]
            and peer.allowed_ips
        }
        for who, peer in self.kernel.peers.items():
            self.oracle.look(who, peer.latest_handshake, peer.rx_bytes, now)
        lifeless = self.oracle.end_the_lifeless(set(self.kernel.peers), now)
        self.agent = PureAgent(self.kernel, self.journal, self.limits)
        done = self.agent.start(now)
        self.drifted = set()
        for operation in done:
            if isinstance(operation, AddPeer):
                self.oracle.was_added(operation.public_key, now)
        for who, peer in self.kernel.peers.items():
            live = self.oracle.live.get(who)
            if (
                live
                and live.in_use
                and who not in self.oracle.life
                and peer.preshared_key == live.preshared_key
            ):
                self.oracle.life[who] = Life(now.boot)
        reasons = {end.session_id for end in self.agent.reported}
        assert lifeless <= reasons
        for who, stay in surviving.items():
            if who in self.oracle.live:
                assert self.stays().get(who) == stay, "a restart has touched a live tunnel"
        self.oracle.disturbed.clear()
        self.check()

    def what_is_left(self, now: Now) -> Oracle:
        """The rules' view of a restart: the journal's sessions, the later of two, minus the past ones."""
        old, journal = self.oracle, self.journal
        left = Oracle(max_lifetime=old.max_lifetime, policy=journal.policy, ended=set(journal.ended))
        if journal.location is not None:
            left.mfa, left.location = journal.location.mfa_required, journal.location.id
        left.entries = list(journal.peers.values())
        for session, life, boot_id in sorted(
            journal.sessions.values(), key=lambda row: (row[0].granted_at, row[0].id)
        ):
            who, same_boot = session.public_key, boot_id == journal.boot_id
            if who in left.live:
                left.end(who)
            known = {p.digest(): p for p in self.psks[session.id]}
            named = known[session.psk_digest]
            held = self.kernel.peers.get(who)
            if held and session.former_digest and held.preshared_key == known[session.former_digest]:
                # The renewal that names another was cut in two: core's first state makes it good.
                named = held.preshared_key
            heirs_of = {session.id}
            if who in old.live and old.live[who].id == session.id:
                heirs_of |= old.live[who].heirs_of
            left.live[who] = Live(
                session.id,
                named,
                session.granted_at,
                session.expires_at,
                session.ends_at,
                session.deadline.boot if same_boot else None,
                session.deadline.wall,
                session.in_use,
                frozenset(heirs_of),
            )
            if life is not None:
                sign = life.last_sign_at if same_boot or life.last_sign_at is None else 0.0
                left.life[who] = Life(
                    life.added_at if same_boot else 0.0,
                    life.latest_handshake,
                    life.handshake_seen_at if same_boot else None,
                    sign,
                    journal.traffic[who].kernel_rx if who in journal.traffic else 0,
                )
        left._lower()
        left.pass_time(now)
        return left

    def check(self) -> None:
        if self.agent.state.epoch is None:
            self.check_before_the_first_state()
        else:
            self.check_everything()
        self.check_transport_keys()
        self.check_the_dead()
        self.check_deadlines()
        self.check_traffic()

    def check_before_the_first_state(self) -> None:
        if self.drifted or self.journal.location is None:
            return
        refused = self.oracle.refused()
        for who, peer in self.kernel.peers.items():
            live = self.oracle.live.get(who)
            if self.oracle.must_do_mfa(who):
                assert live is not None
                assert live.in_use
            if live is not None and live.in_use:
                assert peer.preshared_key == live.preshared_key
                assert who not in refused

    def check_everything(self) -> None:
        admitted = self.oracle.admitted(self.now)
        state = self.agent.state
        desired = state.desired(self.now)
        assert {
            who: (want.preshared_key, frozenset(want.allowed_ips)) for who, want in desired.items()
        } == admitted
        assert set(state.roster.refused) == self.oracle.refused()
        assert set(self.agent.mirror.peers) == set(admitted)
        if not self.drifted:
            assert {
                who: (peer.preshared_key, frozenset(peer.allowed_ips))
                for who, peer in self.kernel.peers.items()
            } == admitted
        assert len(self.agent.plan_over_all(self.now)) == 0
        self.check_a_snapshot_says_the_same()

    def check_a_snapshot_says_the_same(self) -> None:
        """A list that came by changes is judged as it would be as a whole."""
        held = self.agent.state
        whole = State(self.limits, OWN_KEY)
        whole.roster.ended.update(held.roster.ended)
        assert held.location is not None
        whole.load(
            snapshot(
                self.oracle.entries,
                server_time=self.core_time,
                requested_at=self.now.boot,
                mfa_required=held.location.mfa_required,
                policy=held.session_policy,
            ),
            self.now,
        )
        assert whole.roster.refused == held.roster.refused
        assert {
            who: (want.preshared_key, want.allowed_ips, want.persistent_keepalive)
            for who, want in whole.desired(self.now).items()
            if held.roster.must_do_mfa(who)
        } == {
            who: (want.preshared_key, want.allowed_ips, want.persistent_keepalive)
            for who, want in held.desired(self.now).items()
            if held.roster.must_do_mfa(who)
        }

    def check_transport_keys(self) -> None:
        for who in set(self.kernel.peers) - self.drifted:
            for tunnel in self.kernel.working_tunnels(who, self.now):
                if self.agent.state.epoch is None and tunnel.label not in self.dead:
                    continue
                assert self.oracle.may_pass(who, tunnel.label, self.now), f"{tunnel.label} still passes"

    def check_the_dead(self) -> None:
        self.dead |= set(self.journal.ended)
        live = {session.id for session in self.agent.state.sessions.values()}
        assert not live & self.dead, "an ended session is back"
        assert live == {session.id for session in self.oracle.live.values()}
        assert all(end.rx_bytes >= 0 and end.tx_bytes >= 0 for end in self.agent.reported)
        assert len({end.session_id for end in self.journal.ends}) == len(self.journal.ends)

    def check_deadlines(self) -> None:
        for session in self.agent.state.sessions.values():
            boot_id, expires_at, before = self.deadlines.get(
                session.id, (self.journal.boot_id, session.expires_at, session.deadline)
            )
            if expires_at == session.expires_at:
                assert session.deadline.wall <= before.wall + 1e-6
                if boot_id == self.journal.boot_id and before.boot is not None:
                    assert session.deadline.boot is not None
                    assert session.deadline.boot <= before.boot + 1e-6
            assert not session.deadline.passed(self.now)
            self.deadlines[session.id] = (self.journal.boot_id, session.expires_at, session.deadline)

    def check_traffic(self) -> None:
        for who in KEYS:
            traffic = self.agent.state.traffic.get(who)
            now = (traffic.rx_bytes, traffic.tx_bytes)
            before = self.totals.get(who, (0, 0))
            assert now[0] >= before[0]
            assert now[1] >= before[1]
            assert now[0] <= self.true_rx.get(who, 0)
            self.totals[who] = now

    @invariant()
    def secrets_are_not_in_the_journal(self) -> None:
        for session, _, _ in self.journal.sessions.values():
            assert session.preshared_key is None
        for peer in self.journal.peers.values():
            assert (peer.preshared_key, peer.session) == (None, None)


TestAgent = Agent.TestCase
TestAgent.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)
