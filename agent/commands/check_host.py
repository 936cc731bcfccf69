"""Checks of this host: WireGuard, privileges, forwarding, routes, ports."""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from agent.commands.findings import Finding, Mark, fault, ok, skipped
from agent.config import Config, Listen
from agent.errors import AgentError, DeviceError, GuardError
from agent.firewall import Firewall
from agent.hooks import Hooks, When
from agent.model import InterfaceAddress, Prefix, Snapshot
from agent.wireguard import userspace
from agent.wireguard.interface import (
    Backend,
    find_backend,
    forwarding,
    open_device,
    read_link,
    unrouted,
)
from agent.wireguard.kernel import kernel_has_wireguard

_CAP_NET_ADMIN: Final = 12  # capability.h
_STATUS: Final = Path("/proc/self/status")
_TUN: Final = Path("/dev/net/tun")
_SHOWN: Final = 5
_BY: Final = {Backend.KERNEL: "the kernel", Backend.USERSPACE: "a userspace program"}
_INSTALL: Final = (
    "modprobe wireguard, or run a kernel that has it (Linux 5.6 or newer); "
    "in a container or an older system install wireguard-go (apt install wireguard-go)"
)
_GET_TUN: Final = (
    "modprobe tun; a container needs the device: --device /dev/net/tun, or DeviceAllow= in its unit"
)


def agent_runs(config: Config) -> bool:
    """Whether an agent listens on the control socket; one that may not be asked counts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(config.control_socket))
        except PermissionError:
            return True
        except OSError:
            return False
    return True


def has_net_admin() -> bool:
    """Whether this process may set up networking."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_NET_ADMIN & 1)
    return False


def permission() -> Finding:
    """Judge CAP_NET_ADMIN."""
    if has_net_admin():
        return ok("permission", "CAP_NET_ADMIN is there")
    return Finding(
        "permission",
        Mark.FAULT,
        "no permission to set up an interface: CAP_NET_ADMIN is missing",
        "run as root, or by the unit wg-agent@.service, which grants it; "
        "a container needs --cap-add NET_ADMIN",
    )


async def wireguard(config: Config) -> tuple[Finding, Backend | None]:
    """Judge who is to implement the interface; return who does now, if it is there."""
    interface = config.interface
    name, wanted = interface.name, interface.backend
    try:
        found = await find_backend(name)
    except DeviceError as error:
        if not has_net_admin() and userspace.socket_path(name).exists():
            return skipped("wireguard", f"{name} is there, and its program may be asked by root only"), None
        return fault("wireguard", error, "run check as root"), None
    if found is not None:
        if wanted not in {"auto", found}:
            return Finding(
                "wireguard",
                Mark.FAULT,
                f"{name} exists and is implemented by {_BY[found]}, not by {_BY[Backend(wanted)]}",
                'wg-agent purge, or set interface.backend = "auto"',
            ), found
        return ok("wireguard", f"{name} is there, implemented by {_BY[found]}"), found
    return await _could_be_made(wanted, interface.userspace_program), None


async def _could_be_made(wanted: str, program: str) -> Finding:
    if wanted != "userspace" and await kernel_has_wireguard():
        return ok("wireguard", "the kernel has it")
    if wanted == "kernel":
        return Finding(
            "wireguard",
            Mark.FAULT,
            "the kernel has no WireGuard",
            'modprobe wireguard, or set interface.backend = "auto" and install wireguard-go',
        )
    if shutil.which(program) is None:
        no_kernel = "" if wanted == "userspace" else "the kernel has none, and "
        remedy = _INSTALL if wanted == "auto" else f"install {program}, or set interface.backend"
        return Finding(
            "wireguard", Mark.FAULT, f"no WireGuard: {no_kernel}there is no program {program}", remedy
        )
    if not _TUN.exists():
        return Finding(
            "wireguard", Mark.FAULT, f"no WireGuard: {program} needs {_TUN}, which is not there", _GET_TUN
        )
    return ok("wireguard", f"{program} will implement it")


def hooks(config: Config) -> list[Finding]:
    """Judge whether the operator's commands can be started, as far as that can be seen from here."""
    missing = [
        c for c in Hooks(config.hooks, config.interface.name).commands if shutil.which(c.argv[0]) is None
    ]
    return [
        Finding(
            "hooks",
            Mark.FAULT if command.when is When.PRE_UP else Mark.WARNING,
            f"{command} can't be started: there is no such program"
            + (", and the interface stays down" if command.when is When.PRE_UP else ""),
            f"correct hooks.{command.when}: the first word is a program, and no shell reads the others",
        )
        for command in missing
    ]


