"""Folders of the agent's own, which nobody else may put anything into, and files in them that are whole."""

from __future__ import annotations

import contextlib
import os
import secrets
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


def write_whole(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Have the file hold this, its owner's alone: whole and on the disk, or else as it was.

    Without ``replace`` one that is there is left alone: FileExistsError. Raises OSError.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(fresh, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            fresh.replace(path)
        else:
            path.hardlink_to(fresh)
    finally:
        fresh.unlink(missing_ok=True)
    sync_names(path.parent)


def sync_names(folder: Path) -> None:
    """Have the names in it on the disk, and no others; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def owner_file(state: Path) -> Path:
    """Return the file by which a state folder remembers its interface."""
    return state / _OWNER


def refuse_others_state(state: Path, interface: str) -> None:
    """Raise ConfigError if the state folder is another interface's: it holds that one's key and journal.

    A folder that remembers none, or that is not there, is anybody's. AgentError if it can't be read.
    """
    owner = _owner(state)
    if owner and owner != interface:
        raise ConfigError(
            f"paths.state: {state} belongs to the interface {owner!r}, and this is the agent of {interface}",
            f"leave paths.state out, or name a folder of {interface}'s own; if the interface was renamed and "
            f"no agent runs under the old name, remove {owner_file(state)}",
        )


def claim_state(state: Path, interface: str) -> None:
    """Have the state folder remember that it is this interface's; raises as ``refuse_others_state``.

    A disk that takes no writes keeps nobody from starting. What it made of a name, once, is an empty file:
    that is as good as none.
    """
    owner = _owner(state)
    if not owner:
        with contextlib.suppress(OSError):
            write_whole(owner_file(state), f"{interface}\n".encode(), replace=owner is not None)
    refuse_others_state(state, interface)


def _owner(state: Path) -> str | None:
    """Whose the folder is: empty if its file names nobody, None without one."""
    path = owner_file(state)
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_start(
            error,
            f"paths.state: {path} can't be read: {error.strerror}",
            "run as root or as the agent's user",
        ) from None
