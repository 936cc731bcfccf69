"""The dashboard's JSON against what Grafana expects of it: there is no Grafana here to ask."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support import dashboard
from tests.support.grafana import Dashboard
from tests.support.metric_names import metric_names, names_in

BOARD = dashboard.load()
PANELS = dashboard.panels(BOARD)
TITLES = [panel["title"] for panel in PANELS]


def test_the_dashboard_is_what_grafana_takes() -> None:
    Dashboard.model_validate(BOARD)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda board: board.update(schemaVersion=16),
        lambda board: board["panels"][1].update(type="singlestat"),
        lambda board: board["panels"][1].update(tooltip="x"),
        lambda board: board["panels"][1]["fieldConfig"]["defaults"].update(unit="seconds"),
        lambda board: board["panels"][1]["targets"][0].pop("expr"),
        lambda board: board["panels"][1].pop("gridPos"),
    ],
    ids=["old schema", "unknown panel", "unknown field", "unknown unit", "no query", "no place"],
)
def test_what_grafana_does_not_know_is_found_out(spoil: Callable[[dict[str, Any]], object]) -> None:
    board = dashboard.load()
    spoil(board)

    with pytest.raises(ValidationError):
        Dashboard.model_validate(board)


def test_ids_and_titles_are_there_once() -> None:
    for key in ("id", "title"):
        found = [panel[key] for panel in BOARD["panels"] if key == "id" or panel["type"] != "row"]
        assert len(set(found)) == len(found), key


def test_no_panel_covers_another_or_leaves_the_grid() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]

    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_no_room_is_left_between_panels() -> None:
    covered = sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in BOARD["panels"])
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in BOARD["panels"])

    assert covered == 24 * bottom


@pytest.mark.parametrize("panel", PANELS, ids=TITLES)
def test_a_panel_asks_for_what_the_agent_has_and_only_of_the_chosen_gateways(panel: dict[str, Any]) -> None:
    references = [target["refId"] for target in panel["targets"]]
    assert references == list("ABCDEFGH"[: len(references)])
    for target in panel["targets"]:
        asked = names_in(target["expr"])
        assert asked - {"up"} <= metric_names()
        selectors = target["expr"].count('instance=~"$instance"')
        assert selectors >= max(1, len(asked))
        assert target.get("instant", False) != target["range"]
        assert (target.get("format") == "table") == (panel["type"] == "table")


@pytest.mark.parametrize("panel", PANELS, ids=TITLES)
def test_a_variable_that_is_used_is_defined(panel: dict[str, Any]) -> None:
    defined = {variable["name"]: "x" for variable in BOARD["templating"]["list"]}
    builtin = {"__rate_interval": "1m", "__range": "1h", "__interval": "15s"}

    for target in panel["targets"]:
        assert "$" not in dashboard.substitute(target["expr"], defined | builtin)


def test_every_metric_of_the_agent_is_in_the_dashboard_or_an_alert() -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name in names_in(target["expr"])}
    left_out = {
        "wg_agent_applied_revision",  # a number that only core can judge
        "wg_agent_reap_backlog",  # alerts.yml
        "wg_agent_clock_skew_seconds",  # alerts.yml
    }

    own = {name for name in metric_names() if name.startswith(("wg_agent_", "wireguard_"))}
    base = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in own}
    seen = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in shown}
    assert base - seen == left_out