async def guard(config: Config) -> list[Finding]:
    """Judge whether the kernel's own guard of deadlines can be had; nothing is changed."""
    firewall = Firewall(config.interface.name)
    mark = Mark.FAULT if config.firewall.required else Mark.WARNING
    try:
        lacking = await firewall.support()
        if lacking:
            return [Finding("guard", mark, lack.message, lack.hint) for lack in lacking]
        bypasses = await firewall.flowtables()
    except GuardError as error:
        return [Finding("guard", mark, error.message, error.hint)]
    finally:
        firewall.close()
    return [ok("guard", "nftables can guard the deadlines of sessions")] + [
        Finding(
            "guard",
            Mark.WARNING,
            f"the flowtable {name} takes in {config.interface.name}: established flows to a peer whose "
            "session is over pass until the peer is removed",
            f"take {config.interface.name} out of the flowtable's devices",
        )
        for name in bypasses
    ]


def is_forwarding(addresses: Iterable[InterfaceAddress], prefixes: Iterable[Prefix]) -> list[Finding]:
    """Judge forwarding for the families that are in use; IPv4 if none is known."""
    sizes = {len(address.packed) for address in addresses} | {len(prefix.packed) for prefix in prefixes}
    sizes = sizes or {4}
    state = forwarding()
    findings = []
    for size, family, on, key in (
        (4, "IPv4", state.ipv4, "net.ipv4.ip_forward"),
        (16, "IPv6", state.ipv6, "net.ipv6.conf.all.forwarding"),
    ):
        if size in sizes and not on:
            findings.append(
                Finding(
                    "forwarding",
                    Mark.FAULT,
                    f"{family} forwarding is off: peers reach this host only",
                    f"sysctl -w {key}=1, and write it to /etc/sysctl.d/ for the next boot",
                )
            )
    used = " and ".join(name for size, name in ((4, "IPv4"), (16, "IPv6")) if size in sizes)
    return findings or [ok("forwarding", f"on for {used}")]


async def routes(name: str, addresses: Iterable[InterfaceAddress], prefixes: list[Prefix]) -> Finding:
    """Judge whether each allowed IP is routed to the interface, or will be by its addresses."""
    link = await read_link(name)
    if link is not None and link.up:
        missing = await unrouted(name, prefixes)
    else:
        networks = list(addresses)
        missing = [prefix for prefix in prefixes if not any(_contains(net, prefix) for net in networks)]
    if not missing:
        return ok("routes", f"every allowed IP goes to {name}")
    examples = ", ".join(map(str, missing[:_SHOWN]))
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    commands = "; ".join(f"ip route add {prefix} dev {name}" for prefix in missing[:_SHOWN])
    return Finding(
        "routes",
        Mark.FAULT,
        f"allowed IPs without a route to {name}: {examples}{more}",
        f"{commands}; or give the interface an address whose network covers them",
    )


def _contains(network: InterfaceAddress, prefix: Prefix) -> bool:
    shift = len(network.packed) * 8 - network.length
    return (
        len(network.packed) == len(prefix.packed)
        and network.length <= prefix.length
        and int.from_bytes(network.packed, "big") >> shift == int.from_bytes(prefix.packed, "big") >> shift
    )


async def listen_port(config: Config, snapshot: Snapshot | None, backend: Backend | None) -> Finding:
    """Judge whether WireGuard can have its UDP port, or has it."""
    name, port = config.interface.name, config.interface.listen_port
    if snapshot is not None and snapshot.interface.listen_port is not None:
        port = snapshot.interface.listen_port
    if port == 0:
        return ok("listen port", "any free one will do")
    if backend is not None:
        device = open_device(name, backend)
        try:
            observed = await device.read()
        except DeviceError as error:
            return skipped("listen port", error.message)
        finally:
            await device.close()
        if observed.listen_port == port:
            return ok("listen port", f"{name} has UDP port {port}")
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((host, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return Finding(
                    "listen port",
                    Mark.FAULT,
                    f"UDP port {port} can't be had: {error.strerror}",
                    f"ss -lunp 'sport = :{port}' shows whose it is; end that, or choose another "
                    "interface.listen_port (core's value wins if it sends one)",
                )
    return ok("listen port", f"UDP port {port} is free")


def listeners(config: Config) -> list[Finding]:
    """Judge whether the agent's own HTTP can have its addresses; not while an agent runs."""
    from agent.server import bind  # noqa: PLC0415 (uvicorn, which nothing else needs)

    wanted: list[tuple[Listen, str]] = [(config.http.listen, "http.listen")]
    if config.push.enabled:
        wanted.append((config.push.listen, "push.listen"))
    findings = []
    for listen, key in wanted:
        try:
            bind(listen, key).close()
        except AgentError as error:
            remedy = f"ss -ltnp 'sport = :{listen.port}' shows whose it is; end that, or choose another {key}"
            findings.append(Finding("listeners", Mark.FAULT, error.message, remedy))
    return findings or [ok("listeners", ", ".join(f"{listen} ({key})" for listen, key in wanted) + " free")]
