"""Which configuration a command is about: ``-c FILE``, ``-i NAME``, or the only one there is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from agent import configfile
from agent.config import Config
from agent.errors import ConfigError


class Choice(NamedTuple):
    """A configuration file, and the interface that it has to be for, if one was named."""

    path: Path
    interface: str | None

    def load(self) -> Config:
        """Read and check it; raises ConfigError."""
        return configfile.load_config(self.path, interface=self.interface)


def choose(arguments: argparse.Namespace) -> Choice:
    """Return what the arguments choose; raises ConfigError if they leave it open."""
    path: Path | None = getattr(arguments, "config", None)
    interface: str | None = getattr(arguments, "interface", None)
    if path is not None:
        return Choice(path, interface)
    if interface is None:
        interface = _the_only_one()
    return Choice(configfile.config_path(interface), interface)


def _the_only_one() -> str:
    found = sorted(configfile.FOLDER.glob("*.toml"))
    if len(found) > 1:
        raise ConfigError(
            f"there are {len(found)} configurations in {configfile.FOLDER}",
            f"name one: {', '.join(f'-i {file.stem}' for file in found[:8])}",
        )
    return found[0].stem if found else "wg0"
