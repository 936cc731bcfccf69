"""The findings of ``wg-agent check`` for people: ticks and crosses under headings, and a last word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from agent.commands.findings import HEADINGS, Finding, Mark
from agent.commands.output import Signs, folded, shown, signs

_SIGNS: Final = {
    Mark.OK: ("tick", "green"),
    Mark.INFO: ("info", "cyan"),
    Mark.WARNING: ("warning", "yellow"),
    Mark.FAULT: ("bad", "red"),
    Mark.SKIPPED: ("skipped", "dim"),
}


def report(findings: Sequence[Finding], to: Console) -> list[Text]:
    """Return the lines; each remedy is below its fault."""
    drawn = signs(to)
    label = max(len(finding.check) for finding in findings)
    lines: list[Text] = []
    for heading, questions in HEADINGS.items():
        asked = [finding for finding in findings if finding.check in questions]
        if asked:
            lines.append(Text(heading, style="bold"))
            for finding in asked:
                lines += _lines(finding, label, to, drawn)
            lines.append(Text())
    return [*lines, last_word(findings)]


def _lines(finding: Finding, label: int, to: Console, drawn: Signs) -> list[Text]:
    sign, style = _SIGNS[finding.mark]
    bright = style if finding.mark in {Mark.WARNING, Mark.FAULT} else ""
    about = Text.assemble(
        "  ",
        (getattr(drawn, sign), style),
        " ",
        (finding.check.ljust(label), bright or ("dim" if style == "dim" else "")),
        "  ",
    )
    message = Text(shown(finding.message, to.encoding), bright or ("dim" if style == "dim" else ""))
    lines = folded(to, about, message)
    if finding.remedy:
        arrow = Text(" " * (label + 6) + drawn.arrow + " ")
        lines += folded(to, arrow, Text(shown(finding.remedy, to.encoding)))
    return lines


def last_word(findings: Sequence[Finding]) -> Text:
    """Return how many faults and warnings there are, and how many questions have no answer."""
    held = Counter(finding.mark for finding in findings)
    faults, warnings, open_ones = held[Mark.FAULT], held[Mark.WARNING], held[Mark.SKIPPED]
    parts = []
    if faults:
        parts.append(_counted(faults, "fault"))
    if warnings:
        parts.append(_counted(warnings, "warning"))
    if open_ones:
        parts.append(f"{open_ones} not judged")
    style = "bold red" if faults else "bold yellow" if parts else "bold green"
    return Text(", ".join(parts) or "no faults", style=style)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
