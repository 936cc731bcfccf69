"""Draws docs/monitoring's dashboard from a run: python -m tests.pictures.dashboard

It needs what the end-to-end tests need: root, namespaces, wireguard-go, prometheus. A run: three minutes.
Grafana is not asked: its layout, queries, units, colours and legends are taken from the JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.pictures.panels import Box, draw
from tests.pictures.svg import Canvas
from tests.support import dashboard
from tests.support.busy_site import busy_site
from tests.support.dashboard import Answer, Span
from tests.support.prometheus import Series

FOLDER: Final = Path(__file__).parents[2] / "docs" / "pictures"
README_ROWS: Final = ("Health", "Sessions and peers", "Traffic")
_COLUMN: Final = 42.0
_UNIT: Final = 29.0
_GAP: Final = 6.0
_HEAD: Final = 44.0


def picture(
    board: dict[str, Any], answers: Sequence[Answer], span: Span, rows: Collection[str] | None = None
) -> str:
    """The dashboard as SVG: the panels of these rows, or all."""
    chosen: list[dict[str, Any]] = []
    row = ""
    for panel in board["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        if rows is None or row in rows:
            chosen.append(panel)
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in chosen)
    canvas = Canvas(24 * _COLUMN + 2 * _GAP, bottom * _UNIT + _HEAD + _GAP)
    canvas.rect(0, 0, canvas.width, canvas.height, "#f6f7f9")
    canvas.text(_GAP + 6, 28, board["title"], size=17, weight=600)
    for panel in chosen:
        at = panel["gridPos"]
        box = Box(
            at["x"] * _COLUMN + _GAP + 3,
            at["y"] * _UNIT + _HEAD + 3,
            at["w"] * _COLUMN - _GAP,
            at["h"] * _UNIT - _GAP,
        )
        if panel["type"] == "row":
            canvas.text(box.x + 3, box.y + 16, panel["title"], size=13, weight=600)
        else:
            draw(canvas, box, panel, [one for one in answers if one.panel is panel], span)
    return canvas.document("The wg-agent dashboard, drawn from a run")


def _run(board: dict[str, Any]) -> tuple[Span, list[Answer]]:
    with (
        tempfile.TemporaryDirectory(prefix="wg-agent-picture-") as folder,
        busy_site(Path(folder), 1.0) as busy,
    ):
        start, end = busy.play()
        span = Span(start, end, 1.0, busy.prometheus.interval)
        return span, list(dashboard.ask(board, busy.prometheus, span))


def _kept(board: dict[str, Any], path: Path) -> tuple[Span, list[Answer]]:
    """What a run has left in a file, to draw it anew; or a run."""
    if not path.exists():
        span, answers = _run(board)
        path.write_text(json.dumps([asdict(span), [[asdict(s) for s in one.series] for one in answers]]))
    saved, data = json.loads(path.read_text())
    targets = [(panel, target) for panel in dashboard.panels(board) for target in panel["targets"]]
    answers = [
        Answer(panel, target, "", [Series(s["labels"], tuple(map(tuple, s["points"]))) for s in series])
        for (panel, target), series in zip(targets, data, strict=True)
    ]
    return Span(**saved), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="a file that a run's data is kept in, and taken from if there"
    )
    data = parser.parse_args().data
    board = dashboard.load()
    span, answers = _run(board) if data is None else _kept(board, data)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "dashboard.svg").write_text(picture(board, answers, span, README_ROWS), encoding="utf-8")
    (FOLDER / "dashboard-whole.svg").write_text(picture(board, answers, span), encoding="utf-8")


if __name__ == "__main__":
    main()
