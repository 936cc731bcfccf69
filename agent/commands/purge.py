"""``wg-agent purge``: take down what the agent has made on this host, with the operator's commands around."""

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
from agent.folders import owner_file, refuse_others_state
from agent.hooks import Failure, Hooks, When
from agent.lock import InterfaceLock
from agent.wireguard.interface import find_backend, remove_interface

_JOURNAL: Final = "journal.sqlite*"
"""The journal with SQLite's files beside it, and those that were set aside as unreadable."""


def execute(arguments: argparse.Namespace) -> int:
    """Remove the interface, then what was remembered about its sessions; never the other way round.

    1 if one of the operator's commands failed, though all the rest was done.
    """
    config = choose(arguments).load()
    name = config.interface.name
    refuse_others_state(config.paths.state, name)
    with InterfaceLock(config.paths.runtime, name):
        had_interface, failures = asyncio.run(_remove_interface(name, Hooks(config.hooks, name)))
        had_guard, had_rules = asyncio.run(_lower(config))
        removed = _remove([*_journal(config), *_rules(config), config.control_socket])
        kept: list[Path] = []
        for path in _keys(config):
            if arguments.key and not _is_credential(path):
                removed += _remove([path])
            else:
                kept.append(path)
        if not kept:
            removed += _remove([owner_file(config.paths.state)])
    if arguments.json:
        print_json(
            {
                "interface": name,
                "interface_removed": had_interface,
                "table_removed": had_guard or had_rules,
                "removed": [str(path) for path in removed],
                "kept": [str(path) for path in kept],
                "failed": [str(failure) for failure in failures],
            }
        )
        return 1 if failures else 0
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
        what = "private key" if path == config.private_key_file else "adoption by core"
        say(to, f"{path}: kept, the gateway's {what} ({why})")
    for failure in failures:
        say(to, str(failure), "red")
    return 1 if failures else 0


async def _remove_interface(name: str, hooks: Hooks) -> tuple[bool, list[Failure]]:
    """Remove the interface; whether it was there, and which of the operator's commands failed."""
    failures = await hooks.run(When.PRE_DOWN) if await find_backend(name) is not None else []
    had_interface = await remove_interface(name)
    if had_interface:
        failures += await hooks.run(When.POST_DOWN)
    return had_interface, failures


async def _lower(config: Config) -> tuple[bool, bool]:
    """Remove the guard's table, then that of access rules, peers being gone; whether each was there."""
    name = config.interface.name
    firewall, rules = Firewall(name), AclFirewall(name, tuple, config.acl_file)
    try:
        return await firewall.lower(), await rules.remove()
    except GuardError:
        # A host without nftables has no table of ours either.
        if await firewall.support():
            return False, False
        raise
    finally:
        firewall.close()
        rules.close()


def _keys(config: Config) -> list[Path]:
    """Return the files that make this host the gateway that core knows, as far as the agent made them."""
    keys = [config.private_key_file] if os.path.lexists(config.private_key_file) else []
    if config.core.calls and config.cert_dir.is_relative_to(config.paths.state):
        keys += sorted(config.cert_dir.glob("*.pem"))
    return keys


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
