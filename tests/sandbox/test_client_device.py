"""The client's interface against a gateway set up by WireGuard's own tools."""

import multiprocessing
import os
import subprocess

import pytest
from pyroute2 import netns

from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from agent.errors import DeviceError
from agent.sandbox import client_device
from agent.sandbox.client_device import Tunnel
from tests.support.netns import Namespace, Network, interface_name


def gateway_of(net: Network, tunnel: Tunnel, private_key: bytes, *, kernel: bool) -> Namespace:
    """The client's namespace, joined to a gateway that has the tunnel's client as its peer."""
    gateway, client = net.namespace("gateway"), net.namespace("client")
    net.link(gateway, "192.0.2.1/24", client, "192.0.2.2/24")
    name = interface_name()
    if kernel:
        gateway.ip("link", "add", name, "type", "wireguard")
    else:
        gateway.run("wireguard-go", name)
    port = ("listen-port", "51820", "private-key", "/dev/stdin")
    gateway.run("wg", "set", name, *port, stdin=format_key(private_key))
    peer = ("peer", format_key(public_key(tunnel.private_key)), "allowed-ips", ",".join(tunnel.addresses))
    psk = format_key(tunnel.preshared_key or bytes(32))
    gateway.run("wg", "set", name, *peer, "preshared-key", "/dev/stdin", stdin=psk)
    gateway.ip("address", "add", "10.8.0.1/24", "dev", name)
    gateway.ip("address", "add", "fd00:8::1/64", "dev", name, "nodad")
    gateway.ip("link", "set", name, "up")
    return client


def use(name: str, interface: str, tunnel: Tunnel, backend: str) -> None:
    """Runs in a process of its own, which moves into the client's namespace."""
    netns.setns(name)
    if backend == "userspace":
        # As where the kernel has no WireGuard, wherever this runs.
        client_device._KERNEL_KIND = "no-such-kind"
    assert client_device.up(interface, tunnel) == backend
    assert client_device.wait_for_handshake(interface, 10)
    for address in ("10.8.0.1", "fd00:8::1"):
        subprocess.run(["ping", "-c", "1", "-W", "5", address], check=True, stdout=subprocess.DEVNULL)
    # A second connection makes the interface anew.
    assert client_device.up(interface, tunnel) == backend
    assert client_device.wait_for_handshake(interface, 10)
    assert client_device.down(interface)
    assert not client_device.down(interface)
    subprocess.run(["ip", "tuntap", "add", interface, "mode", "tun"], check=True)
    with pytest.raises(DeviceError, match="no WireGuard interface"):
        client_device.down(interface)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("userspace", marks=pytest.mark.userspace),
        pytest.param("kernel", marks=pytest.mark.kernel),
    ],
)
def test_a_tunnel_comes_up_carries_both_families_and_goes(backend: str) -> None:
    private_key = clamp(os.urandom(32))
    tunnel = Tunnel(
        private_key=clamp(os.urandom(32)),
        server_public_key=public_key(private_key),
        preshared_key=os.urandom(32),
        endpoint=("192.0.2.1", 51820),
        addresses=["10.8.0.2/32", "fd00:8::2/128"],
        allowed_ips=["10.8.0.0/24", "fd00:8::/64"],
    )
    with Network() as net:
        client = gateway_of(net, tunnel, private_key, kernel=backend == "kernel")
        process = multiprocessing.get_context("fork").Process(
            target=use, args=(client.name, interface_name(), tunnel, backend)
        )
        process.start()
        process.join(60)
        assert process.exitcode == 0


def test_keys_are_not_shown() -> None:
    secret = os.urandom(32)
    tunnel = Tunnel(secret, os.urandom(32), secret, ("192.0.2.1", 1), [], [])
    assert repr(secret) not in repr(tunnel)
    assert "preshared_key" not in repr(tunnel)
