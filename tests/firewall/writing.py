"""What is in the sets after peers are admitted, renewed and dismissed, and what that costs nobody."""

import asyncio
import math
import socket
import time
from collections.abc import Iterable

from agent.encoding import parse_prefix
from agent.guard import Admission
from agent.model import PublicKey
from agent.nft import Program
from agent.nftelements import ElementChange
from agent.ruleset import table_name
from tests.firewall.behaviour import LONG, Behaviours, differences, reply
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
    Stand,
    exempt,
    session,
)
from tests.support.netns import Pinger

behaviours = Behaviours()


@behaviours.add
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


@behaviours.add
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


@behaviours.add
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


@behaviours.add
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


@behaviours.add
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


@behaviours.add
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


@behaviours.add
async def after_a_short_session_its_barred_prefix_is_not_in_an_exempt_peers_way(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({}, LONG)
    assert set(await guard.admit({ROUTER: session(0.005, ROUTER4)._replace(fresh=True)})) == {ROUTER}
    await guard.admit({ROUTER: exempt(ROUTER4)})
    assert await stand.answers(ROUTER4, GATEWAY4)


@behaviours.add
async def who_is_there_already_is_only_written_to_a_table_that_is_made(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), BOB: session(LONG, BOB4)}
    assert await guard.raise_(wanted, LONG, {ALICE, BOB}) == {}
    assert differences(wanted, await guard.read()) == []
    other = {ALICE: session(LONG / 2, ALICE4), BOB: session(LONG / 2, BOB4)}
    assert await guard.raise_(other, LONG, {ALICE}) == {}
    assert (contents := await guard.read()) is not None
    assert differences({ALICE: wanted[ALICE], BOB: other[BOB]}, contents) == []
    assert contents.remaining(other[BOB].prefixes) <= LONG / 2 < contents.remaining(wanted[ALICE].prefixes)


@behaviours.add
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


@behaviours.add
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


@behaviours.add
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
