"""How values become pixels and words; tests/monitoring/test_dashboard_queries.py draws the whole."""

import math
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pictures.panels import Box, draw, named, table
from tests.pictures.svg import Canvas, shortened, shown, text_width, ticks
from tests.support.dashboard import Answer, Span
from tests.support.prometheus import Series

SPAN = Span(1000.0, 1060.0, 1.0, 1.0)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (0, "s", None, "0 s"),
        (0.0000123, "s", None, "12.3 µs"),
        (0.0123, "s", None, "12.3 ms"),
        (59.5, "s", None, "59.5 s"),
        (0.4, "s", 0, "0 s"),
        (90, "s", None, "1.5 mins"),
        (86_400 * 100, "s", None, "14.3 weeks"),
        (99.6, "suffix: days", 0, "100 days"),
        (1023, "bytes", None, "1023 B"),
        (64 << 20, "bytes", 1, "64.0 MiB"),
        (-1500, "Bps", None, "-1.5 kB/s"),
        (999_999, "Bps", None, "1.0 MB/s"),
        (0.0123, "percentunit", None, "1.2%"),
        (7, "short", None, "7"),
        (7.0, "none", 0, "7"),
    ],
)
def test_values_are_written_in_their_unit(value: float, unit: str, decimals: int | None, text: str) -> None:
    assert shown(value, unit, decimals) == text


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10), st.sampled_from([2, 10]))
def test_an_axis_covers_its_values_and_is_not_crowded(low: float, span: float, most: int, base: int) -> None:
    found = ticks(low, low + span, most, base=base)

    slack = 1e-6 * max(span, abs(low))
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= most + 3


def test_a_text_is_cut_to_its_room() -> None:
    assert shortened("anna-laptop", 10, text_width("anna-laptop", 10)) == "anna-laptop"
    assert shortened("anna-laptop", 10, 40) == "anna-l…"


def panel(
    kind: str, *targets: dict[str, Any], overrides: tuple[Any, ...] = (), **more: Any
) -> dict[str, Any]:
    defaults = {
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "line",
            "fillOpacity": 10,
            "lineInterpolation": "linear",
            "lineWidth": 2,
            "stacking": {"mode": "none"},
        },
        "mappings": [],
        "thresholds": {"steps": [{"color": "green", "value": None}, {"color": "red", "value": 5}]},
        "unit": "short",
        "min": 0,
    }
    return {
        "type": kind,
        "title": "A panel",
        "targets": list(targets),
        "fieldConfig": {"defaults": defaults, "overrides": list(overrides)},
        **more,
    }


def answer(of: dict[str, Any], *series: Series) -> Answer:
    return Answer(of, of["targets"][0], "", list(series))


def drawn(of: dict[str, Any], *series: Series) -> ET.Element:
    canvas = Canvas(300, 200)
    draw(canvas, Box(0, 0, 300, 200), of, [answer(of, *series)], SPAN)
    return ET.fromstring(canvas.document("t"))


def test_a_line_is_cut_where_nothing_is_known() -> None:
    of = panel("timeseries", {"refId": "A", "legendFormat": "{{peer}}"})
    known = [(1000.0 + n, 1.0) for n in (0, 1, 2, 10, 11)]
    gap = (*known, (1012.0, math.nan), (1013.0, 1.0), (1014.0, 2.0))
    lines = [
        line
        for line in drawn(of, Series({"peer": "anna"}, gap)).iter(f"{SVG}polyline")
        if line.get("stroke-width") == "2"
    ]

    assert [len((line.get("points") or "").split()) for line in lines] == [3, 2, 2]


def test_a_name_is_made_of_labels_and_settings_go_by_it() -> None:
    red = {
        "matcher": {"options": "anna (up)"},
        "properties": [{"id": "color", "value": {"fixedColor": "#123456"}}],
    }
    of = panel("timeseries", {"refId": "A", "legendFormat": "{{peer}} ({{ state }})"}, overrides=(red,))
    [one] = named(of, [answer(of, Series({"peer": "anna", "state": "up"}, ((1000.0, 1.0),)))])

    assert (one.name, one.color) == ("anna (up)", "#123456")


def test_a_peers_name_cannot_break_out_of_the_picture() -> None:
    of = panel("bargauge", {"refId": "A", "legendFormat": "{{peer}}"})
    name = '<script>"&'

    said = {
        element.text for element in drawn(of, Series({"peer": name}, ((1000.0, 1.0),))).iter(f"{SVG}text")
    }

    assert name in said


def test_a_stat_shows_the_last_value_in_the_colour_of_its_threshold() -> None:
    of = panel("stat", {"refId": "A", "legendFormat": ""})
    for value, color in ((4.0, "#4f9d5d"), (5.0, "#d64550")):
        colors = {
            rect.get("fill")
            for rect in drawn(of, Series({}, ((1000.0, 9.0), (1001.0, value)))).iter(f"{SVG}rect")
        }
        assert color in colors
    assert "No data" in {text.text for text in drawn(of).iter(f"{SVG}text")}


def test_a_table_joins_what_it_asked_for_and_names_its_columns() -> None:
    of = panel(
        "table",
        {"refId": "A", "legendFormat": ""},
        {"refId": "B", "legendFormat": ""},
        transformations=[
            {"id": "joinByField", "options": {"byField": "peer"}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"job": True},
                    "indexByName": {},
                    "renameByName": {"Value #A": "rate", "Value #B": "sent"},
                },
            },
        ],
    )

    def given_by(target: int, **values: float) -> Answer:
        series = [Series({"peer": peer, "job": "x"}, ((1000.0, value),)) for peer, value in values.items()]
        return Answer(of, of["targets"][target], "", series)

    columns, rows = table(of, [given_by(0, anna=1.0, ben=2.0), given_by(1, anna=3.0)])

    assert (columns, rows) == (["peer", "rate", "sent"], [["anna", 1.0, 3.0]])
