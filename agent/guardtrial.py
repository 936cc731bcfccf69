"""What this host lacks for the guard: the kernel is asked, and nothing is changed."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from typing import Final, NamedTuple

from agent import ruleset
from agent.errors import GuardError
from agent.nft import INSTALL, NftError
from agent.owntable import OwnTable

_NAME: Final = "wg_agent_trial"


class Lack(NamedTuple):
    """Something that the guard needs and this host has not: what it is, and what to do."""

    message: str
    hint: str


class Trial:
    """The guard's table for an interface, tried on the kernel, which judges and discards it."""

    def __init__(self, interface: str, table: OwnTable) -> None:
        self._interface = interface
        self._table = table

    def lacks(self) -> tuple[Lack, ...]:
        """Return what is missing, nothing if the guard can stand; blocks."""
        try:
            name = ruleset.table_name(self._interface)
            self._table.run("list tables")
        except ValueError as error:
            return (Lack(str(error), "give the interface another name, such as wg0"),)
        except NftError as error:
            return (_no_access(error),)
        except GuardError as error:
            return (Lack(error.message, error.hint),)
        names = {interface for _, interface in socket.if_nameindex()}
        device = self._interface if self._interface in names else "lo"
        trial = [
            line.replace(f"inet {name}", f"inet {_NAME}").replace(
                f'device "{self._interface}"', f'device "{device}"'
            )
            for line in ruleset.create(self._interface, ruleset.ALWAYS, leased=True)
        ]
        try:
            self._table.run(trial, dry_run=True)
        except NftError as error:
            return tuple(self._lacking(device)) or (
                Lack(
                    f"the kernel refuses the guard's table ({error.message})",
                    f"run Linux 5.10 or newer; {INSTALL}",
                ),
            )
        return ()

    def _lacking(self, device: str) -> Iterable[Lack]:
        table = f"inet {_NAME}"
        ingress = f'type filter hook ingress device "{device}" priority 0; policy drop;'
        parts: tuple[tuple[str, list[str], str], ...] = (
            (
                "tables of nftables",
                [],
                "the kernel needs CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET (modprobe nf_tables)",
            ),
            (
                "sets whose elements time out",
                [f"add set {table} s {{ type ipv4_addr; timeout 1s; }}"],
                "run Linux 5.10 or newer with nftables' hash sets (modprobe nf_tables)",
            ),
            (
                "inet chains at the ingress hook",
                [f"add chain {table} c {{ {ingress} }}"],
                "run Linux 5.10 or newer with CONFIG_NETFILTER_INGRESS",
            ),
            (
                "inet chains in postrouting",
                [f"add chain {table} c {{ type filter hook postrouting priority 0; }}"],
                "the kernel needs CONFIG_NF_TABLES_INET",
            ),
        )
        for what, commands, hint in parts:
            with contextlib.suppress(NftError):
                self._table.run([f"add table {table}", *commands], dry_run=True)
                continue
            yield Lack(f"the kernel has no {what}", hint)


def _no_access(error: NftError) -> Lack:
    if "permitted" in error.message or "denied" in error.message:
        return Lack(
            "no permission to use nftables: CAP_NET_ADMIN is missing",
            "run as root, or by the unit wg-agent@.service, which grants it; "
            "a container needs --cap-add NET_ADMIN",
        )
    return Lack(
        f"the kernel does not answer for nftables ({error.message})",
        "the kernel needs CONFIG_NF_TABLES (modprobe nf_tables)",
    )
