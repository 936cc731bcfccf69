"""What the guard does to real packets and to what others keep in nftables, on any kernel.

Each is run inside the gateway's namespace of a new ``Stand``.
"""

import asyncio
import math
import re
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from agent.encoding import parse_prefix
from agent.errors import GuardDrifted, GuardError
from agent.guard import Admission, GuardContents, compare
from agent.model import PublicKey
from agent.nft import Library, Program
from agent.nftelements import ElementChange
from agent.ruleset import table_name
from tests.firewall.stand import (
    ALICE,
    ALICE4,
    ALICE6,
    BOB,
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

Behaviour = Callable[[Stand], Coroutine[Any, Any, None]]
BEHAVIOURS: list[Behaviour] = []
LONG = 600.0
LATE = 0.5
"""Seconds after a deadline within which the last reply may be read, on a machine that stalls."""


def behaviour(check: Behaviour) -> Behaviour:
    BEHAVIOURS.append(check)
    return check


async def quiet(ping: Pinger, within: float = 10.0) -> float:
    return await asyncio.to_thread(ping.wait_silence, 0.5, within)


async def reply(ping: Pinger) -> float:
    return await asyncio.to_thread(ping.wait_reply)


def differences(wanted: dict[PublicKey, Admission], contents: GuardContents | None) -> list[str]:
    """What has drifted but for the time that the test itself took, which under emulation is seconds."""
    drift = compare(wanted, contents, lease_demanded=True).drift
    return [detail for _, detail in drift if "than its session lives" not in detail]


@behaviour
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


@behaviour
async def established_tcp_ends_at_its_time_too(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, ALICE4)}, LONG)
    with Talker(stand.clients, ALICE4, stand.server, SERVER) as talker:
        await asyncio.to_thread(talker.wait, 20)
        await guard.admit({ALICE: session(1.0, ALICE4)})
        deadline = time.monotonic() + 1.0
        await asyncio.sleep(2)
        assert deadline - 0.5 < talker.last < deadline + LATE


@behaviour
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


@behaviour
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


@behaviour
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


@behaviour
async def no_timeout_makes_an_element_that_stays(stand: Stand) -> None:
    """12.7, 0.7 and 0 do in nft's JSON, 0 in its own language, and nine digits are refused there.

    Less than a tick of the kernel's clock could, where that is rounded down.
    """
    guard = stand.firewall()
    times = (12.7, 0.7, 0.01, 0.0119, 0.017, 1.0, 86399.9999, 100_000.5, 1e7 + 0.123, math.inf)
    await guard.raise_(
        {
            PublicKey(bytes([100 + i] * 32)): session(remaining, f"10.8.77.{i}", f"10.8.{100 + i}.0/24")
            for i, remaining in enumerate(times)
        },
        LONG,
    )
    contents = await guard.read()
    assert contents is not None
    for i, remaining in enumerate(times):
        for text in (f"10.8.77.{i}", f"10.8.{100 + i}.0/24"):
            prefix = parse_prefix(text)
            held = contents.elements.get(prefix, 0.0)
            assert prefix in contents.barred
            assert held is not None
            assert max(0.0, min(remaining, 9e7) - 5) <= held <= remaining
            assert held < math.inf


@behaviour
async def an_element_that_somebody_adds_without_a_timeout_is_gone_within_a_second(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, "10.8.9.0/24")}, LONG)
    name = table_name(stand.name)
    await stand.nft(f"add element inet {name} session4_24 {{ 10.8.3.0 }}")
    await stand.nft(f"add element inet {name} session6_128 {{ {ALICE6} timeout 0s }}")
    began = time.monotonic()
    await stand.nft(f"add element inet {name} session4_32 {{ {BOB4} }}")
    assert (contents := await guard.read()) is not None
    # Where the kernel is emulated, to add the element and to look may take its whole second.
    assert parse_prefix(BOB4) in contents.elements or time.monotonic() > began + 1
    await asyncio.sleep(1.2)
    assert not await stand.answers(BOB4, GATEWAY4)
    assert (contents := await guard.read()) is not None
    assert set(contents.elements) == {parse_prefix("10.8.9.0/24")}


