"""The client's own WireGuard interface: one peer, made anew for each connection.

Keys go to the device through netlink or the userspace program's socket, never through argv or a
file. The kernel is taken where it has WireGuard, else ``wireguard-go``, as wg-quick chooses.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute, WireGuard
from pyroute2.netlink.exceptions import NetlinkError

from agent.encoding import format_key
from agent.errors import DeviceError

# The cross-platform interface: https://www.wireguard.com/xplatform/
_SOCKETS: Final = Path("/var/run/wireguard")
_KERNEL_KIND = "wireguard"
_IFA_F_NODAD: Final = 0x02
DEFAULT_MTU: Final = 1420


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A client's end of a tunnel. Keys are raw; ``endpoint`` is an IP address and a port.

    ``addresses`` are the interface's, ``allowed_ips`` what is routed into it, both as CIDR.
    """

    private_key: bytes = field(repr=False)
    server_public_key: bytes
    preshared_key: bytes | None = field(repr=False)
    endpoint: tuple[str, int]
    addresses: list[str]
    allowed_ips: list[str]
    persistent_keepalive: int = 25
    mtu: int = DEFAULT_MTU


def up(interface: str, tunnel: Tunnel) -> str:
    """Make the interface and connect; return ``kernel`` or ``userspace``. Raises DeviceError."""
    down(interface)
    with _netlink() as route:
        backend = _create(route, interface)
        try:
            index = route.link_lookup(ifname=interface)[0]
            route.link("set", index=index, mtu=tunnel.mtu, state="up")
            for address in tunnel.addresses:
                host = ip_interface(address).ip
                flags = {"flags": _IFA_F_NODAD} if host.version == 6 else {}
                route.addr("add", index=index, address=str(host), prefixlen=host.max_prefixlen, **flags)
            for prefix in tunnel.allowed_ips:
                network = ip_network(prefix)
                family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
                route.route("replace", dst=str(network), oif=index, family=family)
            # Last, so that the first handshake goes out at once through a link that is up.
            if backend == "kernel":
                _set_kernel(interface, tunnel)
            else:
                _wait_for_port(interface)
                _uapi(interface, _set_request(tunnel))
        except BaseException:
            _delete(route, interface)
            raise
    return backend


def down(interface: str) -> bool:
    """Remove the interface; False if there was none. Raises DeviceError."""
    with _netlink() as route:
        if not _delete(route, interface):
            return False
    # A userspace program takes its socket away when its link is gone.
    until = time.monotonic() + 2
    while _socket(interface).exists() and time.monotonic() < until:
        time.sleep(0.01)
    return True


def latest_handshake(interface: str) -> int:
    """Return the time of the last handshake in Unix seconds, 0 if there was none yet."""
    if _socket(interface).exists():
        for line in _uapi(interface, "get=1\n\n").splitlines():
            name, _, value = line.partition("=")
            if name == "last_handshake_time_sec":
                return int(value)
        return 0
    with _netlink(), contextlib.closing(WireGuard()) as wireguard:
        for part in wireguard.info(interface):
            for peer in part.get_attr("WGDEVICE_A_PEERS") or ():
                stamp = peer.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME")
                if stamp is not None and stamp["tv_sec"]:
                    return int(stamp["tv_sec"])
    return 0


