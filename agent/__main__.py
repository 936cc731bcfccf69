"""``wg-agent``: the command line. Each command is a module of ``agent.commands``, imported when asked for.

Exit codes: 0 fine, 1 the thing asked about is wrong, 2 usage or configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from agent import __version__
from agent.commands.options import add_status_options
from agent.errors import AgentError, ConfigError

_COMMANDS: Final = {
    "run": "run the agent of one interface until SIGTERM",
    "check": "say what is wrong with configuration, credentials, core and this host, and what to do",
    "status": "show the peers and the agent's own health",
    "explain": "say why a peer is on the interface or not",
    "events": "show what has happened: grants, ends, refusals, drift, core",
    "plan": "show what a reconcile would change now, changing nothing",
    "end": "end sessions now, here, whatever core says",
    "purge": "remove the interface and the agent's state; not while an agent runs",
    "conformance": "hold a core that somebody writes to the core API, clause by clause",
    "import-defguard": "print our configuration for that of Defguard's own gateway",
    "demo": "play a gateway, a client and a core in network namespaces",
}
_WITHOUT_CONFIG: Final = frozenset({"conformance", "import-defguard", "demo"})
_WITH_DATA: Final = frozenset({"check", "status", "explain", "events", "plan", "end", "purge", "conformance"})
_MOST_LINES: Final = 1000
_INTERRUPTED: Final = 130  # 128 and SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (the process's own arguments by default); return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "demo":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        module = importlib.import_module(f"agent.commands.{arguments.command.replace('-', '_')}")
        execute: Callable[[argparse.Namespace], int] = module.execute
        code = execute(arguments)
        sys.stdout.flush()
    except AgentError as error:
        _complain(error)
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:
        # The reader (a pager, head) has gone; the interpreter must not complain when it exits.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    # Suppressed defaults: what stands before the command must outlive the command's own parser.
    choice = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    choice.add_argument("-c", "--config", type=Path, metavar="FILE", help="the configuration file")
    choice.add_argument(
        "-i", "--interface", metavar="NAME", help="the interface: /etc/wg-agent/NAME.toml unless -c is given"
    )
    parser = argparse.ArgumentParser(
        prog="wg-agent",
        description="MFA sessions on a WireGuard gateway's interface on time, and off it on time.",
        parents=[choice],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wg-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[] if name in _WITHOUT_CONFIG else [choice],
            add_help=name != "demo",
            allow_abbrev=False,
        )
        for name, text in _COMMANDS.items()
    }
    for name in _COMMANDS:
        if name in _WITH_DATA:
            parsers[name].add_argument("--json", action="store_true", help="print JSON")
    add_status_options(parsers["status"])
    parsers["explain"].add_argument(
        "what", metavar="KEY|IP|NAME", help="a public key or its beginning, an address or prefix, or a name"
    )
    events = parsers["events"]
    events.add_argument("who", nargs="?", metavar="KEY|NAME", help="only what concerns this peer")
    events.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    events.add_argument(
        "-n", "--lines", type=_count, default=50, metavar="N", help="so many of the past, 1000 at most (50)"
    )
    end = parsers["end"]
    end.add_argument("keys", nargs="*", metavar="KEY", help="public keys of the peers, in base64")
    end.add_argument("--all", action="store_true", help="end every session")
    parsers["purge"].add_argument("--key", action="store_true", help="remove the private key as well")
    _add_conformance(parsers["conformance"])
    theirs = parsers["import-defguard"]
    theirs.add_argument("file", nargs="?", type=Path, metavar="FILE", help="its gateway.toml")
    theirs.add_argument(
        "--env",
        type=Path,
        metavar="FILE",
        help="its environment file, which counts where there is no gateway.toml",
    )
    theirs.add_argument(
        "--token-file", type=Path, metavar="FILE", help="write core's token to this new file, with mode 600"
    )
    return parser


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= _MOST_LINES:
        raise ValueError
    return count


def _add_conformance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--core", metavar="URL", help="where the API's paths begin, as core.url")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the token that core gave a gateway")
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="the CA that signed core's certificate")
    parser.add_argument("--client-cert-file", type=Path, metavar="FILE", help="a certificate to show to core")
    parser.add_argument("--client-key-file", type=Path, metavar="FILE", help="its key")
    parser.add_argument(
        "--watch", type=float, default=0.0, metavar="SECONDS", help="judge changes that are made meanwhile"
    )
    parser.add_argument(
        "--exercise",
        metavar="COMMAND",
        help="has core make changes: COMMAND ACTION [KEY] [KEY]",
    )
    parser.add_argument("--list", action="store_true", help="print the clauses and ask nothing")


def _complain(error: AgentError) -> None:
    for text, indent in ((error.message, "wg-agent: "), (error.hint, "  ")):
        if text:
            # Parts of it may have come from elsewhere: no control characters reach the terminal.
            safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
            print(indent + safe, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
