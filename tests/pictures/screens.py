"""Pictures of the commands' screens, for the documentation: ``python -m tests.pictures.screens [NAME…]``.

Each is what the real command writes to a terminal on a real gateway (``gateway.py``).
Needs root, network namespaces and wireguard-go.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.pictures.drawing import COLUMNS, draw, run_in_terminal
from tests.pictures.gateway import INTERFACE, LOOK, Gateway, gateway, private
from tests.support import needs
from tests.support.site import until

FOLDER: Final = Path(__file__).parents[2] / "docs" / "pictures"


def _nothing(here: Gateway) -> None:
    pass


def _next_look(here: Gateway) -> None:
    looked = here.site.status()["observed_at"]
    while here.site.status()["observed_at"] == looked:
        time.sleep(0.2)


def _go_on(here: Gateway) -> None:
    """What somebody else did is healed; one session ends, another begins, core is away for a moment."""
    _next_look(here)
    site = here.site
    phone = next(peer for peer in site.status()["peers"] if peer["name"] == "alice-phone")
    site.core.do(lambda core: core.sessions.end(phone["session_id"], "revoked", core.clock()))
    here.granted(here.clients["dave-tablet"], ago=0, lasts=3600)
    site.core.kill()
    until(lambda: not site.status()["core_connected"], what="an agent without core")
    site.core.start()
    until(lambda: site.status()["core_connected"], what="an agent with core")


def _meddle(here: Gateway) -> None:
    """Somebody uses ``wg set`` on the agent's interface, right after it has looked at it."""
    _next_look(here)
    peers = {peer["name"]: peer for peer in here.site.status()["peers"]}
    wg = ("wg", "set", INTERFACE, "peer")
    run = here.site.gateway.run
    bob, carol = peers["bob-laptop"], peers["carol-laptop"]
    run(*wg, bob["public_key"], "allowed-ips", f"{bob['allowed_ips'][0]},10.8.0.77/32")
    run(*wg, carol["public_key"], "remove")
    stranger = "c3RyYW5nZXIncyBrZXksIGtub3duIHRvIG5vYm9keSE="
    run(*wg, stranger, "allowed-ips", "10.8.0.99/32", "endpoint", "198.18.77.2:40000")


@dataclass(frozen=True)
class Screen:
    """A picture: its name, the command, and what happens on the gateway before it."""

    name: str
    command: str
    before: Callable[[Gateway], None] = _nothing
    columns: int = COLUMNS
    code: int = 0
    """The command's exit code."""


SCREENS: Final = (
    Screen("status", "wg-agent status"),
    Screen("check", "wg-agent check", code=1),
    Screen("explain", "wg-agent explain bob"),
    Screen("plan", "wg-agent plan", _meddle),
    Screen("events", "wg-agent events", _go_on, columns=132),
)


def main(names: Sequence[str]) -> int:
    """Draw these, or all; return the exit code."""
    if reason := needs.no_userspace_wireguard():
        print(f"no pictures: {reason}", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    with private(), gateway() as here:
        time.sleep(2 * LOOK + 2)
        for screen in SCREENS:
            if not names or screen.name in names:
                screen.before(here)
                written = run_in_terminal(here.argv(screen.command), screen.columns, screen.code)
                picture = FOLDER / f"{screen.name}.svg"
                picture.write_text(draw(screen.command, written, screen.columns), encoding="utf-8")
                print(f"{picture}\n{written}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