def wait_for_handshake(interface: str, timeout: float) -> bool:
    """Block until there was a handshake; False after ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while not latest_handshake(interface):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _socket(interface: str) -> Path:
    return _SOCKETS / f"{interface}.sock"


@contextmanager
def _netlink() -> Iterator[Any]:
    """Open rtnetlink; its errors become DeviceError."""
    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise DeviceError(
            f"the interface can't be set up: {error.args[-1]}",
            "it takes root or CAP_NET_ADMIN",
            errno=error.code,
        ) from None
    except PermissionError as error:
        raise DeviceError(
            "the interface can't be set up", "it takes root or CAP_NET_ADMIN", errno=errno.EPERM
        ) from error


def _create(route: Any, interface: str) -> str:
    try:
        route.link("add", ifname=interface, kind=_KERNEL_KIND)
    except NetlinkError as error:
        if error.code != errno.EOPNOTSUPP:
            raise
    else:
        return "kernel"
    try:
        made = subprocess.run(
            ["wireguard-go", interface],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=False,
        )
    except FileNotFoundError:
        raise DeviceError(
            "this kernel has no WireGuard and wireguard-go is not installed",
            "install wireguard-go",
        ) from None
    except subprocess.TimeoutExpired:
        raise DeviceError("wireguard-go did not start within 10 s") from None
    if made.returncode != 0:
        raise DeviceError("wireguard-go did not start", "is there a /dev/net/tun?")
    return "userspace"


def _delete(route: Any, interface: str) -> bool:
    found = route.link_lookup(ifname=interface)
    if not found:
        return False
    with contextlib.suppress(IndexError):
        link = route.get_links(found[0])[0]
        info = link.get_attr("IFLA_LINKINFO")
        kind = None if info is None else info.get_attr("IFLA_INFO_KIND")
        ours = kind == "wireguard" or (kind == "tun" and _socket(interface).exists())
        if not ours:
            raise DeviceError(f"{interface} is no WireGuard interface", "choose another --interface")
    route.link("del", index=found[0])
    return True


def _set_kernel(interface: str, tunnel: Tunnel) -> None:
    peer: dict[str, Any] = {
        "public_key": format_key(tunnel.server_public_key),
        "endpoint_addr": tunnel.endpoint[0],
        "endpoint_port": tunnel.endpoint[1],
        "allowed_ips": tunnel.allowed_ips,
        "replace_allowed_ips": True,
        "persistent_keepalive": tunnel.persistent_keepalive,
    }
    if tunnel.preshared_key is not None:
        peer["preshared_key"] = format_key(tunnel.preshared_key)
    with contextlib.closing(WireGuard()) as wireguard:
        wireguard.set(interface, private_key=format_key(tunnel.private_key), peer=peer)


def _wait_for_port(interface: str) -> None:
    """Return once the userspace program has noticed that its link is up and opened its port.

    A handshake that it starts between the two is lost, and the next comes 5 s later.
    """
    until = time.monotonic() + 2
    while "listen_port=" not in _uapi(interface, "get=1\n\n") and time.monotonic() < until:
        time.sleep(0.005)


def _set_request(tunnel: Tunnel) -> str:
    host, port = tunnel.endpoint
    lines = [
        "set=1",
        f"private_key={tunnel.private_key.hex()}",
        "replace_peers=true",
        f"public_key={tunnel.server_public_key.hex()}",
    ]
    if tunnel.preshared_key is not None:
        lines.append(f"preshared_key={tunnel.preshared_key.hex()}")
    lines += [
        f"endpoint=[{host}]:{port}" if ":" in host else f"endpoint={host}:{port}",
        "replace_allowed_ips=true",
        *(f"allowed_ip={prefix}" for prefix in tunnel.allowed_ips),
        f"persistent_keepalive_interval={tunnel.persistent_keepalive}",
    ]
    return "\n".join(lines) + "\n\n"


def _uapi(interface: str, request: str) -> str:
    """Ask the userspace program; return its answer without the final ``errno=0``."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.connect(str(_socket(interface)))
            sock.sendall(request.encode("ascii"))
            answer = b""
            while not answer.endswith(b"\n\n"):
                part = sock.recv(65536)
                if not part:
                    break
                answer += part
    except OSError as error:
        raise DeviceError(
            f"the userspace WireGuard of {interface} does not answer: {error.strerror or error}"
        ) from None
    text = answer.decode("ascii", "replace").rstrip("\n")
    body, _, code = text.rpartition("errno=")
    if code != "0":
        raise DeviceError(f"the userspace WireGuard of {interface} refused its configuration")
    return body
