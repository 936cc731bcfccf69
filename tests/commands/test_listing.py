from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from agent.commands.listing import GAP, NOTHING, Cell, Column, Listing, cell, cut, fit, pieced

NEEDS = st.lists(st.integers(1, 60), min_size=6, max_size=6)
COLUMNS = (
    Column("A", floor=10, most=40),
    Column("B", floor=5, right=True),
    Column("C", floor=12, middle=True),
    Column("D", floor=5, group="one"),
    Column("E", floor=5, group="one"),
    Column("F", floor=20, group="two"),
)


def total(widths: list[int]) -> int:
    shown = [width for width in widths if width]
    return sum(shown) + GAP * (len(shown) - 1)


@given(natural=NEEDS, width=st.integers(1, 400))
def test_columns_fit_into_the_width(natural: list[int], width: int) -> None:
    widths = fit(COLUMNS, natural, width)

    assert total(widths) <= width
    assert widths[0] > 0
    assert all(wide <= need for wide, need in zip(widths, natural, strict=True))


@given(natural=NEEDS, width=st.integers(1, 400))
def test_extras_are_shown_only_if_nothing_is_squeezed_for_them(natural: list[int], width: int) -> None:
    widths = fit(COLUMNS, natural, width)

    wanted = [min(natural[0], 40), *natural[1:3]]
    if any(widths[3:]):
        assert widths[:3] == wanted
    assert bool(widths[3]) is bool(widths[4])


@given(natural=NEEDS, width=st.integers(31, 400))
def test_no_column_is_squeezed_below_its_floor_while_the_floors_fit(natural: list[int], width: int) -> None:
    widths = fit(COLUMNS, natural, width)

    for wide, need, column in zip(widths[:3], natural[:3], COLUMNS[:3], strict=True):
        assert wide >= min(need, column.floor)


@given(natural=NEEDS, width=st.integers(1, 400))
def test_more_width_never_shows_less(natural: list[int], width: int) -> None:
    assert total(fit(COLUMNS, natural, width)) <= total(fit(COLUMNS, natural, width + 1))


@given(NEEDS)
def test_without_a_width_nothing_is_squeezed_or_left_out(natural: list[int]) -> None:
    assert fit(COLUMNS, natural, None) == natural


@given(text=st.text(st.sampled_from("ab日📱e\u0301 "), max_size=30), width=st.integers(0, 40))
def test_what_is_cut_fits_and_says_that_it_was_cut(text: str, width: int) -> None:
    found = cut(text, width, "…")

    assert cell_len(found) <= width
    if cell_len(text) <= width:
        assert found == text
    elif width:
        assert found.endswith("…")


def test_an_endpoint_is_cut_in_its_middle() -> None:
    assert cut("[2001:db8:12:34::1]:51820", 15, "…", middle=True) == "[2001:d…]:51820"


def lines(rows: list[list[Cell]], width: int) -> list[str]:
    listing = Listing([Column("NAME", 4), Column("STATE", 5), Column("AGE", 3, right=True)], rows, "…")
    return ["".join(s.text for s in line) for line in listing.lines(listing.widths(width))]


def test_what_spills_takes_the_room_of_the_cells_after_it_and_no_more() -> None:
    rows = [
        [cell("a"), cell("up"), cell("1s")],
        [cell("b"), cell("no way", spills=True), cell("2s")],
        [cell("c"), cell("in", spills=True), cell("3s")],
    ]

    assert lines(rows, 80) == ["NAME  STATE  AGE", "a     up      1s", "b     no way", "c     in      3s"]


def test_no_line_has_spaces_at_its_end() -> None:
    assert lines([[cell("a"), cell(""), NOTHING]], 80)[1] == "a"


def test_a_cut_cell_keeps_the_styles_of_its_pieces() -> None:
    listing = Listing([Column("N", 5)], [[pieced(("* ", "red"), ("abcdefgh", "green"))]], "…")

    line = list(listing.lines([7]))[1]

    assert [(s.text, str(s.style)) for s in line] == [("* ", "red"), ("abcd…", "green")]
