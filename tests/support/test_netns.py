import time
from pathlib import Path

import pytest

from agent.wireguard.userspace import SOCKETS
from tests.support.netns import Namespace, Network, Pinger, interface_name

pytestmark = pytest.mark.netns


def joined(net: Network) -> tuple[Namespace, Namespace]:
    gateway, client = net.namespace("gateway"), net.namespace("client")
    net.link(gateway, "192.0.2.1/24", client, "192.0.2.2/24")
    return gateway, client


def test_leaving_a_network_ends_its_processes_and_deletes_its_namespaces() -> None:
    with Network() as net:
        gateway, _ = joined(net)
        process = gateway.popen("sleep", "100")
        assert Path(f"/proc/{process.pid}").exists()
        assert gateway.path.exists()
    assert process.wait(5) == -9
    assert not gateway.path.exists()


@pytest.mark.userspace
def test_leaving_a_network_leaves_no_socket_of_a_userspace_interface() -> None:
    with Network() as net:
        gateway, name = net.namespace("gateway"), interface_name()
        gateway.run("wireguard-go", name)
        assert (SOCKETS / f"{name}.sock").is_socket()
    assert not (SOCKETS / f"{name}.sock").exists()


def test_a_ping_that_is_always_answered_shows_no_loss_and_no_gap() -> None:
    with Network() as net:
        _, client = joined(net)
        with Pinger(client, "192.0.2.1") as ping:
            ping.wait_reply()
            time.sleep(0.3)
        assert ping.received > 10
        assert (ping.lost, ping.unanswered) == (0, 0)
        assert not ping.gaps(0.2)


def test_a_block_shows_as_silence_then_as_loss_and_one_gap() -> None:
    with Network() as net:
        gateway, client = joined(net)
        with Pinger(client, "192.0.2.1") as ping:
            ping.wait_reply()
            blocked = time.monotonic()
            rules = "table inet t { chain c { type filter hook input priority 0; policy drop; }; }"
            gateway.run("nft", "-f", "-", stdin=rules)
            assert abs(ping.wait_silence(0.5) - blocked) < 0.3
            gateway.run("nft", "delete table inet t")
            ping.wait_reply()
        assert ping.lost > 5
        [gap] = ping.gaps(0.4)
        assert 0.4 < gap.seconds < 2