@behaviour
async def a_renewal_moves_the_time_later_and_earlier(stand: Stand) -> None:
    """nft by itself leaves the timeout of an element that is there as it was, and says nothing."""
    guard = stand.firewall()
    await guard.raise_({}, LONG)
    prefix = parse_prefix(ALICE4)
    for remaining in (30.0, 500.0, 10.0, 100_000_000.0, 20.0):
        assert await guard.admit({ALICE: Admission((prefix,), remaining)}) == {}
        contents = await guard.read()
        assert contents is not None
        held = contents.elements[prefix]
        assert held is not None
        assert min(remaining, 99_999_999) - 3 < held <= remaining


@behaviour
async def expired_elements_are_dismissed_and_admitted_again(stand: Stand) -> None:
    guard = stand.firewall()
    wide = ("10.8.5.0/24", "fd00:9::/48", ALICE4)
    await guard.raise_({ALICE: session(0.05, *wide), BOB: session(LONG, BOB4)}, LONG)
    await asyncio.sleep(0.2)
    assert await guard.admit({ALICE: session(0.05, *wide)}) == {}
    await asyncio.sleep(0.2)
    prefixes = session(0, *wide).prefixes
    await guard.dismiss((*prefixes, *prefixes))
    await guard.dismiss((*prefixes, parse_prefix("10.99.0.0/17")))
    assert (contents := await guard.read()) is not None
    assert set(contents.elements) == contents.barred == {parse_prefix(BOB4)}


@behaviour
async def a_peer_that_needs_a_session_now_or_no_longer_is_moved(stand: Stand) -> None:
    guard = stand.firewall()
    prefixes = session(0, ALICE4, "10.8.5.0/24").prefixes
    await guard.raise_({}, LONG)
    for remaining in (None, LONG, None):
        await guard.admit({ALICE: Admission(prefixes, remaining)})
        contents = await guard.read()
        assert contents is not None
        assert contents.barred == (frozenset() if remaining is None else frozenset(prefixes))
        wanted = {ALICE: Admission(prefixes, remaining)}
        assert differences(wanted, contents) == []
        assert await stand.answers(ALICE4, GATEWAY4)


@behaviour
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


@behaviour
async def a_lease_that_is_renewed_each_tick_lasts(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(LONG, ALICE4)}, 0.5)
    with Pinger(stand.clients, GATEWAY4) as ping:
        for _ in range(12):
            await guard.renew_lease(0.8)
            await asyncio.sleep(0.1)
        await reply(ping)
    assert ping.lost == 0


@behaviour
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


@behaviour
async def writing_elements_anew_loses_no_packet(stand: Stand) -> None:
    guard = stand.firewall()
    alice, router = (ALICE4, ALICE6, "fd00:8:0:1::/64"), (ROUTER4, "10.8.8.0/24")
    await guard.raise_({ALICE: session(LONG, *alice), ROUTER: exempt(*router)}, LONG)
    with Pinger(stand.clients, SERVER) as four, Pinger(stand.clients, GATEWAY6) as six:
        await reply(four)
        await reply(six)
        end, rounds = time.monotonic() + 3, 0
        while time.monotonic() < end:
            rounds += 1
            await guard.admit({ALICE: session(LONG + rounds % 7, *alice), ROUTER: exempt(*router)})
            await guard.renew_lease(LONG)
            await guard.admit({BOB: session(5, BOB4, f"10.9.{rounds % 200}.0/24")})
            await guard.dismiss(session(0, BOB4, f"10.9.{rounds % 200}.0/24").prefixes)
            await guard.raise_({ALICE: session(LONG, *alice)}, LONG)
        await reply(four)
        await reply(six)
    assert rounds > 10
    assert (four.lost, six.lost) == (0, 0)


@behaviour
async def a_new_agent_takes_over_what_it_finds(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(40, ALICE4, "10.8.5.0/24"), ROUTER: exempt("10.8.9.0/24")}, LONG)
    with Pinger(stand.clients, GATEWAY4) as ping:
        await reply(ping)
        before = await stand.ours()
        guard = stand.firewall()
        contents = await guard.read()
        assert contents is not None
        assert contents.faults == ()
        alice, router = (session(0, ALICE4, "10.8.5.0/24").prefixes, exempt("10.8.9.0/24").prefixes)
        assert 30 < contents.remaining(alice) <= 40
        assert contents.remaining((*alice, parse_prefix(BOB4))) == 0
        assert contents.remaining(router) == 0
        assert contents.elements[router[0]] is None
        assert contents.lease is not None
        assert await guard.raise_({}, LONG) == {}
        await reply(ping)
    assert ping.lost == 0
    after = await stand.ours()
    assert [line for line in before.splitlines() if "expires" not in line] == [
        line for line in after.splitlines() if "expires" not in line
    ]
    assert (contents := await guard.read()) is not None
    assert 20 < contents.remaining(alice) <= 40


