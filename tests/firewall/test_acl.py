"""Access rules and masquerading by the packets that get through, and what becomes of the table."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.acl import ICMP, TCP, UDP, Acl, AclRule, AddressRange, PortRange, SnatBinding, Verdict
from agent.aclfirewall import AclFirewall
from agent.aclruleset import acl_table, acl_table_name
from agent.encoding import parse_prefix
from agent.errors import GuardError
from agent.model import Prefix
from agent.nft import Library, NftError
from tests.contract.inside import inside
from tests.firewall import asking
from tests.firewall.asking import Answerer, Asker, Hammer
from tests.firewall.stand import (
    ALICE,
    ALICE4,
    ALICE6,
    BOB4,
    SERVER,
    SERVER6,
    Stand,
    Talker,
    session,
)
from tests.support.netns import Network

pytestmark = pytest.mark.netns

WEB, SSH, DNS, HIGH = 4080, 4022, 4053, 4999
PORTS = (WEB, SSH, DNS, HIGH)
VPN4, VPN6 = parse_prefix("10.8.0.0/16"), parse_prefix("fd00:8::/32")
PUBLIC4, PUBLIC6 = "192.0.2.77", "2001:db8:2::77"
SHUT, OPEN = Acl(Verdict.DROP), Acl(Verdict.ACCEPT)


class Scene(Stand):
    """The stand with a server that answers, and access rules over the interface."""

    def __init__(self, net: Network, folder: Path, name: str = "wg0") -> None:
        super().__init__(net, name)
        self.file = folder / "acl.json"
        self.client, self.answerer = Asker(self.clients), Answerer(self.server, *PORTS)
        self.networks: list[Prefix] | None = [VPN4, VPN6]
        self.rules: list[AclFirewall] = []

    def access(self, **options: Any) -> AclFirewall:
        rules = AclFirewall(self.name, lambda: self.networks, self.file, **options)
        self.rules.append(rules)
        return rules

    def close(self) -> None:
        for rules in self.rules:
            rules.close()
        self.client.close()
        self.answerer.close()
        super().close()

    async def opened(self, source: str = ALICE4, kind: int = asking.TCP) -> set[int]:
        """The ports of the server, by IPv4 or IPv6, that a client gets an answer from."""
        target = SERVER6 if ":" in source else SERVER
        seen = await asyncio.gather(*(self.client.ask(source, target, port, kind) for port in PORTS))
        return {port for port, address in zip(PORTS, seen, strict=True) if address}

    async def seen_as(self, source: str, kind: int = asking.TCP) -> str:
        """The address by which the server sees a client."""
        return await self.client.ask(source, SERVER6 if ":" in source else SERVER, WEB, kind)

    async def table(self) -> str:
        """The table of access rules; "" if it is not there."""
        listed = (await self.nft("list", "ruleset")).split("table ")
        return next((t for t in listed if t.startswith(f"{acl_table(self.name)} ")), "")

    async def others(self) -> str:
        listed = (await self.foreign()).split("table ")
        return "".join(t for t in listed if not t.startswith(f"{acl_table(self.name)} "))


Check = Callable[[Scene], Coroutine[Any, Any, None]]


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., None]:
    def run(check: Check, name: str = "wg0") -> None:
        with Network() as net:
            scene = Scene(net, tmp_path, name)
            try:
                inside(scene.gateway, check(scene))
            finally:
                scene.close()

    return run


def addresses(*texts: str) -> tuple[AddressRange, ...]:
    found = []
    for text in texts:
        first, dash, last = text.partition("-")
        if dash:
            found.append(AddressRange(*(ipaddress.ip_address(end).packed for end in (first, last))))
        else:
            network = ipaddress.ip_network(text)
            found.append(AddressRange(network.network_address.packed, network.broadcast_address.packed))
    return tuple(found)


def ports(*numbers: int) -> tuple[PortRange, ...]:
    return tuple(PortRange(number, number) for number in numbers)


def allow(version: Any = 4, **what: Any) -> AclRule:
    return AclRule(1, version, Verdict.ACCEPT, **what)


def shut_but_for(*rules: AclRule) -> Acl:
    return Acl(Verdict.DROP, rules)


async def until(condition: Callable[[], Coroutine[Any, Any, bool]], within: float = 10.0) -> float:
    """Wait for it; the seconds that took."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within, "it does not come about"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@contextlib.asynccontextmanager
async def kept(rules: AclFirewall) -> AsyncIterator[None]:
    task = asyncio.create_task(rules.keep())
    await asyncio.sleep(0.2)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# What gets through.


