"""``wg-agent check``: each question with a tick or a cross, each cross with its remedy.

Nothing is changed, and a running agent is not disturbed: what it holds is not tried out.
"""

from __future__ import annotations

import argparse
import asyncio

from agent.commands import check_core, check_defguard, check_files, check_host
from agent.commands.chosen import Choice, choose
from agent.commands.findings import Finding, Mark, fault, ok, skipped
from agent.commands.output import console, print_json, print_lines
from agent.commands.verdict import report
from agent.config import Config
from agent.errors import ConfigError, ConfigUnreadable, DeviceError
from agent.hardening import forbid_core_dumps
from agent.keys import Secrets
from agent.model import Snapshot


def execute(arguments: argparse.Namespace) -> int:
    """Ask all questions and print the answers; 1 if there is a fault."""
    forbid_core_dumps()  # it reads the secrets, and core's state with its keys
    choice = choose(arguments)
    findings, config = _configuration(choice)
    if config is not None:
        findings += asyncio.run(_look(config))
    good = all(finding.mark is not Mark.FAULT for finding in findings)
    if arguments.json:
        name = choice.interface if config is None else config.interface.name
        checks = [finding.document() for finding in findings]
        print_json({"interface": name, "ok": good, "checks": checks})
    else:
        to = console()
        print_lines(to, report(findings, to))
    return 0 if good else 1


def _configuration(choice: Choice) -> tuple[list[Finding], Config | None]:
    """Read the configuration; raises ConfigUnreadable if there is none to judge."""
    try:
        config = choice.load()
        if check_files.use_unit_credentials(config.interface.name):
            config = choice.load()
    except ConfigUnreadable:
        raise
    except ConfigError as error:
        return [
            fault("configuration", error, f"correct {choice.path}: config.example.toml has every key"),
            skipped("everything else", "the configuration has to be right first"),
        ], None
    return [ok("configuration", f"{choice.path} is valid, for {config.interface.name}")], config


async def _look(config: Config) -> list[Finding]:
    findings, secrets = check_files.credentials(config)
    findings += check_files.push_certificate(config)
    findings.append(check_files.private_key(config))
    findings += check_files.folders(config)
    from_core, snapshot = await _ask_core(config, secrets)
    findings += from_core
    findings += await _look_at_host(config, snapshot)
    return findings


async def _ask_core(config: Config, secrets: Secrets | None) -> tuple[list[Finding], Snapshot | None]:
    if secrets is None:
        return [skipped("core", "it can't be asked without the credentials above")], None
    if config.core.protocol == "defguard":
        return await check_defguard.ask(config, secrets), None
    return await check_core.ask(config, secrets)


async def _look_at_host(config: Config, snapshot: Snapshot | None) -> list[Finding]:
    name = config.interface.name
    addresses = config.interface.addresses
    if snapshot is not None and snapshot.interface.addresses is not None:
        addresses = snapshot.interface.addresses
    listed = () if snapshot is None else snapshot.peers
    prefixes = [prefix for peer in listed if peer.fault is None for prefix in peer.allowed_ips]
    support, backend = await check_host.wireguard(config)
    permission = check_host.permission()
    findings = [permission, support]
    if permission.mark is Mark.FAULT:
        findings.append(skipped("guard", "it takes the permission that is missing"))
    else:
        findings += await check_host.guard(config)
    findings += check_host.hooks(config)
    findings += check_host.is_forwarding(addresses, prefixes)
    if snapshot is None:
        findings.append(skipped("routes", "core's list is not known"))
    else:
        try:
            findings.append(await check_host.routes(name, addresses, prefixes))
        except DeviceError as error:
            findings.append(fault("routes", error, "run check as root"))
    if check_host.agent_runs(config):
        findings.append(ok("agent", f"an agent runs on {name}: its ports are not tried out"))
    else:
        findings.append(await check_host.listen_port(config, snapshot, backend))
        findings += check_host.listeners(config)
    return findings
