"""The options of ``wg-agent status``; what carries them out is imported only when it is asked for."""

from __future__ import annotations

import argparse
from typing import Final

STATES: Final = ("up", "waiting", "refused")
ORDERS: Final = ("state", "name", "left", "handshake", "rate", "traffic", "ip", "key")


def add_status_options(status: argparse.ArgumentParser) -> None:
    """Add what chooses and sorts peers to the command's parser."""
    status.add_argument("peer", nargs="?", metavar="NAME|KEY|PREFIX|IP", help="show these peers only")
    status.add_argument(
        "--state",
        action="extend",
        type=_states,
        metavar="STATE",
        help="only peers that are up, waiting or refused; several with commas, or by --state once more",
    )
    status.add_argument(
        "--sort", choices=ORDERS, metavar="BY", help=f"by {', '.join(ORDERS)}; by state if not given"
    )
    status.add_argument("--watch", action="store_true", help="refresh every 2 s until Ctrl-C")


def _states(text: str) -> list[str]:
    named = text.split(",")
    for name in named:
        if name not in STATES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(STATES)}")
    return named
