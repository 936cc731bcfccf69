"""``wg-agent run``: the daemon of one interface."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from typing import Any

from agent.hardening import forbid_core_dumps


def execute(arguments: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop."""
    # Before the rest is even imported: until then others of its user may trace it, and who does may go on.
    # The daemon does it again once it can log that it could not.
    forbid_core_dumps(quietly=True)
    from agent.commands.chosen import choose  # noqa: PLC0415

    choice = choose(arguments)
    result: int = load_daemon().run(choice.load(), choice.path, choice.interface)
    return result


def load_daemon() -> Any:
    """Import ``agent.daemon`` without what its libraries import and it does not use (``rss_10k``: 10 MB).

    That is rich, in which structlog can show tracebacks, httpx's own command line, what pyroute2
    has for other kinds of sockets, and what unittest has beside the mock that pyroute2 takes from it.
    """
    for name in {"pyroute2", "unittest"} - sys.modules.keys():
        _import_when_asked(name)
    hidden = {"rich", "httpx._main"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        return importlib.import_module("agent.daemon")
    finally:
        for name in hidden:
            del sys.modules[name]


def _import_when_asked(name: str) -> None:
    """Let a package's modules be imported without itself: its own code runs once a name of it is wanted.

    ``importlib.util.LazyLoader`` would run it with the first of its modules.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if importlib.util.find_spec(f"{name}.{attribute}") is not None:
            return importlib.import_module(f"{name}.{attribute}")
        vars(package).pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, attribute)

    vars(package)["__getattr__"] = get
    sys.modules[name] = package
