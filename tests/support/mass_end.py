"""Many sessions that end at once, seen by a client, by another interface's reader, and from outside."""

import asyncio
import os
import queue
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from agent.control import ControlClient
from agent.encoding import format_key
from agent.sandbox.core import Core
from agent.sandbox.directory import Location
from agent.sandbox.sessions import Session
from tests.contract.inside import inside
from tests.support.bystander import Bystander, Onlooker
from tests.support.client import Client
from tests.support.ledger import Seen
from tests.support.scenarios import EMULATED, SLACK, connect, monotonic_of, ping
from tests.support.site import Site, until

CUT = 2.0
"""Seconds from the moment that all are to end until the last one is cut."""
LOCK = 0.1
"""Seconds that a read of another interface may have to wait meanwhile."""
SCRAPE = 1.0 if EMULATED else 0.1
"""Seconds between two scrapes."""
PATIENCE = 20.0 if EMULATED else 5.0
FIRST = -10
"""How far the agent goes before all others where the kernel is emulated; the report says so."""
KEPT_CHANGES = 100
"""Core keeps so few that more of them at once are one pull of its list."""


@dataclass(frozen=True, slots=True)
class MassEnd:
    """What was seen of one; times in seconds after the moment that they were all to end."""

    count: int
    last_reply: float
    cut: float
    removed: float
    backlog: int
    lost: int
    longest_read: float | None
    overslept: float | None

    def check(self, seen: Seen) -> None:
        """Report it, and hold it to the bounds."""
        note = (
            f"{self.count} sessions: all cut {self.cut:.2f} s after, all removed {self.removed:.1f} s after, "
            f"up to {self.backlog} waiting for that"
        )
        if self.longest_read is not None:
            note += f", longest read of another interface {self.longest_read * 1000:.0f} ms"
        if EMULATED:
            note += f", the agent at nice {FIRST}"
        seen(tried=self.count, overrun=self.last_reply, lost=self.lost, note=note)
        assert self.last_reply < SLACK
        assert self.cut < CUT
        assert self.lost == 0
        if self.longest_read is not None:
            assert self.longest_read < LOCK, f"the machine itself overslept by {self.overslept} s"
            # Where removing is nothing, as with wireguard-go, it may be over before anybody looks.
            assert self.backlog > 0


