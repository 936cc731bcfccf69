"""Plain SVG, drawn piece by piece: shapes, text, axes, and numbers as Grafana writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from xml.sax.saxutils import escape, quoteattr

FONT: Final = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, sans-serif"
INK: Final = "#24292e"
FAINT: Final = "#6e7781"
LINE: Final = "#e4e7eb"
_GLYPH: Final = 0.56
"""The width of a glyph in such a font, of its size, on average."""


class Canvas:
    """Shapes in the order in which they are drawn; lengths in pixels."""

    def __init__(self, width: float, height: float) -> None:
        self.width = width
        self.height = height
        self._parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "",
        radius: float = 0,
    ) -> None:
        border = f' stroke="{stroke}"' if stroke else ""
        rounded = f' rx="{radius:g}"' if radius else ""
        size = f'width="{_n(max(width, 0))}" height="{_n(max(height, 0))}"'
        self._parts.append(f'<rect x="{_n(x)}" y="{_n(y)}" {size}{rounded} fill="{fill}"{border}/>')

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float = 1.0) -> None:
        style = f'fill="none" stroke="{color}" stroke-width="{width:g}" stroke-linejoin="round"'
        self._parts.append(f'<polyline points="{_points(points)}" {style} stroke-linecap="round"/>')

    def area(self, points: Sequence[tuple[float, float]], color: str, opacity: float) -> None:
        self._parts.append(f'<polygon points="{_points(points)}" fill="{color}" fill-opacity="{opacity:g}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 11,
        color: str = INK,
        anchor: str = "start",
        weight: int = 400,
    ) -> None:
        style = f'font-size="{size:g}" fill="{color}"'
        style += f' text-anchor="{anchor}"' if anchor != "start" else ""
        style += f' font-weight="{weight}"' if weight != 400 else ""
        self._parts.append(f'<text x="{_n(x)}" y="{_n(y)}" {style}>{escape(text)}</text>')

    def document(self, title: str) -> str:
        """The whole as a file; it asks for nothing from elsewhere."""
        size = f'width="{_n(self.width)}" height="{_n(self.height)}"'
        box = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} font-family={quoteattr(FONT)} role="img">'
        )
        return "\n".join((head, f"<title>{escape(title)}</title>", *self._parts, "</svg>\n"))


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def text_width(text: str, size: float) -> float:
    """About how wide a text is."""
    return len(text) * size * _GLYPH


def shortened(text: str, size: float, width: float) -> str:
    """The text, or as much of it as there is room for."""
    most = int(width / (size * _GLYPH))
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def ticks(low: float, high: float, most: int, *, base: int = 10) -> list[float]:
    """Round values from below ``low`` to above ``high``, not many more than ``most``."""
    span = (high - low) or 1.0
    rough = span / max(1, most)
    unit = base ** math.floor(math.log(rough, base))
    steps = (1, 2, 2.5, 5, 10) if base == 10 else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    step = unit * next(one for one in steps if one * unit >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def clock(moment: float) -> str:
    """A moment of the run as a clock shows it (UTC)."""
    return datetime.fromtimestamp(moment, UTC).strftime("%H:%M:%S")


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A value in its unit, as Grafana writes it; units are Grafana's ids."""
    if unit == "s":
        return _seconds(value, decimals)
    if unit == "percentunit":
        return f"{value * 100:.{1 if decimals is None else decimals}f}%"
    if unit == "bytes":
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), decimals)
    if unit == "Bps":
        return _scaled(value, 1000, ("B/s", "kB/s", "MB/s", "GB/s"), decimals)
    number = f"{value:.{decimals}f}" if decimals is not None else f"{value:.3g}"
    return number + unit.removeprefix("suffix:") if unit.startswith("suffix:") else number


def _scaled(value: float, base: int, names: Sequence[str], decimals: int | None) -> str:
    size, at = abs(value), 0
    while size >= base * 0.9995 and at < len(names) - 1:
        size, at = size / base, at + 1
    digits = (0 if at == 0 or size >= 100 else 1) if decimals is None else (0 if at == 0 else decimals)
    number = f"{size:.{digits}f}"
    return f"{'-' if value < 0 and size else ''}{number} {names[at]}"


_SPANS: Final = ((31_536_000, "years"), (604_800, "weeks"), (86_400, "days"), (3600, "hours"), (60, "mins"))


def _seconds(value: float, decimals: int | None) -> str:
    size = abs(value)
    for least, name in _SPANS:
        if size >= least:
            return f"{value / least:.{1 if size / least < 100 and decimals is None else 0}f} {name}"
    if size == 0 or size >= 1 or decimals == 0:
        return f"{value:.{1 if decimals is None and size else 0}f} s"
    return f"{value * 1000:.3g} ms" if size >= 0.001 else f"{value * 1e6:.3g} µs"
