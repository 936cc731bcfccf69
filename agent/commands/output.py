"""What the commands print: JSON for programs, text and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.text import Text

_PIPE_WIDTH: Final = 1000  # nothing is folded or cut for a program that reads along


def console() -> Console:
    """Return a console on stdout that takes no markup: names come from elsewhere."""
    plain = Console(markup=False, emoji=False, highlight=False)
    if not plain.is_terminal:
        plain.width = _PIPE_WIDTH
    return plain


def say(to: Console, text: str, style: str = "") -> None:
    """Print one line, not folded, with control characters escaped."""
    to.print(Text(shown(text), style=style), soft_wrap=True)


def shown(text: str) -> str:
    """Return text that can't drive a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_json(document: Mapping[str, Any]) -> None:
    """Print the document, indented for a person, on one line for a program."""
    indent = 2 if sys.stdout.isatty() else None
    json.dump(document, sys.stdout, indent=indent)
    sys.stdout.write("\n")
    sys.stdout.flush()
