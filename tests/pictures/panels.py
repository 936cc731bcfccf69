"""The kinds of panels that the dashboard has, drawn from its JSON and what Prometheus answered."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Final, NamedTuple

from tests.pictures.svg import FAINT, INK, LINE, Canvas, clock, shortened, shown, text_width, ticks
from tests.support.dashboard import Answer, Span
from tests.support.prometheus import Series

_COLORS: Final = {
    "green": "#4f9d5d",
    "red": "#d64550",
    "orange": "#e8893a",
    "blue": "#3b78c4",
    "yellow": "#e3b84d",
    "purple": "#8e62b5",
}
_CLASSIC: Final = (
    "#3b78c4",
    "#4f9d5d",
    "#e8893a",
    "#8e62b5",
    "#2f9e8f",
    "#d64550",
    "#e3b84d",
    "#8e8e8e",
    "#6b4f3a",
    "#c45a9b",
)
_LEGEND: Final = re.compile(r"\{\{ *(\w+) *\}\}")
_SMALL: Final = 10.0
_PAD: Final = 8.0


class Box(NamedTuple):
    """Where something is drawn."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Named:
    """A series with its name in the legend and its settings, the panel's own and those over them."""

    name: str
    series: Series
    color: str
    settings: dict[str, Any]


def draw(canvas: Canvas, box: Box, panel: dict[str, Any], answers: Sequence[Answer], span: Span) -> None:
    """Draw one panel; KeyError for a kind that is not known."""
    stat = panel["type"] == "stat"
    canvas.rect(*box, "#ffffff", stroke="#d5dae0", radius=4)
    canvas.text(box.x + 10, box.y + 18, panel["title"], size=11.5, weight=600)
    body = Box(box.x + 10, box.y + 28, box.width - 20, box.height - (36 if stat else 38))
    _KINDS[panel["type"]](canvas, body, panel, answers, span)


def named(panel: dict[str, Any], answers: Sequence[Answer]) -> list[Named]:
    """Every series of a panel, in the order of its targets."""
    found: list[Named] = []
    for answer in answers:
        for series in answer.series:
            name = _name(answer.target["legendFormat"], series.labels)
            settings = _settings(panel, name)
            color = settings["color"].get("fixedColor") or _CLASSIC[len(found) % len(_CLASSIC)]
            found.append(Named(name, series, _COLORS.get(color, color), settings))
    return found


def _name(legend: str, labels: dict[str, str]) -> str:
    return _LEGEND.sub(lambda label: labels.get(label[1], ""), legend)


def _settings(panel: dict[str, Any], name: str) -> dict[str, Any]:
    settings = dict(panel["fieldConfig"]["defaults"])
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == name:
            settings.update({one["id"]: one["value"] for one in override["properties"]})
    return settings


