"""The guard beside what others keep in nftables, and by the library as by the program."""

import asyncio
import re

import pytest

from agent.encoding import parse_prefix
from agent.errors import GuardError
from agent.nft import Library, Program
from agent.ruleset import table_name
from tests.firewall.behaviour import LONG, Behaviours, reply
from tests.firewall.stand import ALICE, ALICE4, BOB, BOB4, GATEWAY4, Stand, exempt, session
from tests.support.netns import Pinger

behaviours = Behaviours()


@behaviours.add
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


@behaviours.add
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


@behaviours.add
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


@behaviours.add
async def support_asks_the_kernel_and_changes_nothing(stand: Stand) -> None:
    guard = stand.firewall()
    before = await stand.nft("list", "ruleset")
    assert await guard.support() == ()
    await asyncio.to_thread(stand.gateway.ip, "link", "delete", stand.name)
    assert await guard.support() == ()
    assert await stand.nft("list", "ruleset") == before