@behaviour
async def the_ingress_chain_is_back_after_the_link_was_made_again(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4)}
    await guard.raise_(wanted, LONG)
    await asyncio.to_thread(stand.gateway.ip, "link", "delete", stand.name)
    await asyncio.to_thread(stand.wire)
    await guard.raise_(wanted, LONG)
    assert (contents := await guard.read()) is not None
    assert contents.faults == ()
    assert await stand.answers(ALICE4, GATEWAY4)
    # Judged inbound by itself: postrouting is made to let everything out.
    name = f"inet {table_name(stand.name)}"
    await stand.nft(f"flush chain {name} postrouting")
    assert not await stand.answers(BOB4, GATEWAY4)
    assert (contents := await guard.read()) is not None
    assert contents.faults == ("the rules of the chain postrouting are not those of the agent",)


@behaviour
async def a_flush_of_everything_is_told_and_the_table_made_whole_again(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    disturbed = asyncio.create_task(guard.disturbed())
    await asyncio.sleep(0.1)
    await guard.admit(wanted)
    await guard.renew_lease(LONG)
    await guard.dismiss([parse_prefix(BOB4)])
    await asyncio.sleep(0.3)
    assert not disturbed.done()
    await stand.nft("flush", "ruleset")
    await asyncio.wait_for(disturbed, 5)
    assert await guard.read() is None
    assert compare(wanted, None, lease_demanded=True).rebuild
    works = guard.admit(wanted), guard.renew_lease(LONG), guard.dismiss([parse_prefix(BOB4)])
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        assert isinstance(outcome, GuardError)
        assert "is not whole: it is gone" in str(outcome)
    assert await guard.raise_(wanted, LONG) == {}
    assert await stand.answers(ALICE4, GATEWAY4)
    assert not await stand.answers(BOB4, GATEWAY4)
    assert (contents := await guard.read()) is not None
    assert differences(wanted, contents) == []


@behaviour
async def a_long_change_of_ones_own_is_not_listened_to_and_the_table_is_looked_at_after_it(
    stand: Stand,
) -> None:
    guard = stand.firewall()
    many = {
        PublicKey(n.to_bytes(32, "big")): session(LONG, f"10.9.{n >> 8}.{n & 255}") for n in range(1, 1001)
    }
    guard.mute()
    await guard.raise_({}, LONG)
    await guard.unmute()
    disturbed = asyncio.create_task(guard.disturbed())
    await asyncio.sleep(0.1)
    await guard.read()
    guard.mute()
    guard.mute()
    await guard.admit(many)
    await guard.unmute()
    assert not guard.untouched(), "who else has changed elements meanwhile is not known"
    assert not disturbed.done()
    await guard.unmute()
    assert (contents := await guard.read()) is not None
    assert differences(many, contents) == []
    assert guard.untouched()
    guard.mute()
    await stand.nft("flush", "ruleset")
    with pytest.raises(GuardDrifted, match="it is gone"):
        await guard.unmute()
    await guard.raise_(many, LONG)
    await guard.lower()
    guard.mute()
    await guard.unmute()
    disturbed.cancel()


@behaviour
async def what_was_read_need_not_be_read_again_until_somebody_else_changes_the_table(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    assert not guard.untouched()
    disturbed = asyncio.create_task(guard.disturbed())
    await asyncio.sleep(0.1)
    await guard.read()
    assert guard.untouched()
    # What the agent does itself, and what happens to other tables, it need not read.
    await guard.admit({BOB: session(LONG, BOB4)._replace(fresh=True)})
    await guard.admit(wanted | {BOB: session(LONG, BOB4)})
    await guard.dismiss([parse_prefix(ALICE4)])
    await guard.renew_lease(LONG)
    await stand.nft("add table inet wg_agent_wg; add set inet wg_agent_wg s { type ipv4_addr; }")
    await stand.nft("add element inet wg_agent_wg s { 10.8.0.5 }")
    assert guard.untouched()
    assert not disturbed.done()
    name = f"inet {table_name(stand.name)}"
    for foreign in (
        f"delete element {name} session4_32 {{ {BOB4} }}",
        f"add element {name} session4_32 {{ {ALICE4} timeout 1h }}",
        f"flush set {name} barred4_32",
    ):
        await stand.nft(foreign)
        assert not guard.untouched(), foreign
        assert not disturbed.done()
        await guard.admit({BOB: session(LONG, BOB4)})
        assert not guard.untouched(), "what was heard is not forgotten by a change of our own"
        await guard.read()
        assert guard.untouched()
    await stand.nft(f"add chain {name} strange")
    assert not guard.untouched()
    await asyncio.wait_for(disturbed, 5)
    await stand.nft("flush ruleset")
    await guard.read()
    await guard.raise_(wanted, LONG)
    assert not guard.untouched()


@behaviour
async def an_element_for_everything_is_taken_out_when_it_is_seen(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4)}
    await guard.raise_(wanted, LONG)
    await stand.nft(f"add element inet {table_name(stand.name)} session4_32 {{ * timeout 1h }}")
    assert await stand.answers(BOB4, GATEWAY4)
    assert (contents := await guard.read()) is not None
    assert contents.faults == ("the set session4_32 had an element for everything",)
    assert not await stand.answers(BOB4, GATEWAY4)
    assert await stand.answers(ALICE4, GATEWAY4)
    assert differences(wanted, await guard.read()) == []


@behaviour
async def after_a_short_session_its_barred_prefix_is_not_in_an_exempt_peers_way(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({}, LONG)
    assert set(await guard.admit({ROUTER: session(0.005, ROUTER4)._replace(fresh=True)})) == {ROUTER}
    await guard.admit({ROUTER: exempt(ROUTER4)})
    assert await stand.answers(ROUTER4, GATEWAY4)


@behaviour
async def who_is_there_already_is_only_written_to_a_table_that_is_made(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), BOB: session(LONG, BOB4)}
    assert await guard.raise_(wanted, LONG, {ALICE, BOB}) == {}
    assert differences(wanted, await guard.read()) == []
    other = {ALICE: session(LONG / 2, ALICE4), BOB: session(LONG / 2, BOB4)}
    assert await guard.raise_(other, LONG, {ALICE}) == {}
    assert differences({ALICE: wanted[ALICE], BOB: other[BOB]}, await guard.read()) == []


@behaviour
async def what_is_written_afresh_is_as_what_is_written_over(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4, ALICE6), ROUTER: exempt("10.8.9.0/24"), BOB: session(0.001, BOB4)}
    await guard.raise_({}, LONG)
    fresh = {key: admission._replace(fresh=True) for key, admission in wanted.items()}
    assert set(await guard.admit(fresh)) == {BOB}
    for _ in range(2):
        assert (contents := await guard.read()) is not None
        assert contents.barred == {parse_prefix(p) for p in (ALICE4, ALICE6, BOB4)}
        assert differences({key: wanted[key] for key in (ALICE, ROUTER)}, contents) == []
        assert await stand.answers(ALICE4, GATEWAY4)
        assert await stand.answers(ROUTER4, GATEWAY4)
        assert not await stand.answers(BOB4, GATEWAY4)
        await guard.admit(wanted)


