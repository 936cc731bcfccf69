"""A table with one line for each row, laid out for a width in cells.

rich's own ``Table`` measures and folds each cell and takes 0.4 ms for a row of these: four seconds for
ten thousand peers. Here a column is as wide as it needs to be, and gives way in a stated order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style

from agent.commands.output import cells

GAP: Final = 2
_UNLIMITED: Final = 1 << 30


class Column(NamedTuple):
    """A column: it may be squeezed down to ``floor`` cells, and is not wider than ``most``.

    Those of a ``group`` are extras: shown together, if none need be squeezed for them, or not at all.
    ``middle``: what does not fit is cut out of the middle, since both ends tell something.
    """

    heading: str
    floor: int
    most: int = _UNLIMITED
    right: bool = False
    group: str = ""
    middle: bool = False


class Cell(NamedTuple):
    """A cell: pieces of text with their styles, and how wide they are.

    One that ``spills`` takes the room of those after it.
    """

    pieces: tuple[tuple[str, str], ...]
    width: int
    spills: bool = False


def cell(text: str, style: str = "", *, spills: bool = False) -> Cell:
    """Return a cell of one piece."""
    return Cell(((text, style),), cells(text), spills)


def pieced(*pieces: tuple[str, str]) -> Cell:
    """Return a cell of several pieces, each with its style."""
    return Cell(pieces, sum(cells(text) for text, _ in pieces))


NOTHING: Final = Cell((), 0)


def fit(columns: Sequence[Column], natural: Sequence[int], width: int | None) -> list[int]:
    """Return the width of each column, 0 for one that is left out; together they fit into ``width``.

    ``natural`` is what each would need. None is any width: nothing is squeezed or left out. Where not even
    the floors fit, essential columns are left out from the end, and the first one is cut.
    """
    if width is None:
        return list(natural)
    wanted = [min(need, column.most) for need, column in zip(natural, columns, strict=True)]
    floors = [min(need, column.floor) for need, column in zip(wanted, columns, strict=True)]
    kept = [number for number, column in enumerate(columns) if not column.group]
    all_kept = len(kept)
    while len(kept) > 1 and _total(kept, floors) > width:
        kept.pop()
    if _total(kept, floors) > width:
        wanted[kept[0]] = floors[kept[0]] = width
    widths = {number: wanted[number] for number in kept}
    while sum(widths.values()) + GAP * (len(widths) - 1) > width:
        spare = {number: wide for number, wide in widths.items() if wide > floors[number]}
        widths[max(spare, key=lambda number: spare[number])] -= 1
    if len(kept) == all_kept and all(widths[number] == wanted[number] for number in kept):
        for group in dict.fromkeys(column.group for column in columns if column.group):
            more = {n: wanted[n] for n, column in enumerate(columns) if column.group == group}
            if _total((*widths, *more), wanted) <= width:
                widths |= more
    return [widths.get(number, 0) for number in range(len(columns))]


def _total(kept: Sequence[int], widths: Sequence[int]) -> int:
    """Cells of these columns with the gaps between them."""
    return sum(widths[number] for number in kept) + GAP * (len(kept) - 1)


def cut(text: str, width: int, sign: str, *, middle: bool = False) -> str:
    """Return the text in at most so many cells, ``sign`` in place of what was cut out."""
    if cells(text) <= width:
        return text
    if width <= 1:
        return sign[:width]
    if not middle:
        return set_cell_size(text, width - 1).rstrip() + sign
    head = (width - 1) // 2
    tail = text[::-1]
    return set_cell_size(text, head) + sign + set_cell_size(tail, width - 1 - head)[::-1].strip()


class Listing:
    """Rows under headings. ``sign`` is what stands for text that was cut."""

    def __init__(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], sign: str) -> None:
        self._columns = columns
        self._rows = rows
        self._sign = sign
        self._styles: dict[str, Style] = {"": Style.null()}

    def widths(self, width: int | None) -> list[int]:
        """Return the columns' widths, as ``fit`` does; what spills widens a column only if all may be."""
        natural = [cells(column.heading) for column in self._columns]
        for row in self._rows:
            for number, one in enumerate(row):
                if (wide := one.width) > natural[number] and not (one.spills and width is not None):
                    natural[number] = wide
        return fit(self._columns, natural, width)

    def lines(self, widths: Sequence[int]) -> Iterable[list[Segment]]:
        """Yield the headings' line and then the rows'."""
        yield self._line([cell(column.heading, "bold") for column in self._columns], widths)
        for row in self._rows:
            yield self._line(row, widths)

    def _line(self, row: Sequence[Cell], widths: Sequence[int]) -> list[Segment]:
        line: list[Segment] = []
        pending = 0  # spaces, which only go before something
        number, last = 0, len(widths)
        while number < last:
            room = widths[number]
            if not room:
                number += 1
                continue
            one, column = row[number], self._columns[number]
            number += 1
            wide = one.width
            if one.spills:
                while wide > room and number < last:
                    room += GAP + widths[number] if widths[number] else 0
                    number += 1
            pieces = one.pieces
            if wide > room:
                pieces = self._cut(pieces, room, middle=column.middle)
                wide = sum(cells(text) for text, _ in pieces)
            if column.right:
                pending += room - wide
            for text, style in pieces:
                if text:
                    if pending:
                        line.append(Segment(" " * pending))
                        pending = 0
                    line.append(Segment(text, self._style(style)))
            pending += GAP + (0 if column.right else room - wide)
        return line

    def _cut(
        self, pieces: tuple[tuple[str, str], ...], room: int, *, middle: bool
    ) -> tuple[tuple[str, str], ...]:
        """Cut the pieces where they reach the end of the room."""
        kept: list[tuple[str, str]] = []
        for text, style in pieces:
            wide = cells(text)
            if wide >= room:
                text, room = cut(text, room, self._sign, middle=middle), 0  # noqa: PLW2901
                kept.append((text, style))
                break
            kept.append((text, style))
            room -= wide
        return tuple(kept)

    def _style(self, name: str) -> Style:
        style = self._styles.get(name)
        if style is None:
            style = self._styles[name] = Style.parse(name)
        return style
