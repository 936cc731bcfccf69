"""``wg-agent run``: the daemon of one interface."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from agent.commands.chosen import choose


def execute(arguments: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop."""
    choice = choose(arguments)
    result: int = load_daemon().run(choice.load(), choice.path, choice.interface)
    return result


def load_daemon() -> Any:
    """Import ``agent.daemon`` without what its libraries import and it does not use (``rss_10k``: 6 MB).

    That is rich, in which structlog can show tracebacks, and httpx's own command line.
    """
    hidden = {"rich", "httpx._main"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        return importlib.import_module("agent.daemon")
    finally:
        for name in hidden:
            del sys.modules[name]
