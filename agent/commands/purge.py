"""``wg-agent purge``: take down what the agent has made on this host."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Final

from agent.aclfirewall import AclFirewall
from agent.commands.chosen import choose
from agent.commands.output import console, print_json, say
from agent.config import Config
from agent.errors import AgentError, GuardError
from agent.firewall import Firewall
from agent.lock import InterfaceLock
from agent.wireguard.interface import remove_interface

_JOURNAL: Final = "journal.sqlite*"
"""The journal with SQLite's files beside it, and those that were set aside as unreadable."""


def execute(arguments: argparse.Namespace) -> int:
    """Remove the interface, then what was remembered about it; never the other way round."""
    config = choose(arguments).load()
    name = config.interface.name
    with InterfaceLock(config.paths.runtime, name):
        had_interface, had_guard, had_rules = asyncio.run(_take_down(config))
        removed = _remove([*_journal(config), *_rules(config), config.control_socket])
        kept: list[Path] = []
        if os.path.lexists(config.private_key_file):
            if arguments.key and not _is_credential(config.private_key_file):
                removed += _remove([config.private_key_file])
            else:
                kept.append(config.private_key_file)
    if arguments.json:
        print_json(
            {
                "interface": name,
                "interface_removed": had_interface,
                "table_removed": had_guard or had_rules,
                "removed": [str(path) for path in removed],
                "kept": [str(path) for path in kept],
            }
        )
        return 0
    to = console()
    say(to, f"{name}: removed" if had_interface else f"{name}: there was no such interface")
    if had_guard:
        say(to, f"the guard of {name}: removed from nftables")
    if had_rules:
        say(to, f"the access rules of {name}: removed from nftables")
    for path in removed:
        say(to, f"{path}: removed")
    for path in kept:
        why = "a credential of systemd's" if _is_credential(path) else "remove it with --key"
        say(to, f"{path}: kept, the gateway's private key ({why})")
    return 0


async def _take_down(config: Config) -> tuple[bool, bool, bool]:
    """Remove the interface, then the guard's table, then that of access rules. Whether each was there."""
    name = config.interface.name
    had_interface = await remove_interface(name)
    firewall, rules = Firewall(name), AclFirewall(name, tuple, config.acl_file)
    try:
        return had_interface, await firewall.lower(), await rules.remove()
    except GuardError:
        # A host without nftables has no table of ours either.
        if await firewall.support():
            return had_interface, False, False
        raise
    finally:
        firewall.close()
        rules.close()


def _rules(config: Config) -> list[Path]:
    return sorted(config.acl_file.parent.glob(f"{config.acl_file.name}*"))


def _journal(config: Config) -> list[Path]:
    return sorted(config.paths.state.glob(_JOURNAL))


def _is_credential(path: Path) -> bool:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return folder is not None and path.parent == Path(folder)


def _remove(paths: list[Path]) -> list[Path]:
    removed = []
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise AgentError(
                f"{path} can't be removed: {error.strerror}", "run purge as root or as the agent's own user"
            ) from None
        removed.append(path)
    return removed
