"""Many sessions that end at once, seen by a client, by another interface's reader, and from outside."""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from agent.control import ControlClient
from agent.sandbox.core import Core
from tests.contract.inside import inside
from tests.support.bystander import Bystander, Onlooker
from tests.support.ledger import Seen
from tests.support.scenarios import EMULATED, connect, monotonic_of, ping
from tests.support.site import Client, Site, until

BOUND = 2.0
"""Seconds from the moment that all are to end until the last one is cut."""
LOCK = 0.1
"""Seconds that a read of another interface may have to wait meanwhile."""
PATIENCE = 20 if EMULATED else 1


@dataclass(frozen=True, slots=True)
class MassEnd:
    """What was seen of one; all in seconds from the moment that it was due."""

    count: int
    last_reply: float
    cut: float
    removed: float
    backlog: float
    lost: int
    longest_read: float | None = None
    overslept: float = 0.0

    def note(self) -> str:
        """The figures in words."""
        said = (
            f"{self.count} ends: all cut after {self.cut:.2f} s, all removed after {self.removed:.1f} s"
            f", at most {self.backlog:.0f} waiting to be removed"
        )
        if self.longest_read is not None:
            said += f", longest read of another interface {self.longest_read * 1000:.0f} ms"
        return said

    def check(self, seen: Seen) -> None:
        """Report it, and hold it to the bounds."""
        seen(tried=self.count, overrun=self.last_reply, lost=self.lost, note=self.note())
        print(self)
        assert self.last_reply < BOUND
        assert self.cut < BOUND
        assert self.lost == 0
        if self.longest_read is not None:
            assert self.backlog > 0
            assert self.longest_read < LOCK


class Crowd:
    """A site with many strangers and a client among them; ``staying`` is to lose nothing."""

    def __init__(self, site: Site, strangers: int) -> None:
        self.site = site
        self.count = strangers + 1
        site.add_strangers(strangers)
        self.ending, self.staying, self.router = site.add_clients(3)
        site.core.call(site.core.admin.change_device(self.router.device.id, mfa_exempt=True))
        site.start_agent(timeout=300)
        for client in (self.ending, self.staying, self.router):
            site.attach(client)
        site.connect(self.router)

    def gather(self) -> None:
        """Everybody has a session, and the kernel all of them."""
        site = self.site

        def grant(core: Core) -> None:
            location, now = core.directory.location("hq"), core.clock()
            with core.store.transaction():
                live = {session.public_key for session in core.sessions.all(live=True)}
                for device in core.directory.devices("hq"):
                    if device.name.startswith("stranger-") and device.public_key not in live:
                        core.sessions.grant(device, location, "totp", now)

        site.core.do(grant)
        for client in (self.ending, self.staying):
            if client.sessions and site.core.do(
                lambda c, s=client.sessions[-1]: c.sessions.get(s).ended_at is None
            ):
                continue
            connect(site, client)
        until(lambda: len(site.shown()) == self.count + 2, 60 * PATIENCE, "everybody on the interface")

    def leaving(self) -> list[str]:
        """The ids of all sessions but the one that stays."""
        live = self.site.core.do(lambda core: core.sessions.all(live=True))
        return [session.id for session in live if session.public_key != self.staying.public_key]

    # Ways to end them; each returns the monotonic moment at which they are to be over.

    def expire(self, lead: float) -> float:
        """All sessions are renewed, to end together in ``lead`` seconds."""
        ids = self.leaving()

        def renew(core: Core) -> float:
            now = core.clock()
            with core.store.transaction():
                for session_id in ids:
                    renewed = core.sessions.renew(session_id, lead, now, ceiling=86_400)
            return renewed.session.expires_at

        moment = monotonic_of(self.site.core.do(renew))
        revision = self.revision()
        until(lambda: self.applied() >= revision, lead, "the renewals in force")
        assert time.monotonic() < moment - 1
        time.sleep(moment - time.monotonic())
        return moment

    def revoke(self) -> float:
        """Core revokes all but one."""
        ids = self.leaving()

        def end(core: Core) -> None:
            now = core.clock()
            with core.store.transaction():
                for session_id in ids:
                    core.sessions.end(session_id, "revoked", now)

        self.site.core.do(end)
        return time.monotonic()

    def end_all(self) -> float:
        """``wg-agent end --all``."""
        moment = time.monotonic()
        socket = self.site.folder / "run" / f"{self.site.interface}.sock"
        ControlClient(socket).end(None)
        return moment

    def revision(self) -> int:
        """Core's."""
        return self.site.core.do(lambda core: core.directory.location("hq").revision)

    def applied(self) -> float:
        """The revision that the agent has in the kernel."""
        return metric(self.site, "wg_agent_applied_revision")

    def end(self, act: Callable[[], float], *, kept: Client, left: int, kernel: bool) -> MassEnd:
        """Let them end by ``act``; ``left`` peers are to stay, ``kept`` among them."""
        site = self.site
        with ExitStack() as stack:
            bystander = stack.enter_context(Bystander(site.gateway)) if kernel else None
            onlooker = stack.enter_context(Onlooker(site.gateway, site.interface))
            cut, others = stack.enter_context(ping(self.ending)), stack.enter_context(ping(kept))
            cut.wait_reply(PATIENCE)
            others.wait_reply(PATIENCE)
            moment = act()
            backlog = 0.0
            end = time.monotonic() + 300
            while (removed := onlooker.first(lambda look: look.peers == left, moment)) is None:
                assert time.monotonic() < end
                backlog = max(backlog, metric(site, "wg_agent_reap_backlog"))
                time.sleep(0.1)
            look = onlooker.first(lambda look: look.admitted == left, moment)
            assert look is not None
            until(lambda: metric(site, "wg_agent_reap_backlog") == 0, 30, "an empty backlog")
            last_reply = cut.wait_silence(1.0)
            others.wait_reply(PATIENCE)
            reads = None if bystander is None else bystander.between(moment, removed.at)
        return MassEnd(
            count=self.count,
            last_reply=last_reply - moment,
            cut=look.at - moment,
            removed=removed.at - moment,
            backlog=backlog,
            lost=others.lost,
            longest_read=None if reads is None else reads.longest,
            overslept=0.0 if reads is None else reads.overslept,
        )


def metric(site: Site, name: str) -> float:
    """One of the agent's own series, without starting a program for it."""

    async def scrape() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", 9586)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    lines = inside(site.gateway, scrape()).decode().splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).rpartition(" ")[2])
