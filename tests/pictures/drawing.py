"""From what a command writes to a terminal to a picture of that terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS: Final = 100
_ROWS: Final = 50
_PATIENCE: Final = 60.0

THEME: Final = TerminalTheme(
    background=(24, 27, 33),
    foreground=(216, 219, 226),
    normal=[
        (60, 66, 78),
        (240, 113, 120),
        (135, 201, 126),
        (233, 190, 109),
        (104, 170, 240),
        (198, 146, 233),
        (92, 196, 204),
        (216, 219, 226),
    ],
)

# The font is the reader's own: a picture that fetched one would tell a third party who reads it.
_FORMAT: Final = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 16px; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
_FONT_RATIO: Final = 0.602  # width to height of a character in most fonts of one width
_SPACES: Final = re.compile(r"(^ +| {2,}| +$)")


def run_in_terminal(
    argv: Sequence[str], columns: int = COLUMNS, code: int = 0, env: Mapping[str, str] | None = None
) -> str:
    """Run a command to its end in a terminal of so many columns; return what it wrote there.

    Raises RuntimeError if it ends with another exit code.
    """
    leader, follower = pty.openpty()
    try:
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        kept = {
            k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
        }
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=follower,
            env=kept | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | dict(env or {}),
        )
        os.close(follower)
        follower = -1
        written = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the last who had the terminal has closed it
                break
            if not part:
                break
            written += part
        ended = process.wait(_PATIENCE)
    finally:
        os.close(leader)
        if follower >= 0:
            os.close(follower)
    text = written.decode().replace("\r\n", "\n")
    if ended != code:
        raise RuntimeError(f"{' '.join(argv)} ended with {ended}: {text}")
    return text


class _Words:
    """A line whose words know where they stand, whatever a reader's program makes of spaces."""

    def __init__(self, line: Text) -> None:
        self._line = line

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        self._line.end = ""
        for segment in self._line.render(to):
            for part in _SPACES.split(segment.text):
                if part:
                    yield Segment(part, segment.style)
        yield Segment.line()


def _rows(line: Text, columns: int) -> Iterator[Text]:
    """Cut a line where a terminal would go on in the next row."""
    while True:
        end = next((n for n in range(len(line) + 1) if cell_len(line.plain[:n]) > columns), 0)
        if not end:
            yield line
            return
        row, line = line.divide([end - 1])
        yield row


def draw(command: str, written: str, columns: int = COLUMNS) -> str:
    """Return the terminal, after a prompt with the command, as SVG."""
    screen = Console(
        record=True,
        width=columns,
        file=open(os.devnull, "w", encoding="utf-8"),  # noqa: PTH123, SIM115
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    with screen.file:
        prompt = Text.assemble(("$ ", "bold green"), (command, "bold"))
        for line in (prompt, *Text.from_ansi(written.rstrip("\n")).split("\n"), Text()):
            for row in _rows(line, columns):
                screen.print(_Words(row), crop=False)
        svg = screen.export_svg(
            title="gateway",
            theme=THEME,
            code_format=_FORMAT,
            font_aspect_ratio=_FONT_RATIO,
            unique_id=re.sub(r"\W+", "-", command),
        )
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
