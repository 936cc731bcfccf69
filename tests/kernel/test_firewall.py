import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, closing
from typing import Any

import pytest

from agent.encoding import parse_prefix
from agent.firewall import Firewall
from tests.contract.inside import inside
from tests.firewall.behaviour import LONG, Behaviour, quiet, reply
from tests.firewall.behaviours import BEHAVIOURS
from tests.firewall.stand import ALICE, ALICE4, ROUTER, SERVER, Stand, Talker, exempt, session
from tests.support.netns import Namespace, Network, Pinger

pytestmark = pytest.mark.kernel
LATE = 1.0
"""Seconds after a deadline within which the last reply may be read under emulation."""


# What the agent makes of nftables' answers; on another kernel than this one it is not to be expected
# to differ.
SAME_EVERYWHERE = {
    *("a_new_agent_takes_over_what_it_finds", "a_peer_that_needs_a_session_now_or_no_longer_is_moved"),
    *("a_set_that_somebody_made_otherwise_costs_the_table", "elements_that_others_change_are_repaired"),
    *("a_table_of_this_name_that_is_not_ours_is_left_alone", "nested_prefixes_do_not_refuse_one_another"),
    "what_others_do_to_the_table_is_seen_and_mended_around_its_elements",
    *("one_bad_peer_does_not_hold_back_others", "the_program_does_what_the_library_does"),
    "support_asks_the_kernel_and_changes_nothing",
}


def _at_its_size(check: Behaviour) -> Any:
    marks = (pytest.mark.full_size,) if check.__name__ in SAME_EVERYWHERE else ()
    return pytest.param(check, marks=marks, id=check.__name__)


@pytest.mark.reliability(
    "the guard's table changed, flushed, full, on a link that is made anew",
    "sessions end at their time with nobody's help, others lose no packet, what is not ours stays",
)
@pytest.mark.parametrize("check", [_at_its_size(check) for check in BEHAVIOURS])
def test_the_guard(check: Behaviour) -> None:
    with Network() as net, closing(Stand(net)) as stand:
        inside(stand.gateway, check(stand))


class Tunnels:
    """A gateway with real WireGuard and two peers behind it, a server beyond, and a fast path between."""

    def __init__(self, net: Network) -> None:
        self.gateway, self.alice, self.router, self.server = (
            net.namespace(role) for role in ("gateway", "alice", "router", "server")
        )
        self.beyond, _ = net.link(self.gateway, "192.0.2.1/24", self.server, f"{SERVER}/24")
        self.server.ip("route", "add", "default", "via", "192.0.2.1")
        self.gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.key = self._wireguard(self.gateway, "10.8.0.1/16", 51820)
        self.peers = {
            ALICE: self._peer(net, self.alice, ALICE4, 1),
            ROUTER: self._peer(net, self.router, "10.8.9.9", 2),
        }

    def _wireguard(self, space: Namespace, address: str, port: int) -> str:
        key = space.run("wg", "genkey").stdout
        space.ip("link", "add", "wg0", "type", "wireguard")
        space.run("wg", "set", "wg0", "listen-port", str(port), "private-key", "/dev/stdin", stdin=key)
        space.ip("address", "add", address, "dev", "wg0")
        space.ip("link", "set", "wg0", "up")
        return space.run("wg", "pubkey", stdin=key).stdout.strip()

    def _peer(self, net: Network, space: Namespace, address: str, number: int) -> str:
        net.link(self.gateway, f"203.0.113.{4 * number + 1}/30", space, f"203.0.113.{4 * number + 2}/30")
        key = self._wireguard(space, f"{address}/16", 51821)
        self.gateway.run("wg", "set", "wg0", "peer", key, "allowed-ips", f"{address}/32")
        endpoint = ("endpoint", f"203.0.113.{4 * number + 1}:51820", "allowed-ips", "0.0.0.0/0")
        space.run("wg", "set", "wg0", "peer", self.key, *endpoint)
        space.ip("route", "add", "192.0.2.0/24", "dev", "wg0")
        return key

    def shop(self) -> None:
        """An operator's rules: what is established passes, flows are carried past the chains."""
        self.gateway.run(
            "nft",
            "add table inet shop; add flowtable inet shop fast "
            f"{{ hook ingress priority 0; devices = {{ wg0, {self.beyond} }}; }};"
            "add chain inet shop f { type filter hook forward priority 0; policy drop; };"
            "add rule inet shop f counter;"
            "add rule inet shop f meta l4proto tcp ct state established flow add @fast;"
            "add rule inet shop f ct state established accept; add rule inet shop f accept",
        )

    def forwarded(self) -> int:
        """Packets that the forward hook saw: those of a flow on the fast path it does not."""
        shown = self.gateway.run("nft", "list", "chain", "inet", "shop", "f").stdout
        return int(shown.partition("packets ")[2].split()[0])