class Crowd:
    """A site with many strangers, and three clients among them."""

    def __init__(self, folder: Path, strangers: int) -> None:
        self.site = Site(
            folder,
            stats_interval=10,
            forked=True,
            agent="[metrics]\nper_peer = false\n"
            "[sessions]\nagent_lease = 30\nidle_timeout = 7200\nconnect_timeout = 7200",
            core={"changelog": KEPT_CHANGES},
            location={"idle_timeout": 7200, "connect_timeout": 7200, "max_lifetime": 86_400},
        )
        self._strangers = strangers

    def begin(self) -> None:
        """Start the agent, and give the clients their tunnels."""
        site = self.site
        wanted = [
            {"location": "hq", "name": f"stranger-{i}", "public_key": format_key(os.urandom(32))}
            for i in range(self._strangers)
        ]
        site.core.call(site.core.admin.add_devices(wanted), timeout=600)
        self.ending, self.staying, self.router = site.add_clients(3)
        site.core.call(site.core.admin.change_device(self.router.device.id, mfa_exempt=True))
        site.start_agent(timeout=300)
        if EMULATED:
            self._agent_goes_first()
        for client in (self.ending, self.staying, self.router):
            site.attach(client)
        site.connect(self.router)

    def _agent_goes_first(self) -> None:
        """Core, clients and onlookers, which have hosts of their own elsewhere, would take two emulated
        processors from it, and hold it up while it holds the kernel's lock."""
        assert self.site.process is not None
        for thread in Path(f"/proc/{self.site.process.pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), FIRST)

    def gather(self, strangers: int) -> None:
        """So many strangers, and two of the clients, have sessions; the kernel has them all."""
        site, began = self.site, time.monotonic()

        def grant(core: Core) -> None:
            location, now = core.directory.location("hq"), core.clock()
            devices = [d for d in core.directory.devices("hq") if d.name.startswith("stranger-")]
            with core.store.transaction():
                for device in devices[:strangers]:
                    core.sessions.grant(device, location, "totp", now)

        site.core.do(grant)
        live = {session.id for session in self._live()}
        for client in (self.ending, self.staying):
            if not live.intersection(client.sessions):
                connect(site, client)
        until(lambda: self._peers() == strangers + 3, 20 * PATIENCE, "everybody on the interface")
        self._gathered_in = time.monotonic() - began

    def _live(self) -> list[Session]:
        return self.site.core.do(lambda core: core.sessions.all(live=True))

    def _peers(self) -> int:
        return self.site.gateway.run("wg", "show", self.site.interface, "peers").stdout.count("\n")

    def _leaving(self) -> list[str]:
        return [session.id for session in self._live() if session.public_key != self.staying.public_key]

    # Ways to end them; each returns the monotonic moment at which they are to be over.

    def expire(self) -> float:
        """All sessions but one are renewed, to end in the same second.

        The agent counts from when it asked core for the list, so what that took is taken off (rule 9).
        """
        ids, lead = self._leaving(), 2 * self._gathered_in + PATIENCE

        def renew(core: Core) -> float:
            now = core.clock()
            with core.store.transaction():
                ends = [core.sessions.renew(i, lead, now, ceiling=86_400).session.expires_at for i in ids]
            [end] = set(ends)
            return end

        moment = monotonic_of(self.site.core.do(renew))
        revision = self.site.core.do(lambda core: core.directory.location("hq").revision)
        until(lambda: metric(self.site, "wg_agent_applied_revision") >= revision, lead, "the renewals")
        moment += min(0.0, metric(self.site, "wg_agent_clock_skew_seconds"))
        assert time.monotonic() < moment - 1
        time.sleep(moment - time.monotonic())
        return moment

    def revoke(self) -> float:
        """Core revokes all sessions but one.

        The moment is that at which its new list is ready to be sent: making it is core's own work,
        which takes longer than the agent's where both are emulated.
        """
        ids = self._leaving()
        told: queue.SimpleQueue[float] = queue.SimpleQueue()

        def end(core: Core) -> None:
            sessions, make = core.sessions, core.sessions.snapshot

            def snapshot(location: Location, now: float) -> bytes:
                body = make(location, now)
                told.put(time.monotonic())
                return body

            sessions.snapshot = snapshot  # type: ignore[method-assign]
            now = core.clock()
            with core.store.transaction():
                for session_id in ids:
                    sessions.end(session_id, "revoked", now)

        self.site.core.do(end)
        try:
            return told.get(timeout=3 * PATIENCE)
        finally:
            self.site.core.do(lambda core: vars(core.sessions).pop("snapshot"))

    def end_all(self) -> float:
        """``wg-agent end --all``."""
        moment = time.monotonic()
        ControlClient(self.site.folder / "run" / f"{self.site.interface}.sock").end(None)
        return moment

    def end(self, act: Callable[[], float], *, kept: Client, left: int, kernel: bool) -> MassEnd:
        """Let them end by ``act``; ``left`` peers are to stay, ``kept`` among them."""
        site, count = self.site, len(self._leaving())
        with ExitStack() as stack:
            bystander = stack.enter_context(Bystander(site.gateway)) if kernel else None
            onlooker = stack.enter_context(Onlooker(site.gateway, site.interface))
            cut, others = stack.enter_context(ping(self.ending)), stack.enter_context(ping(kept))
            cut.wait_reply(PATIENCE)
            others.wait_reply(PATIENCE)
            moment = act()
            backlog, patience = 0.0, moment + 60 + 0.1 * count
            while (removed := onlooker.removed(left, moment)) is None:
                assert time.monotonic() < patience, "they are not all removed"
                # Not ten times a second: under emulation a scrape alone takes the agent a tenth.
                time.sleep(SCRAPE)
                backlog = max(backlog, metric(site, "wg_agent_reap_backlog"))
            until(lambda: metric(site, "wg_agent_reap_backlog") == 0, 10, "an empty backlog")
            # Whoever is left but the router, which needs none, has a session.
            until(lambda: len(self._live()) == left - 1, PATIENCE, "core to hear of the ends")
            last_reply = cut.wait_silence(1.0)
            others.wait_reply(PATIENCE)
            reads = None if bystander is None else bystander.between(moment, removed)
            cut_at = onlooker.cut(left, removed)
        return MassEnd(
            count=count,
            last_reply=last_reply - moment,
            cut=cut_at - moment,
            removed=removed - moment,
            backlog=int(backlog),
            lost=others.lost,
            longest_read=None if reads is None else reads.longest,
            overslept=None if reads is None else reads.overslept,
        )


def metric(site: Site, name: str) -> float:
    """One of the agent's own series, without a program for it."""

    async def scrape() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", 9586)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    lines = inside(site.gateway, scrape()).decode().splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).rpartition(" ")[2])
