"""Status documents as agents give them, and some that nobody should."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from agent.commands.output import print_lines
from agent.commands.selection import ordered
from agent.commands.status import report
from agent.encoding import format_time
from agent.model import PublicKey
from tests.commands.parts import Agent, peer

WALL = 1_800_000_000.0

NAMES = (
    "alice-laptop",
    "bob",
    "karl-heinz-wohnzimmer-tablet-mit-einem-sehr-langen-namen-das-64.",
    "日本語のとても長い名前の端末です",
    "e\u0301lan vital",
    "📱 phone of 👩 and 👨",
    "\x1b[31mred\x1b[0m \x07\u202e\u200d",
    "[bold]markup[/bold]",
    "a\u0300\u0301\u0302\u0303\u0304\u0305\u0306 zalgo",
    "",
)
ENDPOINTS = ("203.0.113.9:51000", "192.0.2.1:9", "[2001:db8:12:34:5678:9abc:def0:1]:51820")
REASONS = ("prefix_claimed", "invalid_persistent_keepalive", "session_on_two_keys")


def some_peers(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """So many peers in all states, the same for the same seed."""
    rng = random.Random(seed)
    return [_some_peer(number, rng) for number in range(count)]


def _some_peer(number: int, rng: random.Random) -> dict[str, Any]:
    state = rng.choices(["up", "waiting", "refused"], [7, 2, 1])[0]
    life = rng.choice([600.0, 3600.0, 28_800.0, 86_400.0 * 30])
    has_session = state == "up" and rng.random() < 0.9
    seen = state == "up" and rng.random() < 0.9
    name = rng.choice(NAMES)
    return peer(
        PublicKey(rng.randbytes(32)),
        name=f"{name}-{number}" if rng.random() < 0.5 else name,
        state=state,
        allowed_ips=[f"10.8.{number // 250}.{number % 250 + 1}/32", "fd00:8::/64"][: rng.choice([1, 1, 2])],
        session_id=f"s-{number}" if has_session else None,
        session_in_use=True if has_session else None,
        session_life=life if has_session else None,
        time_left=rng.random() * life if has_session else None,
        latest_handshake=format_time(WALL - rng.random() * 500) if seen else None,
        endpoint=rng.choice(ENDPOINTS) if seen else None,
        rx_bytes=rng.randrange(10 ** rng.randrange(1, 15)),
        tx_bytes=rng.randrange(10 ** rng.randrange(1, 15)),
        rx_rate=rng.random() * 10 ** rng.randrange(0, 9) if seen else 0.0,
        tx_rate=None if rng.random() < 0.1 else 0.0,
        mfa_exempt=state == "up" and not has_session,
        **({"reason": rng.choice(REASONS)} if state == "refused" else {}),
    )


def document(peers: Sequence[dict[str, Any]], **about: Any) -> dict[str, Any]:
    return Agent(peers, about).document()


def terminal(width: int, height: int = 50, *, encoding: str = "utf-8", colours: bool = True) -> Console:
    """A terminal as the commands' console would find it; what it shows is in ``file``."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="")
    return Console(
        file=file,
        width=width,
        height=height,
        force_terminal=True,
        color_system="256" if colours else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )


def pipe(encoding: str = "utf-8") -> Console:
    """What reads the commands' output and is no terminal."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="")
    plain = Console(file=file, force_terminal=False, markup=False, emoji=False, highlight=False)
    plain.width = 1000
    return plain


def written(to: Console) -> str:
    """What was printed so far."""
    assert isinstance(to.file, io.TextIOWrapper)
    to.file.flush()
    buffer = to.file.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(to.file.encoding)


def printed(to: Console, lines: Sequence[Any]) -> str:
    print_lines(to, lines)
    return written(to)


def status_text(to: Console, document: dict[str, Any], height: int | None = None, sort: str = "state") -> str:
    """What ``wg-agent status`` prints of a document."""
    return printed(to, report(document, ordered(document["peers"], sort), WALL, to, height).lines)
