"""Folders of the agent's own: nobody else may put anything into them."""

from __future__ import annotations

import stat
from pathlib import Path

from agent.errors import ConfigError, cannot_start


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
