"""Random events, crashes and steps of clocks against a whole site.

Each round does something to one client's session (grant, renew, replace, revoke, end), and beside it
something goes wrong: the agent is killed, hung or restarted, core dies, the wall clock is stepped, the
host sleeps, nftables' rules are flushed. All clients ping all the time. Core's own books say who may be
on the VPN; once everything works again the interface has to agree with them.

What core changes counts from the moment at which agent and core agree again; a deadline, an end by the
operator and a step of a clock count at once, whatever else is broken.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from agent.encoding import format_key
from agent.errors import AgentError
from agent.sandbox.core import Core
from agent.sandbox.sessions import Session
from tests.reliability.watched import Held, Watched
from tests.support.client import Client
from tests.support.scenarios import EMULATED, ping
from tests.support.site import Site, until

EARLY: Final = 5.0 if EMULATED else 1.5
"""Seconds by which a session may end early: the agent's idea of core's time is ahead by what a pull takes
at most (under emulation seconds, where everything else starts at once), and replies have to be read.
Where the agent itself, asked, means to end it earlier still, that counts, up to twice as much."""
PATIENCE: Final = 90.0 if EMULATED else 20.0
"""Seconds in which agent and core have to agree again once everything works."""
NEAR: Final = 1.5 if EMULATED else 0.2
"""Seconds between an event and the fault beside it, at most."""
SLOW: Final = 3.0 if EMULATED else 1.0
"""How much longer sessions last where everything else takes longer."""
HOUR: Final = 3600.0
STEPS: Final = (0.0, *(sign * hours * HOUR for hours in (1, 24, 365 * 24) for sign in (1, -1)))
NAPS: Final = (4.0, 45.0, 100.0)
"""Seconds that the host sleeps: less than the life of WireGuard's keys, which do not sleep here."""

Event = Callable[[Watched], None]
Fault = Callable[[], AbstractContextManager[None]]


