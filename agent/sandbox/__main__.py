"""``python -m agent.sandbox core|client|mail|exercise|demo``."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent.errors import AgentError, ConfigError
from agent.sandbox import program

# Subcommand, the module whose main(argv) runs it, what it does. Imported only when asked for.
COMMANDS: Final = {
    "core": ("agent.sandbox.__main__:core_main", "serve the core API, users and MFA"),
    "client": ("agent.sandbox.client:main", "authenticate and bring a tunnel up"),
    "mail": ("agent.sandbox.mail:main", "receive e-mailed codes into a folder"),
    "exercise": ("agent.sandbox.exercise:main", "make the changes that wg-agent conformance asks for"),
    "demo": ("agent.sandbox.demo:main", "play all of it in network namespaces"),
}


def core_parser() -> argparse.ArgumentParser:
    """Return the parser of ``core``'s arguments."""
    parser = argparse.ArgumentParser(prog=program("core"))
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="users, gateways, locations"
    )
    return parser


def core_main(argv: list[str]) -> int:
    """Run ``core --config FILE`` until SIGTERM or SIGINT."""
    from agent.sandbox import app, config, core  # noqa: PLC0415 (mail and client need none of it)

    arguments = core_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(app.serve(core.Core(config.load(arguments.config), time.time)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return its exit code: 0 fine, 1 it failed, 2 usage or configuration."""
    parser = argparse.ArgumentParser(
        prog=program(), description="A small core and client to try wg-agent with."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    module, _, function = COMMANDS[arguments.command][0].partition(":")
    run: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    try:
        return run(rest)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except AgentError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
