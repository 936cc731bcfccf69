"""Folders of the agent's own: nobody else may put anything into them."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from agent.errors import ConfigError, cannot_start

_OWNER: Final = "interface"
"""The file in a state folder that names the interface it belongs to."""


def private_folder(path: Path, key: str) -> None:
    """Make the folder with mode 0700 if there is none; ``key`` names it in errors.

    One that exists is left as it is. Raises ConfigError if it can't be made or is no folder, or if
    others may write to it; AgentError if the fault may pass.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise cannot_start(
            error,
            f"{key}: {path} can't be made: {error.strerror}",
            "name a folder that the agent's user may write to",
        ) from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{key}: others may write to {path} (mode {stat.S_IMODE(mode):04o})",
            f"chmod 700 {path}, or name a folder of the agent's own",
        )


def owner_file(state: Path) -> Path:
    """Return the file by which a state folder remembers its interface."""
    return state / _OWNER


def refuse_others_state(state: Path, interface: str) -> None:
    """Raise ConfigError if the state folder is another interface's: it holds that one's key and journal.

    A folder that remembers none, or that is not there, is anybody's. AgentError if it can't be read.
    """
    path = owner_file(state)
    try:
        owner = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_start(
            error,
            f"paths.state: {path} can't be read: {error.strerror}",
            "run as root or as the agent's user",
        ) from None
    if owner and owner != interface:
        raise ConfigError(
            f"paths.state: {state} belongs to the interface {owner!r}, and this is the agent of {interface}",
            f"leave paths.state out, or name a folder of {interface}'s own; if the interface was renamed and "
            f"no agent runs under the old name, remove {path}",
        )


def claim_state(state: Path, interface: str) -> None:
    """Have the state folder remember that it is this interface's; raises as ``refuse_others_state``.

    A disk that takes no writes keeps nobody from starting.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(owner_file(state), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{interface}\n")
    refuse_others_state(state, interface)
