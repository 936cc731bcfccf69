"""What the reliability tests have seen, and the document made of it.

A test that carries ``@pytest.mark.reliability(fault, holds)`` is a line of the matrix: what was broken
and what had to hold nevertheless. Its fixture ``seen`` takes the figures. ``make reliability`` runs all
of them at full size and writes ``docs/reliability.md``; ``make test`` runs the same code, shorter.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

FULL: Final = os.environ.get("RELIABILITY") == "full"
"""Whether the tests run at the size of ``make reliability``."""
EMULATED: Final = os.environ.get("IN_KERNEL_LAB") == "1"
PROPERTY: Final = "reliability"


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one test saw. ``overrun`` in seconds past a deadline, ``lost`` in packets of bystanders."""

    tried: int = 1
    overrun: float | None = None
    lost: int | None = None
    note: str = ""
    kernel: str = ""


@dataclass(slots=True)
class Seen:
    """The fixture ``seen``: call it once for each thing that was measured."""

    sightings: list[Sighting] = field(default_factory=list)

    def __call__(
        self, *, tried: int = 1, overrun: float | None = None, lost: int | None = None, note: str = ""
    ) -> None:
        self.sightings.append(Sighting(tried, overrun, lost, note, _where()))


@dataclass(slots=True)
class Row:
    """A line of the matrix, over all tests that carry the same fault and demand."""

    fault: str
    holds: str
    tests: list[str] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    failed: int = 0
    before: list[list[Sighting]] = field(default_factory=list)
    """What each run saw that failed before a part was run anew."""


class Ledger:
    """What each marked test has seen last, by its id."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, Any]] = {}

    def add(self, test: str, properties: Iterable[tuple[str, object]], *, passed: bool) -> None:
        """Take in one test's report."""
        for name, value in properties:
            if name == PROPERTY and isinstance(value, dict):
                self._seen[test] = {**value, "passed": passed}

    def keep(self, file: Path) -> None:
        """Add what earlier runs have left in ``file``, and leave all of it there.

        Of a part that was run anew the last run counts; that it failed before is not forgotten.
        """
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for test, value in self._seen.items():
            if (earlier := before.get(test)) is not None:
                failed = [] if earlier["passed"] else [earlier["seen"]]
                value["failed_before"] = [*earlier.get("failed_before", ()), *failed]
        self._seen = before | self._seen
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self._seen, indent=1), encoding="utf-8")

    def __bool__(self) -> bool:
        return bool(self._seen)

    def _rows(self) -> list[Row]:
        rows: dict[tuple[str, str], Row] = {}
        for test, value in sorted(self._seen.items()):
            fault, holds = value["fault"], value["holds"]
            row = rows.setdefault((fault, holds), Row(fault, holds))
            row.tests.append(test.partition("[")[0])
            row.failed += not value["passed"]
            row.sightings += [Sighting(**sighting) for sighting in value["seen"]]
            row.before += [[Sighting(**s) for s in run] for run in value.get("failed_before", ())]
        return list(rows.values())

    def render(self, version: str) -> str:
        """Return the document."""
        rows = self._rows()
        kernels = sorted({s.kernel for row in rows for s in row.sightings if s.kernel})
        everything = [s for row in rows for some in (row.sightings, *row.before) for s in some]
        overruns = [s.overrun for s in everything if s.overrun is not None]
        lost = sum(s.lost or 0 for s in everything)
        head = [
            "# Reliability",
            "",
            "Written by `make reliability`: each line is a fault that was really provoked, what had to hold",
            "nevertheless, how often it was tried, and what was seen. `make test` runs most of them with",
            "fewer rounds. A part may have been run anew; then its last run stands here, and each before",
            "it that failed.",
            "",
            f"- wg-agent {version}, on {'; '.join(kernels) or 'no kernel: nothing was measured'}",
            f"- worst reply past a deadline: {_seconds(max(overruns)) if overruns else 'none measured'}",
            f"- packets lost by peers that nothing was done to: {lost}",
            "- a reply may come 1 s past its session's deadline, 5 s where the kernel is emulated",
            "",
            "| Fault | What must hold | Tried | Seen |",
            "| --- | --- | ---: | --- |",
        ]
        body = [f"| {row.fault} | {row.holds} | {_tried(row)} | {_said(row)} |" for row in rows]
        files = sorted({test.partition("::")[0] for row in rows for test in row.tests})
        tail = ["", f"The tests are in {', '.join(f'`{file}`' for file in files)}.", ""]
        return "\n".join([*head, *body, *tail])


def as_property(fault: str, holds: str, seen: Seen) -> tuple[str, dict[str, Any]]:
    """Return what a test's report carries from the lab to the host."""
    return PROPERTY, {"fault": fault, "holds": holds, "seen": [asdict(s) for s in seen.sightings]}


def _tried(row: Row) -> int:
    return sum(s.tried for s in row.sightings) or len(row.tests)


def _said(row: Row) -> str:
    parts = [f"**{row.failed} FAILED**"] if row.failed else []
    parts += _figures(row.sightings)
    parts += [f"**FAILED in an earlier run**: {', '.join(_figures(run))}" for run in row.before]
    return "; ".join(parts) or "held"


def _figures(sightings: list[Sighting]) -> list[str]:
    parts = []
    overruns = [s.overrun for s in sightings if s.overrun is not None]
    lost = [s.lost for s in sightings if s.lost is not None]
    if overruns:
        parts.append(f"worst overrun {_seconds(max(overruns))}")
    if lost:
        parts.append(f"{sum(lost)} packets lost by others")
    return [*parts, *dict.fromkeys(s.note for s in sightings if s.note)]


def _seconds(seconds: float) -> str:
    """Return a duration for people; a negative overrun is a cut before the deadline."""
    if abs(seconds) >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms"


def _where() -> str:
    emulated = ", emulated by QEMU (TCG)" if EMULATED else ""
    return f"Linux {platform.release()} {platform.machine()}{emulated}"
