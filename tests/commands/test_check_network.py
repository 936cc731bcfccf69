"""What check says of a host's network, in namespaces of its own; core is on a unix socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.curve25519 import clamp
from agent.encoding import format_key, format_time
from tests.commands.parts import a_core, wg_agent, write_config
from tests.commands.test_check import by_name, the_cross
from tests.core.fakes import Core, answer, body, peer, state
from tests.support.netns import Namespace, Network, interface_name

pytestmark = pytest.mark.netns


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Core]:
    with a_core(socket=tmp_path / "core.sock") as core:
        yield core


@pytest.fixture
def gateway() -> Iterator[Namespace]:
    with Network() as net:
        yield net.namespace("gateway")


def lists(core: Core, *prefixes: str, addresses: tuple[str, ...] = ("10.8.0.1/24",)) -> None:
    listed = peer(1, allowed_ips=list(prefixes))
    server_time = format_time(time.time())
    interface: dict[str, Any] = {"addresses": list(addresses)}
    core.on("state", answer(200, body(state(listed, interface=interface, server_time=server_time))))


def forward(gateway: Namespace, *, ipv4: bool = False, ipv6: bool = False) -> None:
    for path, on in (("ipv4/ip_forward", ipv4), ("ipv6/conf/all/forwarding", ipv6)):
        gateway.run("sh", "-c", f"echo {int(on)} > /proc/sys/net/{path}")


def interface(gateway: Namespace, *addresses: str) -> str:
    """A WireGuard interface that is up, as an agent leaves it."""
    name = interface_name()
    gateway.run("wireguard-go", name)
    for address in addresses:
        gateway.ip("address", "add", address, "dev", name)
    gateway.ip("link", "set", name, "up")
    return name


def test_forwarding_that_is_off_is_named_for_the_families_in_use(
    told: Core, gateway: Namespace, tmp_path: Path
) -> None:
    lists(told, "10.8.0.5/32", "fd00:8::5/128", addresses=("10.8.0.1/24", "fd00:8::1/64"))
    path = write_config(tmp_path, told.url)
    inside = gateway.argv()

    forward(gateway)
    done = wg_agent("check", "-c", path, "--json", through=inside)
    assert done.returncode == 1
    found = by_name(done.stdout)["forwarding"]
    assert [f["message"].split(":")[0] for f in found] == ["IPv4 forwarding is off", "IPv6 forwarding is off"]
    assert found[0]["remedy"].startswith("sysctl -w net.ipv4.ip_forward=1, and write it to /etc/sysctl.d/")
    assert found[1]["remedy"].startswith("sysctl -w net.ipv6.conf.all.forwarding=1")

    forward(gateway, ipv4=True)
    fault, _ = the_cross(wg_agent("check", "-c", path, through=inside).stdout, "forwarding")
    assert "IPv6 forwarding is off" in fault

    lists(told, "10.8.0.5/32")
    found = by_name(wg_agent("check", "-c", path, "--json", through=inside).stdout)["forwarding"]
    assert [f["mark"] for f in found] == ["ok"]


def test_before_the_interface_is_there_its_addresses_tell_what_will_have_no_route(
    told: Core, gateway: Namespace, tmp_path: Path
) -> None:
    lists(told, "10.8.0.5/32", "192.168.7.0/24")

    done = wg_agent("check", "-c", write_config(tmp_path, told.url), through=gateway.argv())

    assert done.returncode == 1
    fault, _ = the_cross(done.stdout, "routes")
    assert fault == "routes: allowed IPs without a route to wg0: 192.168.7.0/24"


@pytest.mark.userspace
def test_an_allowed_ip_without_a_route_is_named_with_the_command_that_adds_it(
    told: Core, gateway: Namespace, tmp_path: Path
) -> None:
    name = interface(gateway, "10.8.0.1/24")
    lists(told, "10.8.0.5/32", "192.168.7.0/24", "fd00:9::/64")
    path = write_config(tmp_path, told.url, name=name)

    done = wg_agent("check", "-c", path, through=gateway.argv())

    assert done.returncode == 1
    fault, remedy = the_cross(done.stdout, "routes")
    assert fault == f"routes: allowed IPs without a route to {name}: 192.168.7.0/24, fd00:9::/64"
    commands, _, other = remedy.rpartition("; or ")
    assert other == "give the interface an address whose network covers them"
    for command in commands.split("; "):
        gateway.run(*command.split())
    found = by_name(wg_agent("check", "-c", path, "--json", through=gateway.argv()).stdout)
    assert found["routes"][0]["mark"] == "ok"


@pytest.mark.userspace
def test_where_all_is_well_it_ends_with_0_and_changes_nothing(
    told: Core, gateway: Namespace, tmp_path: Path
) -> None:
    name = interface(gateway, "10.8.0.1/24")
    gateway.run("wg", "set", name, "listen-port", "51820")
    forward(gateway, ipv4=True)
    lists(told, "10.8.0.5/32")
    path = write_config(tmp_path, told.url, name=name)
    (tmp_path / "state").mkdir(mode=0o700)
    key = tmp_path / "state" / "private.key"
    key.write_text(format_key(clamp(bytes(range(32)))))
    key.chmod(0o600)
    before = (
        gateway.run("wg", "show", name, "dump").stdout,
        gateway.ip("address"),
        sorted(tmp_path.rglob("*")),
    )

    done = wg_agent("check", "-c", path, through=gateway.argv())

    after = gateway.run("wg", "show", name, "dump").stdout, gateway.ip("address"), sorted(tmp_path.rglob("*"))
    assert done.returncode == 0, done.stdout
    assert "✗" not in done.stdout
    told_of = " ".join(done.stdout.split())
    assert f"✓ wireguard {name} is there, implemented by a userspace program" in told_of
    assert f"✓ listen port {name} has UDP port 51820" in told_of
    assert before == after


@pytest.mark.userspace
def test_an_interface_that_another_kind_of_backend_implements_is_named(
    told: Core, gateway: Namespace, tmp_path: Path
) -> None:
    name = interface(gateway)
    lists(told)

    done = wg_agent(
        "check", "-c", write_config(tmp_path, told.url, name=name, backend="kernel"), through=gateway.argv()
    )

    assert done.returncode == 1
    fault, remedy = the_cross(done.stdout, "wireguard")
    assert "implemented by a userspace program, not by the kernel" in fault
    assert "wg-agent purge" in remedy


def test_an_interface_that_is_no_wireguard_is_named(told: Core, gateway: Namespace, tmp_path: Path) -> None:
    gateway.ip("link", "add", "wg0", "type", "veth")
    lists(told)

    done = wg_agent("check", "-c", write_config(tmp_path, told.url), through=gateway.argv())

    assert done.returncode == 1
    fault, remedy = the_cross(done.stdout, "wireguard")
    assert "is not a WireGuard interface" in fault
    assert "choose another interface.name" in remedy


def test_a_missing_tun_device_is_named(told: Core, tmp_path: Path, gateway: Namespace) -> None:
    lists(told)
    path = write_config(tmp_path, told.url, backend="userspace", userspace_program="sh")
    hide = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mkdir -p /dev/net && mount -t tmpfs none /dev/net && exec "$@"',
        "sh",
    )

    done = wg_agent("check", "-c", path, through=gateway.argv(*hide))

    assert done.returncode == 1
    fault, remedy = the_cross(done.stdout, "wireguard")
    assert "needs /dev/net/tun, which is not there" in fault
    assert "modprobe tun" in remedy
