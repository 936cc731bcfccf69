"""The agent stopped or killed over a deadline, or over its lease: what the kernel does without it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.client import Client
from tests.support.ledger import Seen
from tests.support.scenarios import EMULATED, SLACK, connect, monotonic_of, ping
from tests.support.site import Site, until

LATE = 1.0 if EMULATED else 0.1
"""Seconds past a deadline that the kernel keeps by itself; reading ping's lines takes some of it."""
LEASE = 30.0
"""``sessions.agent_lease`` of the site, its least value."""
PATIENCE = 30.0 if EMULATED else 10.0

STOPPED = pytest.mark.reliability(
    "the agent is stopped (SIGSTOP) over a session's deadline",
    "the kernel ends the session at its deadline by itself, other peers lose no packet",
)
KILLED = pytest.mark.reliability(
    "the agent is killed (SIGKILL) over a session's deadline",
    "the kernel ends the session at its deadline by itself, other peers lose no packet",
)
LAPSED = pytest.mark.reliability(
    "the agent is stopped for longer than its lease (30 s)",
    "sessions' traffic stops, an exempt peer's does not; once the agent is back, all go on but those"
    " whose deadline has passed",
)


@contextmanager
def stopped(site: Site) -> Iterator[float]:
    """The agent does nothing in this block; gives the monotonic moment from which on it does not."""
    process = site.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        yield time.monotonic()
    finally:
        process.send_signal(signal.SIGCONT)


def exempt(site: Site, client: Client) -> None:
    """The client is a device that can't authenticate, such as a router."""
    site.core.call(site.core.admin.change_device(client.device.id, mfa_exempt=True))


def over_a_deadline_stopped(site: Site, seen: Seen) -> None:
    """The agent is stopped before a session's deadline and goes on after it."""
    ending, lasting, deadline, early = _about_to_end(site)
    with ping(ending) as cut, ping(lasting) as kept:
        cut.wait_reply(PATIENCE)
        kept.wait_reply(PATIENCE)
        with stopped(site):
            time.sleep(deadline - time.monotonic())
            last_reply = cut.wait_silence(1.0)
            kept.wait_reply(PATIENCE)
            # Nobody has removed the peer: it is the table that stops its packets.
            assert ending.public_key in site.shown()
        until(lambda: ending.public_key not in site.shown(), what="the peer's removal")
        kept.wait_reply(PATIENCE)
    _judge(last_reply - deadline, early, kept.lost, seen)


def over_a_deadline_killed(site: Site, seen: Seen) -> None:
    """The agent is killed before a session's deadline; nobody starts it again."""
    ending, lasting, deadline, early = _about_to_end(site)
    with ping(ending) as cut, ping(lasting) as kept:
        cut.wait_reply(PATIENCE)
        kept.wait_reply(PATIENCE)
        site.kill_agent()
        time.sleep(deadline - time.monotonic())
        last_reply = cut.wait_silence(1.0)
        kept.wait_reply(PATIENCE)
    assert ending.public_key in site.shown()
    _judge(last_reply - deadline, early, kept.lost, seen)


def over_the_lease(site: Site, seen: Seen) -> None:
    """The agent is stopped until its lease has lapsed, and a session's deadline has passed as well."""
    person, ending, router = site.add_clients(3)
    exempt(site, router)
    for client in (person, ending, router):
        site.attach(client)
    site.connect(router)
    connect(site, person)
    session, psk = site.grant(ending, lifetime=LEASE + (12 if EMULATED else 5))
    site.connect(ending, psk)
    deadline = monotonic_of(session.expires_at)
    with ping(person) as lapsing, ping(ending) as over, ping(router) as staying:
        for pings in (lapsing, over, staying):
            pings.wait_reply(PATIENCE)
        with stopped(site) as since:
            last_reply = lapsing.wait_silence(2.0, LEASE + 10)
            assert LEASE - 2 - LATE < last_reply - since < LEASE + LATE + 0.5
            over.wait_silence(1.0)
            staying.wait_reply(PATIENCE)
            assert time.monotonic() < deadline, "the deadline was to pass after the lease"
            time.sleep(deadline + 0.5 - time.monotonic())
            replies = over.received
        lapsing.wait_reply(PATIENCE)
        until(lambda: ending.public_key not in site.shown(), what="the peer's removal")
        staying.wait_reply(PATIENCE)
        assert over.received == replies
    seen(lost=staying.lost, note=f"sessions' traffic stopped {last_reply - since:.1f} s after the agent")
    assert staying.lost == 0


def _about_to_end(site: Site) -> tuple[Client, Client, float, float]:
    """A client whose session ends soon, one whose session does not, and that monotonic deadline.

    Last the seconds by which it ends before that: core's clock is this one, so what the agent takes for
    skew is how long core took to answer, and deadlines count from when it was asked (rule 9).
    """
    ending, lasting = site.add_clients(2)
    for client in (ending, lasting):
        site.attach(client)
    connect(site, lasting)
    early = max(0.0, -site.metric("wg_agent_clock_skew_seconds"))
    session, psk = site.grant(ending, lifetime=10 if EMULATED else 6)
    site.connect(ending, psk)
    return ending, lasting, monotonic_of(session.expires_at), early


def _judge(overrun: float, early: float, lost: int, seen: Seen) -> None:
    seen(overrun=overrun, lost=lost)
    assert early < SLACK, "core took so long to answer that nothing can be said of an early end"
    assert -1.0 - early < overrun < LATE
    assert lost == 0
