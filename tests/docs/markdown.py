"""Markdown as far as the tests of the documentation need it: headings, fenced blocks, links, code spans."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"( *)(`{3,}|~{3,})\s*(\S*)")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NAMED = re.compile(r'<a id="([\w-]+)"></a>')
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its lines without the fence's indentation, where it stands."""

    document: str
    section: str
    """The anchor of the heading above it."""
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}"

    def __str__(self) -> str:
        return f"{Path(self.document).stem}-L{self.line}"


@dataclass(frozen=True, slots=True)
class Heading:
    """``anchor`` is unique in its document."""

    line: int
    level: int
    title: str
    anchor: str


@dataclass
class Document:
    """One Markdown file; ``name`` is its path in the repository."""

    name: str
    text: str
    headings: list[Heading] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    """Further anchors (``<a id="…"></a>``), and the section that each stands in."""
    blocks: list[Block] = field(default_factory=list)
    prose: list[tuple[int, str]] = field(default_factory=list)
    """Numbered lines outside of blocks."""

    @cached_property
    def anchors(self) -> set[str]:
        return {heading.anchor for heading in self.headings} | self.aliases.keys()

    @cached_property
    def links(self) -> list[tuple[int, str]]:
        return [(n, target) for n, line in self.prose for target in _LINK.findall(_SPAN.sub("", line))]

    @cached_property
    def spans(self) -> list[tuple[int, str]]:
        return [(n, span) for n, line in self.prose for span in _SPAN.findall(line)]

    def part(self, anchor: str) -> str:
        """The text of a section, with those below it."""
        [begin] = [h for h in self.headings if h.anchor == self.aliases.get(anchor, anchor)]
        ends = (h.line - 1 for h in self.headings if h.line > begin.line and h.level <= begin.level)
        return "\n".join(self.text.splitlines()[begin.line : next(ends, None)])


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def parse(name: str, text: str) -> Document:
    """Read a file; a fence that is not closed is an AssertionError."""
    document, seen = Document(name, text), Counter[str]()
    section, fence, indent, language, start = "", "", 0, "", 0
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if fence:
            if line.strip() == fence:
                document.blocks.append(Block(name, section, start, language, tuple(lines)))
                fence = ""
            else:
                lines.append(line[indent:] if not line[:indent].strip() else line)
        elif opened := _FENCE.match(line):
            indent, fence, language, start, lines = len(opened[1]), opened[2], opened[3], number, []
        else:
            document.prose.append((number, line))
            if heading := _HEADING.fullmatch(line):
                anchor = slug(heading[2])
                seen[anchor] += 1
                section = anchor if seen[anchor] == 1 else f"{anchor}-{seen[anchor] - 1}"
                document.headings.append(Heading(number, len(heading[1]), heading[2], section))
            document.aliases.update(dict.fromkeys(_NAMED.findall(line), section))
    assert not fence, f"{name}:{start}: the block is not closed"
    return document


def documents() -> dict[str, Document]:
    """README.md and everything below docs/, by path."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [str(path.relative_to(ROOT)) for path in paths]
    return {name: parse(name, (ROOT / name).read_text(encoding="utf-8")) for name in names}
