"""Who passes the guard, and until when, whatever else this host lets through."""

import asyncio
import math
import time

from tests.firewall.behaviour import LATE, LONG, Behaviours, quiet, reply
from tests.firewall.stand import (
    ALICE,
    ALICE4,
    ALICE6,
    BOB4,
    GATEWAY4,
    GATEWAY6,
    ROUTER,
    ROUTER4,
    SERVER,
    WIDE6,
    Stand,
    Talker,
    exempt,
    session,
)
from tests.support.netns import Pinger

behaviours = Behaviours()


@behaviours.add
async def an_element_ends_established_traffic_at_its_time_with_nobodys_help(stand: Stand) -> None:
    await stand.nft(
        "add table inet shop; add chain inet shop f { type filter hook forward priority 0; policy drop; };"
        "add rule inet shop f ct state established accept; add rule inet shop f ct state new accept;"
        "add chain inet shop i { type filter hook input priority 0; policy drop; };"
        "add rule inet shop i ct state established accept; add rule inet shop i accept"
    )
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, f"{ALICE4}/32", f"{ALICE6}/128", "fd00:8:0:1::/64")}, LONG)
    pings = [
        Pinger(stand.clients, SERVER),
        Pinger(stand.clients, GATEWAY6),
    ]
    with pings[0], pings[1]:
        for ping in pings:
            await reply(ping)
        start = time.monotonic()
        await guard.admit({ALICE: session(1.5, f"{ALICE4}/32", f"{ALICE6}/128", "fd00:8:0:1::/64")})
        deadline = time.monotonic() + 1.5
        for ping in pings:
            last = await quiet(ping)
            assert start + 1.3 < last < deadline + LATE
            assert not ping.lost
    assert (contents := await guard.read()) is not None
    assert contents.elements == {}


@behaviours.add
async def established_tcp_ends_at_its_time_too(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, ALICE4)}, LONG)
    with Talker(stand.clients, ALICE4, stand.server, SERVER) as talker:
        await asyncio.to_thread(talker.wait, 20)
        await guard.admit({ALICE: session(1.0, ALICE4)})
        deadline = time.monotonic() + 1.0
        await asyncio.sleep(2)
        assert deadline - 0.5 < talker.last < deadline + LATE


@behaviours.add
async def only_who_is_admitted_is_heard_and_spoken_to(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, ALICE4, "fd00:8:0:1::/64"), ROUTER: exempt("10.8.9.0/24")}, LONG)
    assert await stand.answers(ALICE4, GATEWAY4)
    assert await stand.answers(ALICE4, SERVER)
    assert await stand.answers(ROUTER4, SERVER)
    assert await stand.answers(WIDE6, GATEWAY6)
    assert not await stand.answers(BOB4, GATEWAY4)
    assert not await stand.answers(ALICE6, GATEWAY6)
    # Outbound by itself: what reaches the clients' side is counted there.
    await asyncio.to_thread(
        stand.clients.run,
        "nft",
        "add table inet seen; add counter inet seen alice; add counter inet seen bob;"
        "add chain inet seen c { type filter hook prerouting priority -300; };"
        f"add rule inet seen c ip daddr {ALICE4} ip saddr {SERVER} counter name alice;"
        f"add rule inet seen c ip daddr {BOB4} ip saddr {SERVER} counter name bob",
    )
    for target in (ALICE4, BOB4):
        await stand.answers(SERVER, target, space=stand.server)
    seen = await asyncio.to_thread(stand.clients.run, "nft", "list", "counters")
    packets = [line.split()[1] for line in seen.stdout.splitlines() if "packets" in line]
    assert packets[0] != "0"
    assert packets[1] == "0"


@behaviours.add
async def a_session_that_is_over_does_not_pass_by_an_exempt_peers_wider_prefix(stand: Stand) -> None:
    guard = stand.firewall()
    both = {ROUTER: exempt("10.8.0.0/16", "0.0.0.0/0", "10.8.9.0/24"), ALICE: session(0.7, ALICE4)}
    assert await guard.raise_(both, LONG) == {}
    assert await stand.answers(ALICE4, GATEWAY4)
    assert await stand.answers(ROUTER4, GATEWAY4)
    await asyncio.sleep(1)
    assert not await stand.answers(ALICE4, GATEWAY4)
    assert await stand.answers(BOB4, GATEWAY4)  # the router's, by its prefix
    await guard.dismiss(both[ALICE].prefixes)
    assert await stand.answers(ALICE4, GATEWAY4)  # nobody's but the router's now


@behaviours.add
async def a_session_that_is_over_when_it_is_to_be_admitted_is_barred(stand: Stand) -> None:
    guard = stand.firewall()
    for remaining in (0.0, 0.0005, 0.0099, -3.0, math.nan):
        refused = await guard.raise_(
            {ROUTER: exempt("10.8.0.0/16"), ALICE: session(remaining, ALICE4, "10.8.5.0/24")}, LONG
        )
        assert refused == {ALICE: "less than 10 ms of its session is left"}
        assert not await stand.answers(ALICE4, GATEWAY4)
        refused = await guard.admit({ALICE: session(LONG, ALICE4)})
        assert refused == {}
        assert await guard.admit({ALICE: session(remaining, ALICE4)})
        assert not await stand.answers(ALICE4, GATEWAY4)
        await guard.lower()


@behaviours.add
async def without_the_agents_lease_sessions_stop_and_go_on_with_it(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, ALICE4), ROUTER: exempt(ROUTER4)}, 1.5)
    lapses = time.monotonic() + 1.5
    with (
        Pinger(stand.clients, SERVER, source=ALICE4) as alice,
        Pinger(stand.clients, SERVER, source=ROUTER4) as router,
    ):
        await reply(alice)
        last = await quiet(alice)
        assert lapses - 0.2 < last < lapses + LATE
        assert not await stand.answers(SERVER, ALICE4, space=stand.server)
        await guard.renew_lease(LONG)
        await reply(alice)
        await reply(router)
    assert router.lost == 0
    assert len(alice.gaps(0.4)) == 1


@behaviours.add
async def a_lease_that_is_renewed_each_tick_lasts(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, ALICE4)}, 0.5)
    with Pinger(stand.clients, GATEWAY4) as ping:
        for _ in range(12):
            await guard.renew_lease(0.8)
            await asyncio.sleep(0.1)
        await reply(ping)
    assert ping.lost == 0


@behaviours.add
async def without_a_lease_demanded_nothing_waits_for_one(stand: Stand) -> None:
    guard = stand.firewall()
    for none in (None, 0.0):
        await guard.raise_({ALICE: session(LONG, ALICE4)}, none)
        assert await stand.answers(ALICE4, GATEWAY4)
        assert (contents := await guard.read()) is not None
        assert (contents.lease_demanded, contents.faults) == (False, ())
        # On and off again while the agent runs.
        await guard.renew_lease(0.1)
        await asyncio.sleep(0.3)
        assert not await stand.answers(ALICE4, GATEWAY4)
        await guard.renew_lease(none)
        assert await stand.answers(ALICE4, GATEWAY4)
        await guard.lower()