class Rounds:
    """A run on a site whose agents are forked; ``seed`` decides everything but the machine's timing.

    The last of ``watched`` needs no session and is never touched.
    """

    def __init__(self, site: Site, seed: int) -> None:
        assert site.zygote is not None
        self.site = site
        self.random = random.Random(seed)
        self.did: Counter[str] = Counter()
        self.watched: list[Watched] = []
        self.trace: list[str] = []
        self.early = 0.0
        """Seconds by which the agent means to end a session early, at most."""
        self._clocks = site.zygote.clocks
        self._base = time.time() - time.monotonic()
        self._step = 0.0
        self._slept = 0.0
        self._books = threading.RLock()
        """A clock is not moved while it is noted whose time is up."""
        self._new: list[Held] = []
        """What core granted in this round: the agent may get to it before or after a step."""
        self._stepped_from = 0.0

    def watch(self, clients: list[Client], exempt: Client) -> None:
        """Let these clients ping from now on."""
        for client in (*clients, exempt):
            watched = Watched(client, ping(client))
            watched.off_since = time.monotonic()
            self.watched.append(watched)
        router = self.watched[-1]
        self.site.connect(exempt)
        router.off_since = None
        router.sure_since = router.pings.wait_reply(30)

    def run(self, rounds: int) -> None:
        """Run so many rounds; where one fails, the last ones are printed."""
        for number in range(rounds):
            try:
                self._round(number)
            except BaseException:
                print(f"failed in round {number}; the last ones:", *self.trace[-8:], sep="\n  ")
                raise
        now = time.monotonic()
        self._pass_deadlines()
        for watched in self.watched:
            watched.finish(now)
            watched.pings.stop()

    def close(self) -> None:
        """End the pings."""
        for watched in self.watched:
            watched.pings.stop()

    def _round(self, number: int) -> None:
        choose = self.random
        watched = choose.choice(self.watched[:-1])
        event = choose.choice(self._events(watched))
        fault = choose.choice(self._faults())
        before = choose.random() < 0.6 or fault == self.core_dies
        between, lasts = choose.uniform(0.0, NEAR), choose.uniform(0.0, 1.5)
        self.trace.append(
            f"{time.monotonic():.1f} {number}: {event.__name__} of {watched.client.name}"
            f" {'before' if before else 'during'} {fault.__name__}, {between:.3f} s apart,"
            f" {lasts:.2f} s long; stepped {self._step:.0f} s, slept {self._slept:.0f} s"
        )
        self.did.update((event.__name__, fault.__name__))
        self._new.clear()
        self._stepped_from = self._step
        doing = threading.Thread(target=self._do, args=(event, watched), name="event")
        if before:
            doing.start()
            time.sleep(between)
            with fault():
                time.sleep(lasts)
        else:
            with fault():
                time.sleep(between)
                doing.start()
                time.sleep(lasts)
        doing.join(PATIENCE)
        self._settle()
        time.sleep(choose.uniform(0.0, 0.5))

    def _do(self, event: Event, watched: Watched) -> None:
        self._pass_deadlines()
        # The agent may be killed in the middle of it.
        with contextlib.suppress(AgentError):
            event(watched)

    # What is done to a session.

    def _events(self, watched: Watched) -> list[Event]:
        if watched.held is None:
            return [self.grant]
        return [self.let_be, self.renew, self.renew, self.replace, self.revoke, self.end]

    def grant(self, watched: Watched) -> None:
        """Core grants a session, or another one while one is live."""
        watched.disturbed(time.monotonic())
        lifetime = self.random.choice((4.0, 8.0, 16.0, HOUR)) * SLOW
        device = watched.client.device

        def work(core: Core) -> Session:
            location = core.directory.location("hq")
            return core.sessions.grant(device, location, "totp", core.clock(), lifetime=lifetime).session

        granted = self.site.core.do(work)
        watched.admitted(time.monotonic())
        self._hold(watched, granted)

    replace = grant

    def renew(self, watched: Watched) -> None:
        """Core renews the session with another PSK; the tunnel goes on."""
        held = watched.held
        assert held is not None
        if self._due(held, held.stepped_low) < time.monotonic() + PATIENCE:
            # It may end before the agent hears of it.
            watched.disturbed(time.monotonic())
        lifetime = self.random.choice((8.0, 16.0, HOUR)) * SLOW

        def work(core: Core) -> Session | None:
            session = core.sessions.get(held.id)
            if session.ended_at is not None:
                return None
            ceiling = core.directory.location("hq").policy["max_lifetime"]
            return core.sessions.renew(held.id, lifetime, core.clock(), ceiling=ceiling, rotate=True).session

        renewed = self.site.core.do(work)
        if renewed is not None:
            self._hold(watched, renewed)

    def revoke(self, watched: Watched) -> None:
        """Core revokes the session."""
        held = watched.held
        assert held is not None
        watched.disturbed(time.monotonic())
        self.site.core.do(lambda core: core.sessions.end(held.id, "revoked", core.clock()))

    def end(self, watched: Watched) -> None:
        """The operator ends the session; once that is answered, the peer is off the interface."""
        watched.disturbed(time.monotonic())
        self.site.end(watched.client)
        watched.ended(time.monotonic())

    def let_be(self, watched: Watched) -> None:
        """Nothing is done to anybody."""

    def _hold(self, watched: Watched, session: Session) -> None:
        assert session.preshared_key is not None
        psk = format_key(session.preshared_key)
        stepped = self._stepped_from
        watched.held = Held(session.id, psk, session.expires_at, stepped, stepped, EARLY)
        watched.held.may_be_anchored(self._step)
        self._new.append(watched.held)

    # What goes wrong.

    def _faults(self) -> list[Fault]:
        return [
            *(self.nothing, self.the_agent_is_killed, self.the_agent_is_killed),
            *(self.the_agent_is_killed_twice, self.the_agent_hangs, self.the_agent_restarts),
            *(self.core_dies, self.the_wall_clock_is_stepped, self.the_host_sleeps),
            self.the_rules_are_flushed,
        ]

    @contextmanager
    def nothing(self) -> Iterator[None]:
        yield

    @contextmanager
    def the_agent_is_killed(self) -> Iterator[None]:
        self.site.kill_agent()
        yield
        self.site.start_agent(ready=False)

    @contextmanager
    def the_agent_is_killed_twice(self) -> Iterator[None]:
        self.site.kill_agent()
        yield
        self.site.fork_agent()
        time.sleep(self.random.uniform(0.0, NEAR * 3))
        self.site.kill_agent()
        self.site.start_agent(ready=False)

    @contextmanager
    def the_agent_restarts(self) -> Iterator[None]:
        self.site.stop_agent()
        yield
        self.site.start_agent(ready=False)

    @contextmanager
    def the_agent_hangs(self) -> Iterator[None]:
        process = self.site.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    @contextmanager
    def core_dies(self) -> Iterator[None]:
        self.site.core.kill()
        try:
            yield
        finally:
            self.site.core.start()

    @contextmanager
    def the_wall_clock_is_stepped(self) -> Iterator[None]:
        with self._books:
            self._pass_deadlines()
            self._step = self.random.choice(STEPS)
            for held in self._new:
                held.may_be_anchored(self._step)
            self._move_clocks()
        yield

    @contextmanager
    def the_host_sleeps(self) -> Iterator[None]:
        with self._books:
            self._pass_deadlines()
            self._slept += self.random.choice(NAPS)
            self._move_clocks()
        yield

    @contextmanager
    def the_rules_are_flushed(self) -> Iterator[None]:
        self.site.gateway.run("nft", "flush", "ruleset")
        yield

    # The books.

    def _move_clocks(self) -> None:
        """Core sleeps along, since the time that passes is everybody's."""
        self._clocks.set(boot=self._slept, wall=self._slept + self._step)
        self.site.core_ahead = self._slept
        self._pass_deadlines(not_before=time.monotonic())

    def _due(self, held: Held, stepped: float) -> float:
        """The monotonic moment at which a session ends, anchored while the wall clock was so stepped."""
        by_boot = held.expires_at - self._slept - self._base
        return by_boot - max(0.0, self._step - stepped)

    def _pass_deadlines(self, *, not_before: float = 0.0) -> None:
        """Note whose session has ended by now; by the move of a clock, at that moment."""
        with self._books:
            now = time.monotonic()
            for watched in self.watched:
                if (held := watched.held) is None:
                    continue
                early = self._due(held, held.stepped_low) - held.early
                if early < now:
                    watched.disturbed(max(early, not_before))
                due = self._due(held, held.stepped_high)
                if due < now:
                    watched.ended(max(due, not_before))

    def _ask_deadlines(self) -> None:
        """The agent counts from when it asked for the list, so what that took ends sessions early."""
        asked_at = time.monotonic()
        left = {peer["public_key"]: peer["time_left"] for peer in self.site.status()["peers"]}
        for watched in self.watched[:-1]:
            held, seconds = watched.held, left.get(watched.client.public_key)
            if held is None or seconds is None:
                continue
            early = self._due(held, held.stepped_low) - (asked_at + seconds)
            held.early = max(EARLY, early + 1)
            self.early = max(self.early, early)

    def _settle(self) -> None:
        """Wait until the interface is as core's books say, then let clients use what they were given."""
        until(self._agrees, PATIENCE, "agreement of the interface with core's books")
        self._ask_deadlines()
        self._pass_deadlines()
        live, now = self._live(), time.monotonic()
        for watched in self.watched[:-1]:
            session = live.get(watched.client.public_key)
            if session is None:
                watched.disturbed(now)
                watched.ended(now)
                watched.held, watched.connected_with = None, ""
            elif watched.held is not None and watched.connected_with != session.id:
                self.site.connect(watched.client, watched.held.psk)
                watched.connected_with = session.id
                watched.sure_since = self._reached(watched)
            elif watched.held is not None:
                self.site.use_psk(watched.client, watched.held.psk)
                if watched.sure_since is None:
                    watched.sure_since = self._reached(watched)

    def _reached(self, watched: Watched) -> float | None:
        """The time of the next reply; None if the session ended before there was one."""
        assert watched.held is not None
        try:
            return watched.pings.wait_reply(PATIENCE / 2)
        except TimeoutError:
            if self._due(watched.held, watched.held.stepped_low) - watched.held.early < time.monotonic():
                return None
            raise

    def _agrees(self) -> bool:
        status, shown = self.site.status(), self.site.shown()
        wanted = {key: format_key(s.preshared_key or b"") for key, s in self._live().items()}
        router = self.watched[-1].client.public_key
        return bool(status["core_connected"]) and {
            key: row["preshared_key"] for key, row in shown.items() if row["allowed_ips"] != "(none)"
        } == {**wanted, router: "(none)"}

    def _live(self) -> dict[str, Session]:
        sessions = self.site.core.do(lambda core: core.sessions.all(live=True))
        return {session.public_key: session for session in sessions}
