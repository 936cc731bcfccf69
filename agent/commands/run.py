"""``wg-agent run``: the daemon of one interface."""

from __future__ import annotations

import argparse

from agent import daemon
from agent.commands.chosen import choose


def execute(arguments: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop."""
    choice = choose(arguments)
    return daemon.run(choice.load(), choice.path, choice.interface)
