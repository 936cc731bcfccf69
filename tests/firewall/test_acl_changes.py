"""Access rules while they change, and beside what others have in nftables."""

import time

import pytest

from agent.acl import Acl, PortRange
from agent.aclfirewall import AclFirewall
from agent.aclruleset import acl_table, acl_table_name
from agent.errors import GuardError
from tests.firewall import asking
from tests.firewall.asking import Hammer
from tests.firewall.rules import BOTH, OPEN, SHUT, UNWANTED, WANTED, addresses, allow, ports, shut_but_for
from tests.firewall.scene import PORTS, SSH, VPN4, VPN6, WEB, Scene
from tests.firewall.stand import ALICE, ALICE4, BOB4, SERVER, in_gateway, session

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("both", BOTH.values(), ids=BOTH)
@in_gateway
async def test_fault_13_a_rebuild_lets_through_what_both_allow_and_nothing_that_neither_does(
    scene: Scene, both: tuple[Acl, Acl]
) -> None:
    rules = scene.access(masquerade=True)
    await rules.put(both[0])
    with Hammer(scene.clients, ALICE4, scene.server, SERVER, (WANTED, UNWANTED)) as hammer:
        for number in range(1, 251):
            await rules.put(both[number % 2])
    print(f"sent {hammer.sent}, arrived {hammer.arrived}")
    assert hammer.sent[UNWANTED] > 2000
    assert hammer.arrived[UNWANTED] == 0
    # One more may have been sent than was counted.
    assert 0 <= hammer.arrived[WANTED] - hammer.sent[WANTED] <= 1


@in_gateway
async def test_a_restart_with_another_priority_is_a_rebuild_as_any_other(scene: Scene) -> None:
    acl = shut_but_for(allow(ports=ports(WANTED)))
    await scene.access(priority=0).put(acl)
    with Hammer(scene.clients, ALICE4, scene.server, SERVER, (WANTED, UNWANTED)) as hammer:
        for number in range(60):
            rules = AclFirewall(scene.name, list, scene.file, priority=(-10, 20)[number % 2])
            await rules.start()
            rules.close()
    assert "hook forward priority 20;" in await scene.table()
    assert (await scene.table()).count(" hook ") == 1
    assert hammer.sent[UNWANTED] > 500
    assert hammer.arrived[UNWANTED] == 0
    assert 0 <= hammer.arrived[WANTED] - hammer.sent[WANTED] <= 1


@in_gateway
async def test_the_same_rules_again_are_not_written_again(scene: Scene) -> None:
    await scene.access(masquerade=True).put(BOTH["the default denies"][0])
    before = await scene.nft("-a", "list", "ruleset")
    await scene.access(masquerade=True).put(BOTH["the default denies"][0])
    assert await scene.nft("-a", "list", "ruleset") == before


@in_gateway
async def test_a_thousand_rules_are_in_force_together(scene: Scene) -> None:
    many = tuple(
        allow(
            sources=addresses(f"10.{64 + (i >> 8)}.{i & 255}.0/24", f"10.8.{i >> 8}.{i & 255}"),
            destinations=addresses("192.0.2.1-192.0.2.9", f"198.51.{i & 255}.0/24"),
            ports=(PortRange(WEB, WEB), PortRange(20_000 + i, 20_010 + i)),
            comment=f"rule of group {i}",
        )
        for i in range(1000, 0, -1)
    )
    rules = scene.access()
    await rules.put(SHUT)
    began = time.monotonic()
    await rules.put(shut_but_for(*many))
    took = time.monotonic() - began
    began = time.monotonic()
    assert await rules._own.do(lambda: rules._mend(frozenset())) == []
    print(f"1,000 rules in {took:.3f} s, read again in {time.monotonic() - began:.3f} s")
    assert took < 10
    assert (await scene.table()).count("rule of group") == 1000
    assert await scene.opened(ALICE4) == {WEB}
    assert await scene.opened(BOB4) == {WEB}


# Beside others.


@in_gateway
async def test_what_is_not_ours_stays_as_it_is(scene: Scene) -> None:
    await scene.nft(
        "add table inet shop; add set inet shop s { type ipv4_addr; elements = { 192.0.2.9 }; };"
        "add chain inet shop f { type filter hook forward priority 0; policy accept; };"
        f"add rule inet shop f udp dport {SSH} drop;"
        "add table ip nat; add chain ip nat p { type nat hook postrouting priority 100; };"
        f"add table inet wg_agent.acl_wg1; add table inet {acl_table_name('wg0')}x"
    )
    guard = scene.firewall()
    await guard.raise_({ALICE: session(600, ALICE4)}, None)
    before, own = await scene.others(), await scene.ours()
    rules = scene.access(masquerade=True)
    await rules.put(OPEN)
    assert await scene.opened(ALICE4, asking.UDP) == set(PORTS) - {SSH}
    assert await scene.opened(BOB4) == set()
    await rules.put(SHUT)
    assert await scene.opened(ALICE4) == set()
    assert await scene.others() == before
    assert (await guard.read()) is not None
    assert (await scene.ours()).partition("elements")[0] == own.partition("elements")[0]
    assert await rules.remove()
    assert await scene.table() == ""
    assert await scene.others() == before
    assert not await rules.remove()


@in_gateway
async def test_a_table_of_this_name_that_is_not_ours_is_left_alone(scene: Scene) -> None:
    await scene.nft(f"add table {acl_table('wg0')}; add chain {acl_table('wg0')} mine")
    before = await scene.nft("list", "ruleset")
    rules = scene.access()
    for work in (rules.put(SHUT), rules.put(None), rules.remove()):
        with pytest.raises(GuardError, match="that wg-agent did not make"):
            await work
    assert await scene.nft("list", "ruleset") == before


@pytest.mark.parametrize("scene", ["wg-a.b=c+d", "acl_wg0", "3"], indirect=True)
@in_gateway
async def test_an_interface_of_any_name_has_its_rules(scene: Scene) -> None:
    rules = scene.access(masquerade=True, priority=-150)
    await scene.firewall().raise_({ALICE: session(600, ALICE4)}, None)
    await rules.put(shut_but_for(allow(ports=ports(WEB))))
    assert await scene.opened() == {WEB}
    assert await scene.seen_as(ALICE4) == "192.0.2.1"
    assert await rules._own.do(lambda: rules._mend(frozenset({VPN4, VPN6}))) == []