@behaviour
async def what_others_do_to_the_table_is_seen_and_mended_around_its_elements(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4, "10.8.5.0/24"), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    name = f"inet {table_name(stand.name)}"
    faults = {
        f"add table {name} {{ flags dormant; }}": "the table is dormant",
        f"insert rule {name} ingress accept": "the rules of the chain ingress",
        f"flush chain {name} from_exempt": "the rules of the chain from_exempt",
        f"add rule {name} to_session drop": "the rules of the chain to_session",
        f"flush chain {name} postrouting; delete chain {name} postrouting": "the chain postrouting is gone",
        f"flush chain {name} ingress; delete chain {name} ingress": "the chain ingress is gone",
        f"flush chain {name} ingress; delete chain {name} ingress;"
        f"add chain {name} ingress {{ type filter hook ingress device lo priority 0; policy drop; }}": (
            "the chain ingress is not hooked in"
        ),
        f"flush chain {name} ingress; delete chain {name} ingress;"
        f"add chain {name} ingress {{ type filter hook prerouting priority 0; policy accept; }}": (
            "the chain ingress is not hooked in"
        ),
        f"add chain {name} ingress {{ policy accept; }}": "the chain ingress is not hooked in",
        f"add chain {name} extra {{ type filter hook input priority 0; policy drop; }}": (
            "there is a foreign chain extra"
        ),
        f"flush chain {name} ingress; flush chain {name} postrouting; delete set {name} lease": (
            "the set lease is gone"
        ),
    }
    for command, fault in faults.items():
        await guard.admit(wanted)
        await stand.nft(command)
        contents = await guard.read()
        assert contents is not None
        assert any(line.startswith(fault) for line in contents.faults), (command, contents.faults)
        repair = compare(wanted, contents, lease_demanded=True)
        assert (repair.rebuild, repair.admit, repair.dismiss) == (True, {}, ())
        assert await guard.raise_({}, LONG) == {}
        contents = await guard.read()
        assert contents is not None
        assert differences(wanted, contents) == [], command
        assert contents.lease is not None
        assert await stand.answers(ALICE4, GATEWAY4)
        assert not await stand.answers(BOB4, GATEWAY4)


