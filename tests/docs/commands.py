"""Shell blocks of the documentation as commands, and their printed output as a pattern.

```sh is a script: all of it is run by one bash, and has to succeed. ```console is a dialogue: each line that
begins with ``$ `` is run, and what follows it is what it has to print; an ellipsis (…) stands for what
varies, alone on a line for any number of lines. A command that shows output may fail, as far as its exit
status goes; one that shows none may not.
"""

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.docs.markdown import Block

SHELL = ("sh", "console")
_HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?")
Run = Callable[[str, str], "subprocess.CompletedProcess[str]"]
"""Runs a script with this standard input; stdout and stderr come in one."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and what it has to print; None: that is not shown."""

    text: str
    shown: tuple[str, ...] | None


def commands(block: Block) -> list[Command]:
    """Return the commands of a block. AssertionError if it is not written as one."""
    if block.language == "sh":
        return [Command(block.text, None)]
    found: list[tuple[list[str], list[str]]] = []
    lines = iter(block.lines)
    for line in lines:
        if line.startswith("$ "):
            text = [line.removeprefix("$ ")]
            text += _continued(text[0], lines)
            found.append((text, []))
        else:
            assert found, f"{block.where}: a console block begins with a command: $ …"
            found[-1][1].append(line)
    return [Command("\n".join(text), tuple(shown) or None) for text, shown in found]


def _continued(first: str, lines: Iterator[str]) -> Iterator[str]:
    """Lines that belong to a command: after a backslash, or up to the end of its here-document."""
    line = first
    while line.endswith("\\"):
        line = next(lines)
        yield line
    if heredoc := _HEREDOC.search(first):
        for line in lines:
            yield line
            if line.strip() == heredoc[1]:
                return


def command_lines(block: Block) -> list[str]:
    """Return the lines of a block that could be commands, without prompts."""
    return [line.removeprefix("$ ").strip() for line in block.lines if line.strip()]


def pattern(shown: Sequence[str]) -> "re.Pattern[str]":
    """Return what output has to match, white space aside."""
    parts = []
    for line in shown:
        if line.strip() == "…":
            parts.append(r"(?:[^\n]*\n)*?")
        else:
            words = " ".join(line.split())
            parts.append(r"[^\n]*?".join(re.escape(piece) for piece in words.split("…")) + r" ?\n")
    return re.compile("".join(parts))


def printed_as_shown(printed: str, shown: Sequence[str]) -> bool:
    """Whether output is what a document shows of it."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    wanted = list(shown)
    while wanted and not wanted[-1].strip():
        wanted.pop()
    return pattern(wanted).fullmatch("".join(f"{line}\n" for line in lines)) is not None


def execute(block: Block, run: Run, stdin: Callable[[], str] = str, skipped: Sequence[str] = ()) -> str:
    """Run a block and judge it; return all that it printed. ``skipped`` lines are left out."""
    everything = ""
    for command in commands(block):
        text = "\n".join(line for line in command.text.splitlines() if line.strip() not in skipped)
        if not text.strip():
            continue
        done = run(text, stdin())
        everything += done.stdout
        said = f"{block.where}: {text.strip()}\nended with {done.returncode} and printed:\n{done.stdout}"
        if command.shown is None:
            assert done.returncode == 0, said
        else:
            wanted = "\n".join(command.shown)
            assert printed_as_shown(done.stdout, command.shown), f"{said}\nThe document shows:\n{wanted}"
    return everything
