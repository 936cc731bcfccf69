import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.pictures.drawing import draw, run_in_terminal
from tests.pictures.screens import FOLDER, SCREENS

ROOT = FOLDER.parents[1]
NAMED = re.compile(r"""[("'\s]((?:docs/)?pictures/[^)"'\s]+)""")
SVG = "{http://www.w3.org/2000/svg}"


def named_in(page: Path) -> set[Path]:
    """The pictures that a page shows."""
    return {(page.parent / path).resolve() for path in NAMED.findall(page.read_text(encoding="utf-8"))}


def faults(svg: str) -> list[str]:
    """What a picture has that readers' programs would fetch or run, or could not read."""
    root = ET.fromstring(svg)  # it is ours, and the parser expands nothing from outside
    found = [
        element.tag for element in root.iter() if element.tag.removeprefix(SVG) in {"script", "image", "use"}
    ]
    values = [value for element in root.iter() for value in (*element.attrib.values(), element.text or "")]
    found += [value for value in values if re.search(r"url\((?!#)|@import|@font-face|javascript:", value)]
    return found + [key for element in root.iter() for key in element.attrib if key.endswith("href")]


def test_every_picture_that_the_documentation_shows_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]

    assert [path for page in pages for path in named_in(page) if not path.is_file()] == []


def test_pictures_are_found_however_a_page_names_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('![x](pictures/a.svg "title")\n<img src="docs/pictures/b.svg" alt="">\n')

    names = {str(path.relative_to(tmp_path.resolve())) for path in named_in(page)}
    assert names == {"pictures/a.svg", "docs/pictures/b.svg"}


def test_every_screen_has_its_picture() -> None:
    assert {screen.name for screen in SCREENS} <= {path.stem for path in FOLDER.glob("*.svg")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_is_well_formed_and_fetches_nothing(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "part",
    [
        "<style>@font-face { src: url(https://example.com/f) }</style>",
        '<image href="x.png"/>',
        '<g style="fill: url(http://example.com/a)"/>',
        "<script>1</script>",
        '<a href="https://example.com">x</a>',
    ],
)
def test_what_a_picture_must_not_have_is_seen(part: str) -> None:
    assert faults(f'<svg xmlns="http://www.w3.org/2000/svg">{part}</svg>')


def test_a_drawing_has_each_word_where_the_terminal_had_it() -> None:
    svg = draw("wg-agent status", "PEER  \x1b[32m<up>\x1b[0m\n   x\n")

    assert faults(svg) == []
    texts = {element.text: element for element in ET.fromstring(svg).iter(f"{SVG}text") if element.text}
    width = float(texts["PEER"].attrib["textLength"]) / 4
    assert float(texts["<up>"].attrib["x"]) == pytest.approx(6 * width)
    assert float(texts["x"].attrib["x"]) == pytest.approx(3 * width)
    assert float(texts["x"].attrib["y"]) > float(texts["<up>"].attrib["y"])
    assert "wg-agent\u00a0status" in texts
    assert texts["<up>"].attrib["class"] != texts["PEER"].attrib["class"]


def test_a_line_longer_than_the_terminal_goes_on_in_the_next_row() -> None:
    svg = draw("x", "a" * 25 + "\n" + "b" * 10 + "\n", 10)

    rows = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text") if (text.text or "").strip()]
    assert rows[-4:] == ["a" * 10, "a" * 10, "a" * 5, "b" * 10]


def test_a_command_finds_a_terminal_of_the_pictures_width() -> None:
    look = "import os, sys; print(os.get_terminal_size().columns, sys.stdout.isatty())"

    assert run_in_terminal([sys.executable, "-c", look], 77) == "77 True\n"


def test_a_command_that_fails_makes_no_picture() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3: .*gone"):
        run_in_terminal([sys.executable, "-c", "print('gone'); raise SystemExit(3)"])
