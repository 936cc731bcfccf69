"""Checks of what lies on disk: secrets, key files, the agent's folders."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent.commands.findings import Finding, Mark, fault, ok
from agent.config import Config, Push
from agent.curve25519 import public_key
from agent.encoding import format_key
from agent.errors import AgentError, ConfigError
from agent.folders import private_folder, refuse_others_state
from agent.keys import Secrets, load_private_key, load_secrets, read_secret_file

_SECRET_FILES: Final = ("core.token_file", "core.client_key_file", "push.secret_file", "push.tls_key_file")

CREDENTIALS: Final = Path("/run/credentials")
"""Where systemd keeps them while a unit runs, for root to read (systemd.exec(5))."""


def use_unit_credentials(interface: str) -> bool:
    """See the credentials as the running unit does; return whether that changed anything."""
    folder = CREDENTIALS / f"wg-agent@{interface}.service"
    if os.environ.get("CREDENTIALS_DIRECTORY") or not folder.is_dir():
        return False
    os.environ["CREDENTIALS_DIRECTORY"] = str(folder)
    return True


def credentials(config: Config) -> tuple[list[Finding], Secrets | None]:
    """Judge every secret's file; return also the secrets, if core's can be used."""
    findings = []
    for dotted in _SECRET_FILES:
        section, _, key = dotted.partition(".")
        path: Path | None = getattr(getattr(config, section), key)
        if path is not None:
            try:
                read_secret_file(path, dotted)
            except ConfigError as error:
                findings.append(fault("credentials", error))
    if not findings:
        try:
            return [ok("credentials", "readable, and by their owner only")], load_secrets(config)
        except ConfigError as error:
            findings.append(fault("credentials", error))
    if config.core.token_file is None and not config.core.calls:
        findings[-1] = replace(
            findings[-1], remedy=f"{findings[-1].remedy}; if it has that, run check while the unit runs"
        )
    with contextlib.suppress(ConfigError):
        return findings, load_secrets(config.model_copy(update={"push": Push()}))
    return findings, None


def push_certificate(config: Config) -> list[Finding]:
    """Judge the push listener's certificate, if it has one."""
    push = config.push
    if not push.enabled or push.tls_cert_file is None or push.tls_key_file is None:
        return []
    from agent.server import tls_context  # noqa: PLC0415 (uvicorn, which nothing else needs)

    try:
        tls_context(push.tls_cert_file, push.tls_key_file, push.client_ca_file)
    except AgentError as error:
        return [fault("push certificate", error)]
    return [ok("push certificate", f"{push.tls_cert_file} can be used")]


def private_key(config: Config) -> Finding:
    """Judge the interface's private key; show the public one, for core."""
    path = config.private_key_file
    if not os.path.lexists(path):
        try:
            path.parent.stat()
        except PermissionError:
            return Finding(
                "private key",
                Mark.FAULT,
                f"{path} can't be seen",
                "run check as root or as the agent's own user",
            )
        except OSError:
            pass
        return Finding(
            "private key",
            Mark.INFO,
            f"{path} is not there yet: the agent makes it when it first starts",
            "run check again then, and register the public key that it shows in core",
        )
    try:
        key = load_private_key(config, create=False)
    except ConfigError as error:
        return fault("private key", error)
    return ok("private key", f"the public key to register in core is {format_key(public_key(key))}")


def folders(config: Config) -> list[Finding]:
    """Judge the folders that are there; the agent makes those that are not."""
    findings = []
    there = []
    for path, key in ((config.paths.state, "paths.state"), (config.paths.runtime, "paths.runtime")):
        if not path.exists():
            continue
        there.append(str(path))
        try:
            private_folder(path, key)
            if path == config.paths.state:
                refuse_others_state(path, config.interface.name)
        except AgentError as error:
            findings.append(fault("folders", error))
    if not there:
        return [Finding("folders", Mark.INFO, "not there yet: the agent makes them when it starts")]
    return findings or [ok("folders", f"nobody else may write to {' and '.join(there)}")]