def _threshold(settings: dict[str, Any], value: float) -> str:
    color = ""
    for step in settings["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            color = step["color"]
    return _COLORS.get(color, color)


def _mapped(settings: dict[str, Any], value: float) -> tuple[str, str] | None:
    """The text and the colour that a value is mapped to."""
    for mapping in settings["mappings"]:
        if one := mapping["options"].get(f"{value:g}"):
            return one["text"], _COLORS.get(one["color"], one["color"])
    return None


def _stat(canvas: Canvas, box: Box, panel: dict[str, Any], answers: Sequence[Answer], span: Span) -> None:
    del span
    settings = panel["fieldConfig"]["defaults"]
    values = [value for answer in answers for series in answer.series for _, value in series.points]
    known = [value for value in values if not math.isnan(value)]
    if not known:
        text, color = "No data", "#c4c9cf"
    elif mapped := _mapped(settings, known[-1]):
        text, color = mapped
    else:
        text = shown(known[-1], settings["unit"], settings.get("decimals"))
        color = _threshold(settings, known[-1])
    canvas.rect(box.x, box.y, box.width, box.height, color, radius=3)
    size = min(24.0, box.height * 0.5, box.width / (len(text) * 0.75))
    canvas.text(
        box.x + box.width / 2,
        box.y + box.height / 2 + size * 0.35,
        text,
        size=size,
        color="#ffffff",
        anchor="middle",
        weight=600,
    )


class _Frame(NamedTuple):
    """Where values and moments come to lie."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    floor: float


def _frame(canvas: Canvas, box: Box, low: float, high: float, settings: dict[str, Any], span: Span) -> _Frame:
    """Draw the axes of a plot and return how to get from values to pixels."""
    unit = settings["unit"]
    at = ticks(low, high, max(2, int(box.height / 32)), base=2 if unit == "bytes" else 10)
    if settings.get("decimals") == 0:
        at = sorted({float(round(tick)) for tick in at})
    labels = [shown(tick, unit, settings.get("decimals")) for tick in at]
    left = box.x + max(text_width(label, _SMALL) for label in labels) + 6
    bottom, width = box.y + box.height - 16, box.x + box.width - left

    def to_x(moment: float) -> float:
        return left + (moment - span.start) / (span.end - span.start) * width

    def to_y(value: float) -> float:
        return bottom - (value - at[0]) / (at[-1] - at[0]) * (bottom - box.y - 4)

    for tick, label in zip(at, labels, strict=True):
        canvas.line([(left, to_y(tick)), (left + width, to_y(tick))], "#c4c9cf" if tick == 0 else LINE)
        canvas.text(left - 6, to_y(tick) + 3.5, label, size=_SMALL, color=FAINT, anchor="end")
    _moments(canvas, to_x, bottom, span, int(width / 64))
    return _Frame(to_x, to_y, bottom)


def _moments(canvas: Canvas, to_x: Callable[[float], float], bottom: float, span: Span, most: int) -> None:
    rough = (span.end - span.start) / max(1, most)
    step = next(one for one in (5, 10, 20, 30, 60, 120, 300, 900, 3600, 86_400) if one >= rough)
    moment = math.ceil(span.start / step) * step
    while moment <= span.end:
        x, wide = to_x(moment), text_width(clock(moment), _SMALL) / 2
        if x - wide >= to_x(span.start) - 24 and x + wide <= to_x(span.end) + 8:
            canvas.text(x, bottom + 14, clock(moment), size=_SMALL, color=FAINT, anchor="middle")
        moment += step


def _runs(series: Series, step: float) -> Iterator[list[tuple[float, float]]]:
    """A series cut where there was nothing, or nothing that is a number."""
    run: list[tuple[float, float]] = []
    for at, value in series.points:
        if math.isnan(value) or (run and at - run[-1][0] > step * 1.5):
            if run:
                yield run
            run = []
        if not math.isnan(value):
            run.append((at, value))
    if run:
        yield run


def _stepped(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """As stairs: each value holds until the next."""
    stairs = [points[0]]
    for (_, before), (x, y) in pairwise(points):
        stairs += [(x, before), (x, y)]
    return stairs


def _legend(canvas: Canvas, box: Box, entries: Sequence[tuple[str, str]]) -> float:
    """Draw a legend at the bottom of the box; returns its height."""
    rows: list[list[tuple[str, str]]] = [[]]
    x = 0.0
    for name, color in entries:
        width = text_width(name, _SMALL) + 26
        if x + width > box.width and rows[-1]:
            rows.append([])
            x = 0.0
        rows[-1].append((name, color))
        x += width
    height = 15.0 * len(rows)
    for number, row in enumerate(rows):
        x, y = box.x, box.y + box.height - height + 15 * number + 12
        for name, color in row:
            canvas.rect(x, y - 6, 12, 4, color, radius=1.5)
            canvas.text(x + 16, y, shortened(name, _SMALL, box.width - 20), size=_SMALL, color=INK)
            x += text_width(name, _SMALL) + 26
    return height


def _timeseries(
    canvas: Canvas, box: Box, panel: dict[str, Any], answers: Sequence[Answer], span: Span
) -> None:
    every = [one for one in named(panel, answers) if any(_runs(one.series, span.step))]
    custom = panel["fieldConfig"]["defaults"]["custom"]
    settings = panel["fieldConfig"]["defaults"]
    used = _legend(canvas, box, [(one.name, one.color) for one in every])
    plot = Box(box.x, box.y, box.width, box.height - used - 3)
    if custom["stacking"]["mode"] == "normal":
        bars = custom["drawStyle"] == "bars"
        _stacked(canvas, plot, every, settings, span.coarser() if bars else span, bars=bars)
        return
    values = [value for one in every for run in _runs(one.series, span.step) for _, value in run]
    low = min((*values, settings.get("min", 0.0)), default=0.0)
    frame = _frame(canvas, plot, low, max((*values, 0.0)) or 1.0, settings, span)
    for one in every:
        for run in _runs(one.series, span.step):
            points = [(frame.x(at), frame.y(value)) for at, value in run]
            if custom["lineInterpolation"] == "stepAfter":
                points = _stepped(points)
            if custom["fillOpacity"]:
                ground = frame.y(0)
                around = [(points[0][0], ground), *points, (points[-1][0], ground)]
                canvas.area(around, one.color, custom["fillOpacity"] / 100)
            canvas.line(points, one.color, custom["lineWidth"])


def _stacked(
    canvas: Canvas, box: Box, every: Sequence[Named], settings: dict[str, Any], span: Span, *, bars: bool
) -> None:
    columns: dict[float, list[tuple[float, float, Named]]] = {}
    for one in every:
        for at, value in one.series.points:
            if not math.isnan(value):
                column = columns.setdefault(at, [])
                base = column[-1][1] if column else 0.0
                column.append((base, base + value, one))
    top = max((column[-1][1] for column in columns.values() if column), default=1.0)
    frame = _frame(canvas, box, 0.0, top or 1.0, settings, span)
    if bars:
        wide = max(2.0, (frame.x(span.start + span.step) - frame.x(span.start)) * 0.8)
        for at, column in columns.items():
            for base, until, one in column:
                if until > base:
                    y = frame.y(until)
                    canvas.rect(frame.x(at) - wide / 2, y, wide, frame.y(base) - y, one.color)
        return
    for one in every:
        layer = [
            (at, base, until)
            for at, column in sorted(columns.items())
            for base, until, whose in column
            if whose is one
        ]
        if not any(until > base for _, base, until in layer):
            continue
        for run in _cut(layer, span.step):
            upper = _stepped([(frame.x(at), frame.y(until)) for at, _, until in run])
            lower = _stepped([(frame.x(at), frame.y(base)) for at, base, _ in run])
            canvas.area([*upper, *reversed(lower)], one.color, settings["custom"]["fillOpacity"] / 100)
            canvas.line(upper, one.color, settings["custom"]["lineWidth"])


def _cut(
    layer: Sequence[tuple[float, float, float]], step: float
) -> Iterator[list[tuple[float, float, float]]]:
    run: list[tuple[float, float, float]] = []
    for point in layer:
        if run and point[0] - run[-1][0] > step * 1.5:
            yield run
            run = []
        run.append(point)
    if run:
        yield run


def _state_timeline(
    canvas: Canvas, box: Box, panel: dict[str, Any], answers: Sequence[Answer], span: Span
) -> None:
    every = named(panel, answers)
    left = box.x + max((text_width(one.name, 11) for one in every), default=0.0) + 8
    width, bottom = box.x + box.width - left, box.y + box.height - 16
    pitch = min(34.0, (bottom - box.y) / max(1, len(every)))

    def to_x(moment: float) -> float:
        return left + (moment - span.start) / (span.end - span.start) * width

    for number, one in enumerate(every):
        y = box.y + number * pitch
        high = pitch * panel["options"]["rowHeight"]
        canvas.text(left - 8, y + high / 2 + 4, one.name, anchor="end")
        canvas.rect(left, y, width, high, "#f3f4f6")
        for run in _runs(one.series, span.step):
            for value, same in groupby(run, key=lambda point: point[1]):
                moments = [at for at, _ in same]
                text, color = _mapped(one.settings, value) or (f"{value:g}", _threshold(one.settings, value))
                x, wide = to_x(moments[0]), to_x(min(moments[-1] + span.step, span.end)) - to_x(moments[0])
                canvas.rect(x, y, wide, high, color)
                if text_width(text, _SMALL) + 6 < wide:
                    canvas.text(
                        x + wide / 2, y + high / 2 + 3.5, text, size=_SMALL, color="#ffffff", anchor="middle"
                    )
    _moments(canvas, to_x, bottom, span, int(width / 64))


def _bargauge(canvas: Canvas, box: Box, panel: dict[str, Any], answers: Sequence[Answer], span: Span) -> None:
    del span
    every = [(one, one.series.points[-1][1]) for one in named(panel, answers)]
    if not every:
        canvas.text(box.x + box.width / 2, box.y + box.height / 2, "none", color=FAINT, anchor="middle")
        return
    left = box.x + max(text_width(one.name, 11) for one, _ in every) + 8
    most = max(value for _, value in every) or 1.0
    pitch = min(34.0, box.height / len(every))
    for number, (one, value) in enumerate(every):
        y, high = box.y + number * pitch, pitch * 0.7
        text = shown(value, one.settings["unit"], one.settings.get("decimals"))
        wide = box.x + box.width - left - 44
        canvas.text(left - 8, y + high / 2 + 4, one.name, anchor="end")
        canvas.rect(left, y, wide, high, "#f3f4f6", radius=2)
        canvas.rect(left, y, wide * value / most, high, one.color, radius=2)
        canvas.text(box.x + box.width, y + high / 2 + 4, text, color=one.color, anchor="end", weight=600)


def _table(canvas: Canvas, box: Box, panel: dict[str, Any], answers: Sequence[Answer], span: Span) -> None:
    del span
    columns, rows = table(panel, answers)
    sort = panel["options"]["sortBy"]
    if sort:
        place = columns.index(sort[0]["displayName"])
        rows.sort(key=lambda row: row[place], reverse=sort[0]["desc"])
    cells = [
        [_cell(panel, column, value) for column, value in zip(columns, row, strict=True)] for row in rows
    ]
    widths = [
        max(text_width(text, 10.5) for text in (column + "  ", *(row[number] for row in cells))) + _PAD
        for number, column in enumerate(columns)
    ]
    share = box.width / sum(widths)
    edges = [box.x]
    for width in widths:
        edges.append(edges[-1] + width * share)
    pitch = 19.0
    for number, texts in enumerate([columns, *cells]):
        y = box.y + number * pitch + 13
        if y > box.y + box.height:
            break
        canvas.line([(box.x, y + 5.5), (box.x + box.width, y + 5.5)], LINE)
        for place, text in enumerate(texts):
            right = place > 0 and not isinstance(rows[0][place], str)
            canvas.text(
                edges[place + 1] if right else edges[place],
                y,
                shortened(text, 10.5, edges[place + 1] - edges[place] - 2),
                size=10.5,
                color=INK if number else FAINT,
                anchor="end" if right else "start",
                weight=400 if number else 600,
            )


def table(panel: dict[str, Any], answers: Sequence[Answer]) -> tuple[list[str], list[list[str | float]]]:
    """Columns and rows of a table after its transformations (joinByField, organize)."""
    steps = {one["id"]: one["options"] for one in panel["transformations"]}
    organize, join = steps["organize"], steps.get("joinByField")
    frames: list[list[dict[str, str | float]]] = []
    for answer in answers:
        value = "Value" if len(answers) == 1 else f"Value #{answer.target['refId']}"
        frames.append([{**one.labels, value: one.points[-1][1]} for one in answer.series])
    rows: list[dict[str, str | float]] = [dict(row) for row in frames[0]]
    if join is not None:
        field = join["byField"]
        for frame in frames[1:]:
            by_field = {row[field]: row for row in frame}
            rows = [{**row, **by_field[row[field]]} for row in rows if row[field] in by_field]
    dropped = {name for name, out in organize["excludeByName"].items() if out}
    order = organize["indexByName"]
    names = [name for name in (rows[0] if rows else {}) if name not in dropped]
    names.sort(key=lambda name: order.get(name, len(order)))
    columns = [organize["renameByName"].get(name, name) for name in names]
    return columns, [[row[name] for name in names] for row in rows]


def _cell(panel: dict[str, Any], column: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    settings = _settings(panel, column)
    return shown(value, settings["unit"], settings.get("decimals"))


_KINDS: Final[dict[str, Callable[[Canvas, Box, dict[str, Any], Sequence[Answer], Span], None]]] = {
    "stat": _stat,
    "timeseries": _timeseries,
    "state-timeline": _state_timeline,
    "bargauge": _bargauge,
    "table": _table,
}