def judge(check: Callable[[Tunnels, Firewall], Coroutine[Any, Any, None]]) -> None:
    with Network() as net, closing(Firewall("wg0")) as guard:
        tunnels = Tunnels(net)
        inside(tunnels.gateway, check(tunnels, guard))


async def shake_hands(tunnels: Tunnels) -> None:
    """WireGuard may lose one of the packets that wait for its first handshake; later ones it does not."""
    for space in (tunnels.alice, tunnels.router):
        with Pinger(space, SERVER) as first:
            await reply(first)


def test_wireguard_traffic_ends_with_its_element_despite_a_flowtable_and_established_flows() -> None:
    async def check(tunnels: Tunnels, guard: Firewall) -> None:
        tunnels.shop()
        assert await guard.flowtables() == ("inet shop fast",)
        await guard.raise_({ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}, LONG)
        await shake_hands(tunnels)
        with ExitStack() as stack:
            talker = stack.enter_context(Talker(tunnels.alice, ALICE4, tunnels.server, SERVER))
            await asyncio.to_thread(talker.wait, 50)
            alice = stack.enter_context(Pinger(tunnels.alice, SERVER))
            router = stack.enter_context(Pinger(tunnels.router, SERVER))
            await reply(alice)
            await reply(router)
            await guard.admit({ALICE: session(3, ALICE4)})
            deadline = time.monotonic() + 3
            assert deadline - 1 < await quiet(alice) < deadline + LATE
            assert deadline - 1 < talker.last < deadline + LATE
            assert (alice.losses(), router.losses()) == ([], [])
            await reply(router)
        assert router.lost == 0
        # Still on the interface, keys and all: only the guard stands between.
        assert tunnels.peers[ALICE] in tunnels.gateway.run("wg", "show", "wg0", "peers").stdout

    judge(check)


def test_the_flowtable_of_these_tests_carries_flows_past_a_forward_chain() -> None:
    """What makes the test before this one worth something."""
    with Network() as net:
        tunnels = Tunnels(net)
        tunnels.shop()
        with Talker(tunnels.alice, ALICE4, tunnels.server, SERVER) as talker:
            talker.wait(50)
            before = tunnels.forwarded()
            tunnels.gateway.run("nft", "insert", "rule", "inet", "shop", "f", "counter", "drop")
            talker.wait(50)
            assert tunnels.forwarded() < before + 5


def test_a_lapsed_lease_stops_sessions_only_and_a_renewed_one_lets_them_go_on() -> None:
    async def check(tunnels: Tunnels, guard: Firewall) -> None:
        await guard.raise_({ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}, LONG)
        await shake_hands(tunnels)
        with Pinger(tunnels.alice, SERVER) as alice, Pinger(tunnels.router, SERVER) as router:
            await reply(alice)
            await reply(router)
            await guard.renew_lease(2)
            lapses = time.monotonic() + 2
            assert lapses - 1 < await quiet(alice) < lapses + LATE
            await reply(router)
            await guard.renew_lease(LONG)
            await reply(alice)
            await reply(router)
        assert router.lost == 0
        assert len(alice.gaps(0.4)) == 1

    judge(check)


def test_the_ingress_chain_goes_with_the_link_and_raise_makes_it_again() -> None:
    async def check(tunnels: Tunnels, guard: Firewall) -> None:
        await guard.raise_({ALICE: session(LONG, ALICE4, "10.8.5.0/24")}, LONG)
        ip = tunnels.gateway.ip
        await asyncio.to_thread(ip, "link", "delete", "wg0")
        await asyncio.to_thread(ip, "link", "add", "wg0", "type", "wireguard")
        contents = await guard.read()
        assert contents is not None
        assert set(contents.elements) == {parse_prefix(ALICE4), parse_prefix("10.8.5.0/24")}
        assert await guard.raise_({}, LONG) == {}
        assert (contents := await guard.read()) is not None
        assert contents.faults == ()
        assert len(contents.elements) == 2

    judge(check)
