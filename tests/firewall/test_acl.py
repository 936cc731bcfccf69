"""Access rules and masquerading by the packets that get through, and by whom others see a peer."""

import asyncio
import json
import socket
from typing import Any

import pytest

from agent.acl import ICMP, TCP, UDP, Acl, AclRule, PortRange, SnatBinding, Verdict
from agent.encoding import parse_prefix
from tests.firewall import asking
from tests.firewall.asking import Answerer, Asker
from tests.firewall.rules import OPEN, SHUT, addresses, allow, ports, shut_but_for
from tests.firewall.scene import DNS, HIGH, PORTS, PUBLIC4, PUBLIC6, SSH, VPN4, VPN6, WEB, Scene, kept, until
from tests.firewall.stand import ALICE4, ALICE6, BOB4, SERVER, SERVER6, Talker, in_gateway

pytestmark = pytest.mark.netns


@in_gateway
async def test_the_default_decides_where_there_is_no_rule(scene: Scene) -> None:
    rules = scene.access()
    assert await scene.opened() == set(PORTS)
    await rules.put(SHUT)
    assert await scene.opened() == set()
    assert await scene.opened(ALICE6) == set()
    assert not await scene.answers(ALICE4, SERVER)
    await rules.put(OPEN)
    assert await scene.opened() == await scene.opened(ALICE6) == set(PORTS)
    assert await scene.answers(ALICE4, SERVER)
    await rules.put(SHUT)
    await rules.put(None)
    assert await scene.opened() == set(PORTS)
    assert await scene.table() == ""


@pytest.mark.parametrize(
    ("sources", "destinations", "who"),
    [
        (("10.8.0.5",), (), {ALICE4}),
        (("10.8.0.6-10.8.0.200",), (), {BOB4}),
        (("10.8.0.4/30", "10.8.77.0/24"), (), {ALICE4, BOB4}),
        (("10.8.0.6", "10.8.0.2-10.8.0.4", "10.8.0.3-10.8.0.5", "10.8.0.6"), (), {ALICE4, BOB4}),
        ((), (SERVER,), {ALICE4, BOB4}),
        (("10.8.0.5",), ("192.0.2.0/24", "198.51.100.0/24"), {ALICE4}),
        (("10.8.0.5",), ("192.0.2.3-192.0.2.9",), set()),
        (("10.8.0.7-10.8.0.9",), (SERVER,), set()),
    ],
)
@in_gateway
async def test_a_rule_is_for_its_addresses_ranges_and_subnets(
    scene: Scene, sources: tuple[str, ...], destinations: tuple[str, ...], who: set[str]
) -> None:
    rule = allow(sources=addresses(*sources), destinations=addresses(*destinations))
    await scene.access().put(shut_but_for(rule))
    assert {source for source in (ALICE4, BOB4) if await scene.seen_as(source)} == who


@in_gateway
async def test_a_rule_of_ipv6_is_for_its_addresses_too(scene: Scene) -> None:
    rules = scene.access()
    sources = addresses("fd00:8::1-fd00:8::3", "fd00:8::5")
    await rules.put(shut_but_for(allow(6, sources=sources, destinations=addresses(SERVER6))))
    assert await scene.opened(ALICE6) == set(PORTS)
    await rules.put(shut_but_for(allow(6, sources=addresses("fd00:8::6-fd00:8::9", "fd00:9::/32"))))
    assert await scene.opened(ALICE6) == set()