@behaviour
async def a_set_that_somebody_made_otherwise_costs_the_table(stand: Stand) -> None:
    """A set of sessions without a timeout of its own would not fail closed."""
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    name = f"inet {table_name(stand.name)}"
    chains = "; ".join(f"flush chain {name} {way}_session" for way in ("from", "to"))
    await stand.nft(
        f"{chains}; delete set {name} session4_32;"
        f"add set {name} session4_32 {{ type ipv4_addr; flags timeout; }};"
        f"add element {name} session4_32 {{ {BOB4} }}"
    )
    contents = await guard.read()
    assert contents is not None
    assert "the set session4_32 is not as the agent made it" in contents.faults
    assert await guard.raise_(wanted, LONG) == {}
    assert (contents := await guard.read()) is not None
    assert differences(wanted, contents) == []
    assert not await stand.answers(BOB4, GATEWAY4)


@behaviour
async def elements_that_others_change_are_repaired(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {
        ALICE: session(40, ALICE4, "10.8.5.0/24"),
        BOB: session(40, BOB4),
        ROUTER: exempt("10.8.9.0/24"),
    }
    await guard.raise_(wanted, LONG)
    name = f"inet {table_name(stand.name)}"
    await stand.nft(
        f"delete element {name} session4_32 {{ {ALICE4} }};"
        f"add element {name} session4_32 {{ {ALICE4} timeout 3000s, 10.8.66.6 timeout 3000s }};"
        f"delete element {name} barred4_32 {{ {BOB4} }}; add element {name} barred4_32 {{ 10.8.66.7 }};"
        f'flush set {name} exempt4_24; add element {name} exempt4_32 {{ 10.8.66.8 comment "mine" }}'
    )
    repair = compare(wanted, await guard.read(), lease_demanded=True)
    assert set(repair.admit) == {ALICE, BOB, ROUTER}
    assert {str(prefix) for prefix in repair.dismiss} == {"10.8.66.6/32", "10.8.66.7/32", "10.8.66.8/32"}
    assert not repair.rebuild
    await guard.dismiss(repair.dismiss)
    await guard.admit(repair.admit)
    assert differences(wanted, await guard.read()) == []


@behaviour
async def one_bad_peer_does_not_hold_back_others(stand: Stand) -> None:
    class Stubborn(Program):
        """Real nft, and a real refusal of every transaction with these addresses in it."""

        transactions = 0

        def write(self, table: str, changes: Iterable[ElementChange]) -> None:
            self.transactions += 1
            super().write(table, map(self._spoilt, changes))

        def _spoilt(self, change: ElementChange) -> ElementChange:
            """The kernel takes no key of another length for an address."""
            bad = {socket.inet_aton("10.20.0.17"), socket.inet_aton("10.20.1.1")}
            if bad.isdisjoint(change.elements):
                return change
            return change._replace(elements={key * 4: life for key, life in change.elements.items()})

    nft = Stubborn()
    guard = stand.firewall(nft)
    peers = {
        PublicKey(i.to_bytes(32)): session(LONG, f"10.20.{i >> 8}.{i & 255}", f"10.30.{i}.0/24")
        for i in range(250)
    }
    peers |= {PublicKey((256 + i).to_bytes(32)): session(LONG, f"10.20.1.{i}") for i in range(50)}
    bad = {PublicKey((17).to_bytes(32)), PublicKey((257).to_bytes(32))}
    for step in ("raise", "admit"):
        nft.transactions = 0
        refused = await (guard.raise_(peers, LONG) if step == "raise" else guard.admit(peers))
        assert set(refused) == bad
        assert all("nftables: " in why for why in refused.values())
        assert nft.transactions < 60
        contents = await guard.read()
        assert contents is not None
        good = {key: admission for key, admission in peers.items() if key not in bad}
        assert differences(good, contents) == []


@behaviour
async def nested_prefixes_do_not_refuse_one_another(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {
        ROUTER: exempt("0.0.0.0/0", "::/0", "10.0.0.0/8", "10.8.0.0/16", "10.8.9.0/24", ROUTER4),
        ALICE: session(LONG, "10.8.0.4/30", "fd00:8::/64"),
        BOB: session(LONG, "10.8.0.0/25"),
    }
    assert await guard.raise_(wanted, LONG) == {}
    assert (contents := await guard.read()) is not None
    assert differences(wanted, contents) == []
    await guard.dismiss(wanted[BOB].prefixes)
    assert await stand.answers(ALICE4, GATEWAY4)
    assert await stand.answers(ALICE6, GATEWAY6)


@behaviour
async def foreign_tables_stay_byte_for_byte_and_other_links_lose_nothing(stand: Stand) -> None:
    name = table_name(stand.name)
    await stand.nft(
        "add table inet filter; add set inet filter s { type ipv4_addr; flags interval; };"
        "add element inet filter s { 10.0.0.0/8 }; add table ip nat;"
        "add chain ip nat post { type nat hook postrouting priority 100; };"
        "add rule ip nat post oifname eth9 masquerade; add table netdev n;"
        f"add table inet {name}0; add set inet {name}0 lease {{ type ifname; }};"
        f"add table ip {name}; add chain ip {name} ingress"
    )
    before = await stand.foreign()
    guard = stand.firewall()
    with Pinger(stand.server, "192.0.2.1") as ping:
        await reply(ping)
        await guard.raise_({ALICE: session(LONG, ALICE4, "10.8.5.0/24")}, LONG)
        await guard.admit({BOB: exempt(BOB4)})
        await guard.dismiss([parse_prefix(BOB4)])
        await guard.renew_lease(None)
        assert await stand.foreign() == before
        assert await guard.lower()
        await reply(ping)
    assert ping.lost == 0
    assert await stand.foreign() == before
    assert await stand.nft("-s", "list", "ruleset") == before
    assert await guard.lower() is False


@behaviour
async def a_table_of_this_name_that_is_not_ours_is_left_alone(stand: Stand) -> None:
    name = table_name(stand.name)
    await stand.nft(f"add table inet {name}; add set inet {name} mine {{ type ipv4_addr; }}")
    before = await stand.nft("list", "ruleset")
    guard = stand.firewall()
    works = guard.read(), guard.raise_({}, None), guard.lower(), guard.renew_lease(9)
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        assert isinstance(outcome, GuardError)
        assert "that wg-agent did not make" in str(outcome)
    assert await stand.nft("list", "ruleset") == before


@behaviour
async def the_program_does_what_the_library_does(stand: Stand) -> None:
    listings = []
    for nft in (Library(), Program()):
        guard = stand.firewall(nft)
        assert await guard.support() == ()
        assert await guard.read() is None
        await guard.raise_({ALICE: session(LONG, ALICE4, "fd00:9::/48")}, LONG)
        await guard.admit({BOB: exempt(BOB4)})
        await guard.renew_lease(LONG)
        assert await stand.answers(ALICE4, GATEWAY4)
        listed = await stand.nft("-s", "list", "ruleset")
        # A session's life is written as of that moment, and no two runs take the same time.
        listed, lives = re.subn(r"timeout 9m59s\w+ms\b", "timeout", listed)
        assert lives == 2
        listings.append(listed)
        with pytest.raises(GuardError, match=r"nftables: .*No such file"):
            nft.run("add chain inet nowhere c\n")
        assert await guard.lower()
    assert listings[0] == listings[1]


@behaviour
async def support_asks_the_kernel_and_changes_nothing(stand: Stand) -> None:
    guard = stand.firewall()
    before = await stand.nft("list", "ruleset")
    assert await guard.support() == ()
    await asyncio.to_thread(stand.gateway.ip, "link", "delete", stand.name)
    assert await guard.support() == ()
    assert await stand.nft("list", "ruleset") == before
