"""What the commands print: JSON for programs, text and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.text import Text

_PIPE_WIDTH: Final = 1000  # nothing is folded or cut for a program that reads along
_NARROWEST: Final = 20  # cells left of a label, below which text is not folded beside it


@dataclass(frozen=True, slots=True)
class Signs:
    """The characters that are not ASCII, or what stands for them where the encoding has none."""

    good: str = "●"
    waiting: str = "○"
    bad: str = "✗"
    tick: str = "✓"
    warning: str = "!"
    info: str = "·"
    skipped: str = "-"
    full: str = "━"
    empty: str = "─"
    cut: str = "…"
    arrow: str = "→"


_ASCII: Final = Signs("*", "o", "x", "+", "!", ".", "-", "#", "-", "~", "->")
_UNICODE: Final = Signs()


def console() -> Console:
    """Return a console on stdout that takes no markup: names come from elsewhere."""
    plain = Console(markup=False, emoji=False, highlight=False)
    if not plain.is_terminal:
        plain.width = _PIPE_WIDTH
    return plain


def signs(to: Console) -> Signs:
    """Return the signs that can be printed there."""
    return _ASCII if to.options.ascii_only else _UNICODE


class Screen:
    """Lines from top to bottom, for rich to print; they are neither folded nor padded."""

    def __init__(self, lines: Iterable[Text | list[Segment]]) -> None:
        self.lines = list(lines)

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        end = Segment.line()
        for line in self.lines:
            if isinstance(line, Text):
                yield from Segment.apply_style(line.render(to), to.get_style(line.style))
            else:
                yield from line
            yield end


def print_lines(to: Console, lines: Iterable[Text | list[Segment]]) -> None:
    """Print lines as they are."""
    to.print(Screen(lines), crop=False, no_wrap=True, overflow="ignore", end="")


def folded(to: Console, label: Text, text: Text) -> list[Text]:
    """Return ``text`` beside its label, folded to a terminal's width under where it begins."""
    indent = label.cell_len
    room = to.width - indent
    folds = to.is_terminal and room >= _NARROWEST
    parts = (list(text.wrap(to, room)) if folds else []) or [text]
    margin = Text(" " * indent)
    lines = [Text.assemble(margin if number else label, part) for number, part in enumerate(parts)]
    for line in lines:
        line.rstrip()
        line.end = ""
    return lines


def say(to: Console, text: str, style: str = "") -> None:
    """Print one line, not folded, without what would drive the terminal or what it has no character for."""
    to.print(Text(shown(text, to.encoding), style=style), soft_wrap=True)


def shown(text: str, encoding: str = "utf-8") -> str:
    """Return text that can't drive a terminal, and that this encoding has characters for."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if not text.isascii() and not encoding.startswith("utf"):
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def cells(text: str) -> int:
    """How many cells of a terminal the text takes: wide characters take two, combining ones none."""
    return len(text) if text.isascii() else cell_len(text)


def print_json(document: Mapping[str, Any]) -> None:
    """Print the document, indented for a person, on one line for a program."""
    indent = 2 if sys.stdout.isatty() else None
    json.dump(document, sys.stdout, indent=indent)
    sys.stdout.write("\n")
    sys.stdout.flush()
