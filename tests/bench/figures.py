"""The figures that ``make bench`` measures, as a table for people and as JSON."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple


class Kind(NamedTuple):
    """What a figure is held to: at most ``limit``, and better still ``aim``, in ``unit``."""

    limit: float
    aim: float
    unit: str
    reference: str
    what: str


_PSK: Final = "one grant, push received to acknowledged"
KINDS: Final = {
    "cold_sync_10k": Kind(1.5, 1.0, "ratio", "wg setconf", "core's list to all peers in the kernel"),
    "cold_sync_50k": Kind(1.5, 1.0, "ratio", "wg setconf", "core's list to all peers in the kernel"),
    "resync_10k": Kind(0.5, 0.2, "ratio", "wg syncconf", "the whole list again, nothing changed"),
    "resync_50k": Kind(0.5, 0.2, "ratio", "wg syncconf", "the whole list again, nothing changed"),
    "grant_10k": Kind(1.5, 0.5, "ratio", "wg set", f"{_PSK}, median"),
    "grant_p99_scaling": Kind(1.5, 1.1, "ratio", "1,000 peers", f"{_PSK}, p99 at 100,000 peers"),
    "expiry_p99_10k": Kind(0.5, 0.1, "s", "the clock", "one session's end: deadline to cut, p99"),
    "mass_expiry_10k": Kind(
        1.0, 0.5, "ratio", "removal, 128 a message", "all due at once: deadline to all cut; both watched"
    ),
    "stall_10k": Kind(0.1, 0.02, "s", "the clock", "meanwhile, the longest read of another interface"),
    "stats_tick_10k": Kind(1.0, 0.6, "ratio", "wg show dump", "read, compare, journal; 1 % changed"),
    "adopt_10k": Kind(5.0, 2.0, "ratio", "wg show dump", "end of imports to READY, peers there already"),
    "idle_cpu_10k": Kind(0.01, 0.003, "cores", "one core", "30 s ticks, a scrape of all series every 15 s"),
    "rss_10k": Kind(90.0, 70.0, "MB", "-", "memory, with per-peer series"),
    "rss_100k": Kind(300.0, 200.0, "MB", "-", "memory, per-peer series off"),
    "fleet_200": Kind(60.0, 10.0, "s", "the clock", "200 agents of 500 peers after core restarts"),
}


class Figure(NamedTuple):
    """What was seen; None for a figure that could not be measured, ``raw`` says why."""

    value: float | None
    raw: Mapping[str, Any]


def ratio(ours: Sequence[float], theirs: Sequence[float], **raw: Any) -> Figure:
    """The median of ours by the median of theirs, all in seconds."""
    value = statistics.median(ours) / statistics.median(theirs)
    return Figure(value, {"ours_s": _rounded(ours), "reference_s": _rounded(theirs), **raw})


def percentile(values: Sequence[float], percent: int) -> float:
    """The least value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]


def document(figures: Mapping[str, Figure], machine: str, seed: int) -> dict[str, Any]:
    """The content of build/bench.json; a figure that nobody measured is there, without a value."""
    missing = Figure(None, {"why": "not measured in this run"})
    return {
        "machine": machine,
        "seed": seed,
        "figures": {
            name: {
                "value": None if figure.value is None else round(figure.value, 4),
                "limit": kind.limit,
                "aim": kind.aim,
                "unit": kind.unit,
                "reference": kind.reference,
                "raw": dict(figure.raw),
            }
            for name, kind in KINDS.items()
            for figure in [figures.get(name, missing)]
        },
    }


def table(figures: Mapping[str, Figure]) -> str:
    """The figures for people, a line each."""
    lines = [f"{'figure':18} {'seen':>9} {'limit':>7} {'aim':>7} {'unit':6} {'against':27} what"]
    for name, kind in KINDS.items():
        value = figures[name].value if name in figures else None
        seen = "-" if value is None else f"{value:.4g}"
        mark = " " if value is None or value <= kind.limit else "!"
        line = f"{name:18} {seen:>8}{mark} {kind.limit:>7g} {kind.aim:>7g} {kind.unit:6}"
        lines.append(f"{line} {kind.reference:27} {kind.what}")
    return "\n".join(lines)


def save(figures: Mapping[str, Figure], path: Path) -> None:
    """Keep what one part measured for the part that prints it."""
    path.write_text(json.dumps({name: [f.value, dict(f.raw)] for name, f in figures.items()}))


def load(path: Path) -> dict[str, Figure]:
    """What ``save`` kept; nothing if that part did not get so far."""
    if not path.exists():
        return {}
    return {name: Figure(value, raw) for name, (value, raw) in json.loads(path.read_text()).items()}