@pytest.mark.parametrize(
    ("what", "tcp", "udp", "ping"),
    [
        ({"ports": ports(WEB), "protocols": (TCP,)}, {WEB}, set(), False),
        ({"ports": ports(DNS)}, {DNS}, {DNS}, False),
        ({"ports": (PortRange(SSH, DNS), PortRange(HIGH, 65535)), "protocols": (UDP,)},
         set(), {SSH, DNS, HIGH}, False),
        ({"ports": ports(SSH, WEB), "protocols": (TCP, ICMP)}, {SSH, WEB}, set(), True),
        ({"protocols": (UDP,)}, set(), set(PORTS), False),
        ({"protocols": (ICMP,)}, set(), set(), True),
        ({"ports": (PortRange(0, 65535),)}, set(PORTS), set(PORTS), False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [4, 6])
@in_gateway
async def test_a_rule_is_for_its_ports_and_protocols(
    scene: Scene, version: int, what: dict[str, Any], tcp: set[int], udp: set[int], ping: bool
) -> None:
    source, target = (ALICE4, SERVER) if version == 4 else (ALICE6, SERVER6)
    await scene.access().put(shut_but_for(allow(version, **what)))
    assert await scene.opened(source) == tcp
    assert await scene.opened(source, asking.UDP) == udp
    assert await scene.answers(source, target) == ping


@pytest.mark.parametrize("version", [4, 6])
@in_gateway
async def test_fault_13_a_rule_of_one_ip_version_opens_nothing_of_the_other(
    scene: Scene, version: int
) -> None:
    rules = scene.access()
    for what in ({}, {"ports": ports(*PORTS)}, {"protocols": (TCP, UDP, ICMP)}):
        await rules.put(shut_but_for(allow(version, **what)))
        assert await scene.opened(ALICE4) == (set(PORTS) if version == 4 else set())
        assert await scene.opened(ALICE6) == (set(PORTS) if version == 6 else set())
        wrong = (ALICE6, SERVER6) if version == 4 else (ALICE4, SERVER)
        assert not await scene.answers(*wrong)


@in_gateway
async def test_the_first_rule_that_matches_decides(scene: Scene) -> None:
    rules = scene.access()
    deny = AclRule(2, 4, Verdict.DROP, sources=addresses(ALICE4), ports=ports(SSH))
    await rules.put(shut_but_for(deny, allow(ports=ports(SSH, WEB))))
    assert await scene.opened(ALICE4) == {WEB}
    assert await scene.opened(BOB4) == {SSH, WEB}
    await rules.put(shut_but_for(allow(ports=ports(SSH, WEB)), deny))
    assert await scene.opened(ALICE4) == {SSH, WEB}
    await rules.put(Acl(Verdict.ACCEPT, (deny,)))
    assert await scene.opened(ALICE4) == {WEB, DNS, HIGH}


@in_gateway
async def test_an_established_flow_outlives_the_rule_that_let_it_in(scene: Scene) -> None:
    rules = scene.access()
    await rules.put(shut_but_for(allow(ports=ports(7777), protocols=(TCP,))))
    with Talker(scene.clients, ALICE4, scene.server, SERVER) as talker:
        await asyncio.to_thread(talker.wait, 20)
        await rules.put(SHUT)
        await asyncio.to_thread(talker.wait, 50)
    assert await scene.opened() == set()


@in_gateway
async def test_what_comes_from_behind_to_a_peer_is_not_judged_and_is_answered(scene: Scene) -> None:
    await scene.access().put(SHUT)
    behind, peer = Asker(scene.server), Answerer(scene.clients, WEB)
    try:
        assert await behind.ask(SERVER, ALICE4, WEB) == SERVER
        assert await behind.ask(SERVER6, ALICE6, WEB) == SERVER6
    finally:
        behind.close()
        peer.close()


@in_gateway
async def test_from_peer_to_peer_the_rules_hold_and_nothing_is_masqueraded(scene: Scene) -> None:
    """The other peer is an address beyond the tunnel, of which only what arrives for it is seen."""
    other = "10.8.50.50"

    for space, name, (far, far_name) in (
        (scene.gateway, scene.name, (scene.clients, "tun")),
        (scene.clients, "tun", (scene.gateway, scene.name)),
    ):
        mac = json.loads(far.ip("-j", "link", "show", far_name))[0]["address"]
        space.ip("neigh", "replace", other, "lladdr", mac, "dev", name, "nud", "permanent")
    scene.clients.run(
        *(
            "nft",
            "add table inet seen; add chain inet seen c { type filter hook prerouting priority -300; };",
        ),
        f"add rule inet seen c iifname tun ip saddr {ALICE4} ip daddr {other} udp dport {DNS} counter",
    )

    async def arrived() -> int:
        await scene.client.ask(ALICE4, other, DNS, asking.UDP)
        listed = await asyncio.to_thread(scene.clients.run, "nft", "list", "table", "inet", "seen")
        return int(listed.stdout.partition("packets ")[2].split()[0])

    rules = scene.access(masquerade=True)
    await rules.put(SHUT)
    assert await arrived() == 0
    await rules.put(shut_but_for(allow(destinations=addresses(other), ports=ports(DNS))))
    assert await arrived() == 1


@in_gateway
async def test_traffic_that_does_not_concern_the_interface_is_left_alone(scene: Scene) -> None:
    lan = scene.net.namespace("lan")
    scene.net.link(scene.gateway, "198.51.100.1/24", lan, "198.51.100.2/24")
    lan.ip("route", "add", "default", "via", "198.51.100.1")
    neighbour = Asker(lan)
    try:
        binding = SnatBinding(1, addresses("10.8.0.5"), socket.inet_aton(PUBLIC4))
        await scene.access(masquerade=True).put(Acl(Verdict.DROP, snat=(binding,)))
        assert await neighbour.ask("198.51.100.2", SERVER, WEB) == "198.51.100.2"
    finally:
        neighbour.close()


# By which address others see a peer.


@in_gateway
async def test_a_binding_gives_its_sources_their_public_address(scene: Scene) -> None:
    for address in (f"{PUBLIC4}/32", f"{PUBLIC6}/128"):
        scene.gateway.ip("address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else []))
    bindings = (
        SnatBinding(1, addresses("10.8.0.4-10.8.0.5", "10.8.7.0/24"), socket.inet_aton(PUBLIC4)),
        SnatBinding(2, addresses(ALICE6), socket.inet_pton(socket.AF_INET6, PUBLIC6)),
    )
    rules = scene.access()
    await rules.put(Acl(Verdict.ACCEPT, snat=bindings))
    assert [await scene.seen_as(who) for who in (ALICE4, BOB4, ALICE6)] == [PUBLIC4, BOB4, PUBLIC6]
    rules = scene.access(masquerade=True)
    await rules.put(Acl(Verdict.ACCEPT, snat=bindings))
    seen = [await scene.seen_as(who, asking.UDP) for who in (ALICE4, BOB4, ALICE6)]
    assert seen == [PUBLIC4, "192.0.2.1", PUBLIC6]


@in_gateway
async def test_fault_13_masquerading_is_for_the_vpns_own_networks(scene: Scene) -> None:
    rules = scene.access(masquerade=True)
    await rules.start()
    assert await scene.seen_as(ALICE4) == "192.0.2.1"
    assert await scene.seen_as(ALICE6) == "2001:db8:2::1"
    scene.networks = [parse_prefix("10.8.0.4/31"), parse_prefix("fd00:9::/32")]
    await rules.put(None)
    assert [await scene.seen_as(who) for who in (ALICE4, BOB4, ALICE6)] == ["192.0.2.1", BOB4, ALICE6]


@in_gateway
async def test_other_networks_of_the_vpn_are_masqueraded_as_soon_as_they_are_known(scene: Scene) -> None:
    async def there(scene: Scene, *texts: str) -> bool:
        table = await scene.table()
        return table.count(" masquerade ") == len(texts) and all(text in table for text in texts)

    rules = scene.access(masquerade=True)
    scene.networks = []
    await rules.start()
    assert await scene.table() == ""
    async with kept(rules):
        for networks in ([VPN4], [VPN6], [VPN4, VPN6]):
            scene.networks = networks
            rules.refresh()
            await until(lambda: there(scene, *map(str, scene.networks or ())))
            assert await scene.seen_as(ALICE4) == ("192.0.2.1" if VPN4 in networks else ALICE4)
            assert await scene.seen_as(ALICE6) == ("2001:db8:2::1" if VPN6 in networks else ALICE6)


@in_gateway
async def test_a_flow_stays_translated_when_its_binding_goes(scene: Scene) -> None:
    scene.gateway.ip("address", "add", f"{PUBLIC4}/32", "dev", "eth0")
    rules = scene.access()
    binding = SnatBinding(1, addresses(ALICE4), socket.inet_aton(PUBLIC4))
    await rules.put(Acl(Verdict.ACCEPT, snat=(binding,)))
    with Talker(scene.clients, ALICE4, scene.server, SERVER) as talker:
        await asyncio.to_thread(talker.wait, 20)
        await rules.put(OPEN)
        await asyncio.to_thread(talker.wait, 50)
    assert await scene.seen_as(ALICE4) == ALICE4