def test_the_default_decides_where_there_is_no_rule(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
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

    judge(check)


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
def test_a_rule_is_for_its_addresses_ranges_and_subnets(
    judge: Callable[..., None], sources: tuple[str, ...], destinations: tuple[str, ...], who: set[str]
) -> None:
    async def check(scene: Scene) -> None:
        rule = allow(sources=addresses(*sources), destinations=addresses(*destinations))
        await scene.access().put(shut_but_for(rule))
        assert {source for source in (ALICE4, BOB4) if await scene.seen_as(source)} == who

    judge(check)


def test_a_rule_of_ipv6_is_for_its_addresses_too(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access()
        sources = addresses("fd00:8::1-fd00:8::3", "fd00:8::5")
        await rules.put(shut_but_for(allow(6, sources=sources, destinations=addresses(SERVER6))))
        assert await scene.opened(ALICE6) == set(PORTS)
        await rules.put(shut_but_for(allow(6, sources=addresses("fd00:8::6-fd00:8::9", "fd00:9::/32"))))
        assert await scene.opened(ALICE6) == set()

    judge(check)


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
def test_a_rule_is_for_its_ports_and_protocols(
    judge: Callable[..., None], version: int, what: dict[str, Any], tcp: set[int], udp: set[int], ping: bool
) -> None:
    async def check(scene: Scene) -> None:
        source, target = (ALICE4, SERVER) if version == 4 else (ALICE6, SERVER6)
        await scene.access().put(shut_but_for(allow(version, **what)))
        assert await scene.opened(source) == tcp
        assert await scene.opened(source, asking.UDP) == udp
        assert await scene.answers(source, target) == ping

    judge(check)


@pytest.mark.parametrize("version", [4, 6])
def test_fault_13_a_rule_of_one_ip_version_opens_nothing_of_the_other(
    judge: Callable[..., None], version: int
) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access()
        for what in ({}, {"ports": ports(*PORTS)}, {"protocols": (TCP, UDP, ICMP)}):
            await rules.put(shut_but_for(allow(version, **what)))
            assert await scene.opened(ALICE4) == (set(PORTS) if version == 4 else set())
            assert await scene.opened(ALICE6) == (set(PORTS) if version == 6 else set())
            wrong = (ALICE6, SERVER6) if version == 4 else (ALICE4, SERVER)
            assert not await scene.answers(*wrong)

    judge(check)


def test_the_first_rule_that_matches_decides(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access()
        deny = AclRule(2, 4, Verdict.DROP, sources=addresses(ALICE4), ports=ports(SSH))
        await rules.put(shut_but_for(deny, allow(ports=ports(SSH, WEB))))
        assert await scene.opened(ALICE4) == {WEB}
        assert await scene.opened(BOB4) == {SSH, WEB}
        await rules.put(shut_but_for(allow(ports=ports(SSH, WEB)), deny))
        assert await scene.opened(ALICE4) == {SSH, WEB}
        await rules.put(Acl(Verdict.ACCEPT, (deny,)))
        assert await scene.opened(ALICE4) == {WEB, DNS, HIGH}

    judge(check)


def test_an_established_flow_outlives_the_rule_that_let_it_in(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access()
        await rules.put(shut_but_for(allow(ports=ports(7777), protocols=(TCP,))))
        with Talker(scene.clients, ALICE4, scene.server, SERVER) as talker:
            await asyncio.to_thread(talker.wait, 20)
            await rules.put(SHUT)
            await asyncio.to_thread(talker.wait, 50)
        assert await scene.opened() == set()

    judge(check)


def test_what_comes_from_behind_to_a_peer_is_not_judged_and_is_answered(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        await scene.access().put(SHUT)
        behind, peer = Asker(scene.server), Answerer(scene.clients, WEB)
        try:
            assert await behind.ask(SERVER, ALICE4, WEB) == SERVER
            assert await behind.ask(SERVER6, ALICE6, WEB) == SERVER6
        finally:
            behind.close()
            peer.close()

    judge(check)


def test_from_peer_to_peer_the_rules_hold_and_nothing_is_masqueraded(judge: Callable[..., None]) -> None:
    """The other peer is an address beyond the tunnel, of which only what arrives for it is seen."""
    other = "10.8.50.50"

    async def check(scene: Scene) -> None:
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

    judge(check)


def test_traffic_that_does_not_concern_the_interface_is_left_alone(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
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

    judge(check)


# By which address others see a peer.


def test_a_binding_gives_its_sources_their_public_address(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
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

    judge(check)


def test_fault_13_masquerading_is_for_the_vpns_own_networks(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access(masquerade=True)
        await rules.start()
        assert await scene.seen_as(ALICE4) == "192.0.2.1"
        assert await scene.seen_as(ALICE6) == "2001:db8:2::1"
        scene.networks = [parse_prefix("10.8.0.4/31"), parse_prefix("fd00:9::/32")]
        await rules.put(None)
        assert [await scene.seen_as(who) for who in (ALICE4, BOB4, ALICE6)] == ["192.0.2.1", BOB4, ALICE6]

    judge(check)


def test_other_networks_of_the_vpn_are_masqueraded_as_soon_as_they_are_known(
    judge: Callable[..., None],
) -> None:
    async def check(scene: Scene) -> None:
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

    async def there(scene: Scene, *texts: str) -> bool:
        table = await scene.table()
        return table.count(" masquerade ") == len(texts) and all(text in table for text in texts)

    judge(check)


def test_a_flow_stays_translated_when_its_binding_goes(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        scene.gateway.ip("address", "add", f"{PUBLIC4}/32", "dev", "eth0")
        rules = scene.access()
        binding = SnatBinding(1, addresses(ALICE4), socket.inet_aton(PUBLIC4))
        await rules.put(Acl(Verdict.ACCEPT, snat=(binding,)))
        with Talker(scene.clients, ALICE4, scene.server, SERVER) as talker:
            await asyncio.to_thread(talker.wait, 20)
            await rules.put(OPEN)
            await asyncio.to_thread(talker.wait, 50)
        assert await scene.seen_as(ALICE4) == ALICE4

    judge(check)


# A change of rules.


def filled(numbers: Iterable[int]) -> tuple[AclRule, ...]:
    """Rules for others, each with sets of ranges."""
    return tuple(
        AclRule(
            number,
            4,
            Verdict.ACCEPT,
            addresses(f"10.9.{number}.1-10.9.{number}.9", f"10.9.{number}.20-10.9.{number}.33"),
            addresses("198.51.100.0/25", "203.0.113.7"),
            (PortRange(1000, 2000), PortRange(3000, 3010)),
            (TCP, UDP),
        )
        for number in numbers
    )


def deny(*closed: PortRange) -> tuple[AclRule, ...]:
    return (AclRule(7, 4, Verdict.DROP, addresses("10.8.0.1-10.8.0.5", "10.8.0.9"), ports=closed),)


WANTED, UNWANTED = 5001, 5002
BOTH = {
    "the default denies": (
        Acl(Verdict.DROP, (*filled(range(30)), allow(ports=(*ports(WANTED), PortRange(6000, 6010))))),
        Acl(Verdict.DROP, (allow(ports=(PortRange(4000, WANTED), *ports(7000))), *filled(range(50)))),
    ),
    "the default allows": (
        Acl(Verdict.ACCEPT, (*deny(PortRange(UNWANTED, 5010), *ports(9000)), *filled(range(30)))),
        Acl(Verdict.ACCEPT, (*filled(range(50)), *deny(PortRange(8000, 8010), *ports(UNWANTED)))),
    ),
}


@pytest.mark.parametrize("both", BOTH.values(), ids=BOTH)
def test_fault_13_a_rebuild_lets_through_what_both_allow_and_nothing_that_neither_does(
    judge: Callable[..., None], both: tuple[Acl, Acl]
) -> None:
    async def check(scene: Scene) -> None:
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

    judge(check)


def test_a_restart_with_another_priority_is_a_rebuild_as_any_other(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
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

    judge(check)


def test_the_same_rules_again_are_not_written_again(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        await scene.access(masquerade=True).put(BOTH["the default denies"][0])
        before = await scene.nft("-a", "list", "ruleset")
        await scene.access(masquerade=True).put(BOTH["the default denies"][0])
        assert await scene.nft("-a", "list", "ruleset") == before

    judge(check)


def test_a_thousand_rules_are_in_force_together(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
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

    judge(check)


# Beside others.


def test_what_is_not_ours_stays_as_it_is(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
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

    judge(check)


def test_a_table_of_this_name_that_is_not_ours_is_left_alone(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        await scene.nft(f"add table {acl_table('wg0')}; add chain {acl_table('wg0')} mine")
        before = await scene.nft("list", "ruleset")
        rules = scene.access()
        for work in (rules.put(SHUT), rules.put(None), rules.remove()):
            with pytest.raises(GuardError, match="that wg-agent did not make"):
                await work
        assert await scene.nft("list", "ruleset") == before

    judge(check)


@pytest.mark.parametrize("name", ["wg-a.b=c+d", "acl_wg0", "3"])
def test_an_interface_of_any_name_has_its_rules(judge: Callable[..., None], name: str) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access(masquerade=True, priority=-150)
        await scene.firewall().raise_({ALICE: session(600, ALICE4)}, None)
        await rules.put(shut_but_for(allow(ports=ports(WEB))))
        assert await scene.opened() == {WEB}
        assert await scene.seen_as(ALICE4) == "192.0.2.1"
        assert await rules._own.do(lambda: rules._mend(frozenset({VPN4, VPN6}))) == []

    judge(check, name)


# What others do to the table.


@pytest.mark.parametrize(
    "command",
    [
        "delete table {table}",
        "flush ruleset",
        "flush chain {table} forward_0",
        "flush chain {table} access_a",
        "flush table {table}",
        "add table {table} {{ flags dormant; }}",
        "insert rule {table} access_a accept",
        "insert rule {table} forward_0 accept",
        "add chain {table} theirs; add rule {table} theirs drop",
        "flush chain {table} postrouting; delete chain {table} postrouting",
    ],
)
def test_what_somebody_does_to_the_table_is_put_right_at_once_and_told(
    judge: Callable[..., None], command: str
) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access(masquerade=True)
        await rules.put(shut_but_for(allow(ports=ports(WEB), sources=addresses(ALICE4, BOB4))))
        whole = (await scene.table()).replace("_a ", "_b ")
        async with kept(rules):
            with capture_logs() as logs:
                await scene.nft(command.format(table=acl_table(scene.name)))
                took = await until(lambda: is_whole(scene, whole))
                assert took < 2
                await asyncio.sleep(0.1)
            told = [entry for entry in logs if "somebody has changed" in entry["event"]]
            assert len(told) == 1
            assert told[0]["changes"]
            assert await scene.opened() == {WEB}

    async def is_whole(scene: Scene, whole: str) -> bool:
        now = (await scene.table()).replace("_a ", "_b ")
        return sorted(undigested(now)) == sorted(undigested(whole))

    def undigested(table: str) -> Iterator[str]:
        for line in table.splitlines():
            yield line.partition(' comment "wg-agent')[0].strip()

    judge(check)


def test_what_the_agent_does_itself_is_no_drift(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access(masquerade=True)
        await rules.start()
        async with kept(rules):
            with capture_logs() as logs:
                for acl in (SHUT, None, *BOTH["the default allows"], OPEN):
                    await rules.put(acl)
                    await asyncio.sleep(0.7)
                assert logs == []

    judge(check)


def test_a_long_change_of_the_guards_is_not_listened_to_and_followed_by_a_look(
    judge: Callable[..., None],
) -> None:
    async def check(scene: Scene) -> None:
        guard, rules = scene.firewall(), scene.access()
        await guard.raise_({}, None)
        listener = asyncio.create_task(guard.disturbed())
        await asyncio.sleep(0.1)
        await rules.put(SHUT)
        async with kept(rules):
            guard.mute()
            await scene.nft("delete", "table", *acl_table(scene.name).split())
            await asyncio.sleep(0.7)
            assert await scene.table() == ""
            await guard.unmute()
            await until(lambda: is_there(scene))
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)

    async def is_there(scene: Scene) -> bool:
        return bool(await scene.table())

    judge(check)


def test_without_word_of_changes_it_looks_more_often(
    judge: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoWatch:
        def __init__(self, *_: object) -> None:
            raise GuardError("notifications can't be had")

    monkeypatch.setattr("agent.aclfirewall.Watch", NoWatch)
    monkeypatch.setattr("agent.aclfirewall._LOOK_DEAF", 0.3)

    async def check(scene: Scene) -> None:
        rules = scene.access()
        await rules.put(SHUT)
        with capture_logs() as logs:
            async with kept(rules):
                await asyncio.sleep(1)
                await scene.nft("delete", "table", *acl_table(scene.name).split())
                await until(lambda: is_there(scene))
        assert [entry["event"] for entry in logs] == [
            "changes of the access rules are found at looks only",
            "somebody has changed the table of access rules: it is put back",
        ]

    async def is_there(scene: Scene) -> bool:
        return bool(await scene.table())

    judge(check)


class Balky(Library):
    """nftables that refuses what it is told to refuse, and takes so many seconds for each transaction."""

    refuses = ""
    takes = 0.0
    ran = 0

    def run(self, commands: str, *, dry_run: bool = False) -> str:
        self.ran += 1
        time.sleep(self.takes)
        if self.refuses and self.refuses in commands:
            raise NftError("nftables: Cannot allocate memory")
        return super().run(commands, dry_run=dry_run)


@pytest.mark.parametrize("refuses", ["add chain", "jump", "list"])
def test_rules_that_can_not_be_put_in_force_leave_those_before(
    judge: Callable[..., None], refuses: str
) -> None:
    async def check(scene: Scene) -> None:
        balky = Balky()
        rules = scene.access(nft=balky)
        await rules.put(shut_but_for(allow(ports=ports(WEB))))
        kept_ = scene.file.read_bytes()
        balky.refuses = refuses
        with pytest.raises(GuardError, match="Cannot allocate memory"):
            await rules.put(shut_but_for(allow(ports=ports(SSH))))
        assert await scene.opened() == {WEB}
        assert scene.file.read_bytes() == kept_
        balky.refuses = ""
        await rules.put(shut_but_for(allow(ports=ports(SSH))))
        assert await scene.opened() == {SSH}

    judge(check)


def test_rules_that_are_none_are_refused_and_leave_those_before(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access()
        await rules.put(shut_but_for(allow(ports=ports(WEB))))
        with pytest.raises(GuardError, match="a range ends before it begins"):
            await rules.put(shut_but_for(allow(ports=(PortRange(2, 1),))))
        assert await scene.opened() == {WEB}

    judge(check)


def test_a_repair_that_fails_is_told_once_and_tried_until_it_succeeds(
    judge: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.aclfirewall._RETRY", 0.1)

    async def check(scene: Scene) -> None:
        balky = Balky()
        rules = scene.access(nft=balky)
        await rules.put(SHUT)
        async with kept(rules):
            with capture_logs() as logs:
                balky.refuses = "jump"
                await scene.nft("delete", "table", *acl_table(scene.name).split())
                await asyncio.sleep(1)
                balky.refuses = ""
                await until(lambda: works(scene))
                await asyncio.sleep(0.1)
        assert [entry["event"] for entry in logs] == [
            "access rules can't be put in force",
            "access rules are in force again",
            "somebody has changed the table of access rules: it is put back",
        ]

    async def works(scene: Scene) -> bool:
        return "jump" in await scene.table()

    judge(check)


# What is kept for the next start.


def test_after_a_reboot_the_rules_stand_before_core_is_there(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        acl = Acl(
            Verdict.DROP,
            (allow(ports=ports(WEB), comment="Büro"), *filled(range(3))),
            (SnatBinding(5, addresses(ALICE4), socket.inet_aton(PUBLIC4)),),
        )
        await scene.access().put(acl)
        table = await scene.table()
        await scene.nft("flush", "ruleset")
        rules = scene.access()
        await rules.start()
        assert await scene.table() == table
        assert await scene.opened() == set()  # their answers go to the public address
        await rules.put(SHUT)
        await scene.nft("flush", "ruleset")
        await scene.access().start()
        assert await scene.opened() == set()

    judge(check)


def test_the_file_is_its_owners_alone_and_goes_with_the_rules(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        rules = scene.access()
        await rules.put(SHUT)
        assert stat.S_IMODE(scene.file.stat().st_mode) == 0o600
        assert [path.name for path in scene.file.parent.iterdir()] == ["acl.json"]
        await rules.put(None)
        assert not scene.file.exists()

    judge(check)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"null",
        b'{"acl":null}x',
        b'{"acl":{"default":"perhaps"},"version":1}',
        b'{"acl":{"default":"accept"},"version":2}',
        b'{"acl":{"default":"accept","rules":[{"id":1,"version":4,"verdict":"accept","ports":[[9,8]]}]},"version":1}',
        b'{"acl":null,"networks":[["CggAAA==",-1]],"version":1}',
        b'{"acl":null,"networks":[["CggA",16]],"version":1}',
    ],
)
def test_a_file_that_can_not_be_read_closes_the_way_until_core_says_otherwise(
    judge: Callable[..., None], content: bytes
) -> None:
    async def check(scene: Scene) -> None:
        scene.file.write_bytes(content)
        rules = scene.access()
        with capture_logs() as logs:
            await rules.start()
        assert ["can't be read" in entry["event"] for entry in logs] == [True]
        assert await scene.opened() == set()
        assert scene.file.read_bytes() == content
        await rules.put(None)
        assert await scene.opened() == set(PORTS)
        assert not scene.file.exists()

    judge(check)


def test_what_needs_no_table_does_not_touch_nftables(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        balky = Balky()
        rules = scene.access(nft=balky)
        await rules.start()
        async with kept(rules):
            rules.refresh()
            await asyncio.sleep(0.7)
            assert rules._watch is None
        assert balky.ran == 0
        assert not scene.file.exists()

    judge(check)


def test_a_table_that_is_no_longer_wanted_goes_at_the_next_start(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        await scene.access(masquerade=True).start()
        assert "masquerade" in await scene.table()
        await scene.access().start()
        assert await scene.table() == ""
        assert not scene.file.exists()

    judge(check)


def test_with_access_rules_off_cores_are_ignored_and_forgotten(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        await scene.access().put(SHUT)
        rules = scene.access(enabled=False, masquerade=True)
        await rules.start()
        with capture_logs() as logs:
            await rules.put(SHUT)
            await rules.put(SHUT)
        assert [entry["event"] for entry in logs] == ["core's access rules are ignored"]
        assert await scene.opened() == set(PORTS)
        assert await scene.seen_as(ALICE4) == "192.0.2.1"
        await scene.access().start()
        assert await scene.opened() == set(PORTS)

    judge(check)


def test_rules_that_can_not_be_kept_are_in_force_and_told_once_and_kept_later(
    judge: Callable[..., None],
) -> None:
    async def check(scene: Scene) -> None:
        (scene.file.parent / "acl.json.new").mkdir()
        rules = scene.access()
        with capture_logs() as logs:
            for _ in range(2):
                await rules.put(shut_but_for(allow(ports=ports(WEB))))
        assert ["not kept" in entry["event"] for entry in logs] == [True]
        assert await scene.opened() == {WEB}
        assert not scene.file.exists()
        (scene.file.parent / "acl.json.new").rmdir()
        async with kept(rules):
            rules._awake.set()
            await until(lambda: is_kept(scene))

    async def is_kept(scene: Scene) -> bool:
        return scene.file.exists()

    judge(check)


def test_a_restart_goes_on_masquerading_before_the_networks_are_known(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        await scene.access(masquerade=True).start()
        before = await scene.nft("-a", "list", "ruleset")
        for networks in ([parse_prefix("10.77.0.0/24")], None):
            scene.networks = networks
            await scene.access(masquerade=True).start()
            assert await scene.nft("-a", "list", "ruleset") == before
        rules = scene.access(masquerade=True)
        await rules.start()
        async with kept(rules):
            rules.refresh()
            await asyncio.sleep(0.3)
            assert await scene.nft("-a", "list", "ruleset") == before
            scene.networks = [parse_prefix("10.77.0.0/24")]
            rules.refresh()
            await until(lambda: changed(scene))
        scene.networks = None
        await scene.nft("flush", "ruleset")
        await scene.access(masquerade=True).start()
        assert await changed(scene)

    async def changed(scene: Scene) -> bool:
        return "ip saddr 10.77.0.0/24 masquerade" in await scene.table()

    judge(check)


def test_a_start_that_fails_is_made_good(judge: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.aclfirewall._RETRY", 0.1)

    async def check(scene: Scene) -> None:
        await scene.access().put(SHUT)
        await scene.nft("flush", "ruleset")
        balky = Balky()
        balky.refuses = "jump"
        rules = scene.access(nft=balky)
        with pytest.raises(GuardError):
            await rules.start()
        async with kept(rules):
            balky.refuses = ""
            await until(lambda: works(scene))
        assert await scene.opened() == set()

    async def works(scene: Scene) -> bool:
        return "jump" in await scene.table()

    judge(check)


def test_a_put_that_nobody_waits_for_any_more_is_done_to_its_end(judge: Callable[..., None]) -> None:
    async def check(scene: Scene) -> None:
        balky = Balky()
        rules = scene.access(nft=balky)
        await rules.put(SHUT)
        balky.takes = 0.2
        task = asyncio.create_task(rules.put(shut_but_for(allow(ports=ports(WEB)))))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await scene.opened() == set()
        async with kept(rules):
            await asyncio.sleep(1.5)
            assert await scene.opened() == {WEB}
        await scene.nft("flush", "ruleset")
        await scene.access().start()
        assert await scene.opened() == {WEB}

    judge(check)
