"""The peers of ``wg-agent status`` as a table's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console

from agent.commands.listing import NOTHING, Cell, Column, Listing, cell, pieced
from agent.commands.output import Signs, shown, signs
from agent.commands.selection import Entry, counts_down
from agent.encoding import format_span, parse_time

SIGNS: Final = {"up": ("good", "green"), "waiting": ("waiting", "yellow"), "refused": ("bad", "red")}
"""Of each state: which of the ``Signs`` and in which style."""
_ROOMY: Final = 100  # columns from which each row names its state
_BARS: Final = ((120, 16), (_ROOMY, 12), (0, 6))  # columns from which the bar has so many cells
_SCARCE: Final = ((0.1, "red"), (0.25, "yellow"), (1.0, "green"))
_FRESH: Final = 180.0  # seconds; an older handshake's keys are void
_UNITS: Final = "KMGTP"


def listing(peers: Sequence[Entry], wall: float, to: Console) -> Listing:
    """Return the table of these peers in their order; ``wall`` is now in Unix seconds."""
    roomy = not to.is_terminal or to.width >= _ROOMY
    bar = next(size for width, size in _BARS if not to.is_terminal or to.width >= width)
    columns = [
        Column("PEER", floor=10, most=40),
        *([Column("STATE", floor=9)] if roomy else []),
        Column("TIME LEFT", floor=bar + 7),
        Column("HANDSHAKE", floor=9, right=True),
        Column("RX/s", floor=5, right=True),
        Column("TX/s", floor=5, right=True),
        Column("ENDPOINT", floor=12, middle=True),
        Column("ALLOWED IPS", floor=18, most=40, group="ips"),
        Column("RX", floor=5, right=True, group="totals"),
        Column("TX", floor=5, right=True, group="totals"),
        Column("SESSION", floor=12, most=36, group="session"),
        Column("PUBLIC KEY", floor=44, group="key"),
    ]
    drawn = signs(to)
    rows = [_row(peer, wall, to.encoding, drawn, bar, roomy=roomy) for peer in peers]
    return Listing(columns, rows, drawn.cut)


def _row(peer: Entry, wall: float, encoding: str, drawn: Signs, bar: int, *, roomy: bool) -> list[Cell]:
    state, reason = peer["state"], peer.get("reason")
    sign, style = SIGNS.get(state, ("info", ""))
    left = _left(peer, drawn, bar)
    if reason:
        told = cell(f"{state}: {reason}", style, spills=True)
        states = [told, left] if roomy else [told]
    elif roomy:
        states = [cell(state, style), left]
    else:
        states = [cell(state, style) if left is NOTHING and state != "up" else left]
    name = shown(peer["name"] or peer["public_key"], encoding)
    return [
        pieced((getattr(drawn, sign), style), (" ", ""), (name, "")),
        *states,
        _handshake(peer["latest_handshake"], wall),
        _bytes(peer.get("rx_rate")),
        _bytes(peer.get("tx_rate")),
        cell(shown(peer["endpoint"] or "-", encoding), "" if peer["endpoint"] else "dim"),
        cell(", ".join(peer["allowed_ips"]) or "-"),
        _bytes(peer["rx_bytes"]),
        _bytes(peer["tx_bytes"]),
        cell(shown(peer["session_id"] or "-", encoding), "" if peer["session_id"] else "dim"),
        cell(shown(peer["public_key"], encoding)),
    ]


def _left(peer: Entry, drawn: Signs, bar: int) -> Cell:
    """The session's time left as a bar of its whole life, and in figures; a held one lets nobody in."""
    left, life = peer.get("time_left"), peer.get("session_life")
    if peer["state"] != "up":
        return NOTHING
    if left is None:
        return cell("exempt" if peer.get("mfa_exempt") else "no session", "dim")
    if not counts_down(peer):
        return cell("held", "dim")
    share = min(1.0, left / life) if life else 1.0
    style = next(style for most, style in _SCARCE if share <= most)
    full = filled(share, bar)
    return pieced(
        (drawn.full * full, style), (drawn.empty * (bar - full), "dim"), (f" {format_span(left):>6}", "")
    )


def filled(share: float, size: int) -> int:
    """How many of a bar's cells stand for this share: none only for nothing, all only for the whole."""
    if share <= 0 or share >= 1:
        return size if share >= 1 else 0
    return min(size - 1, max(1, round(share * size)))


def _handshake(text: str | None, wall: float) -> Cell:
    if text is None:
        return cell("never", "dim")
    age = max(0.0, wall - parse_time(text))
    return cell(format_span(age), "" if age < _FRESH else "dim")


def _bytes(count: float | None) -> Cell:
    if count is None:
        return cell("-", "dim")
    return cell(size(round(count)), "" if count else "dim")


def size(count: int) -> str:
    """Bytes in at most four characters, in powers of 1024 as ``ls -h`` has them: ``812B``, ``1.5K``."""
    if count < 1000:
        return f"{count}B"
    value = float(count)
    for unit in _UNITS:
        value /= 1024
        if value < 9.95:
            return f"{value:.1f}{unit}"
        if value < 999.5:
            return f"{value:.0f}{unit}"
    return f"{value:.0f}{_UNITS[-1]}"
