"""The Grafana dashboard's queries as Grafana would ask them, put to a real Prometheus."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.prometheus import Prometheus, Series

PATH: Final = Path(__file__).parents[2] / "docs" / "monitoring" / "wg-agent.json"
_VALUES: Final = re.compile(r"label_values\((?P<selector>.+), *(?P<label>\w+)\)")
_VARIABLE: Final = re.compile(r"\$(?:\{(?P<braced>\w+)\}|(?P<plain>\w+))")


@dataclass(frozen=True, slots=True)
class Span:
    """What is looked at: from ``start`` to ``end`` in Unix seconds, a value every ``step`` seconds."""

    start: float
    end: float
    step: float
    scrape: float

    def coarser(self) -> Span:
        """For what has a bar an occurrence: not finer than four scrapes, as the panel's own interval says."""
        return Span(self.start, self.end, max(self.step, 4 * self.scrape), self.scrape)

    @property
    def builtins(self) -> dict[str, str]:
        """Grafana's own variables; the rate interval is as its documentation has it."""
        rate = max(self.step + self.scrape, 4 * self.scrape)
        return {
            "__interval": f"{round(self.step)}s",
            "__rate_interval": f"{round(rate)}s",
            "__range": f"{round(self.end - self.start)}s",
        }


def load() -> dict[str, Any]:
    """The dashboard."""
    document: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return document


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something, in their order."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def substitute(text: str, values: dict[str, str]) -> str:
    """Put variables in; KeyError for one that has no value."""
    return _VARIABLE.sub(lambda found: values[found["braced"] or found["plain"]], text)


def variables(dashboard: dict[str, Any], prometheus: Prometheus) -> dict[str, list[str]]:
    """The values that each variable of the kind ``query`` offers, all of those before it chosen."""
    found: dict[str, list[str]] = {}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = _VALUES.fullmatch(substitute(variable["query"]["query"], chosen(found)))
            assert asked is not None, variable["query"]["query"]
            found[variable["name"]] = prometheus.label_values(asked["label"], asked["selector"])
    return found


def chosen(values: dict[str, list[str]]) -> dict[str, str]:
    """All values of each variable chosen, as a regular expression, which is how Grafana puts them in."""
    return {name: "|".join(re.escape(value) for value in some) for name, some in values.items()}


@dataclass(frozen=True, slots=True)
class Answer:
    """A target of a panel, and what Prometheus says to it."""

    panel: dict[str, Any]
    target: dict[str, Any]
    expression: str
    series: list[Series]

    @property
    def known(self) -> int:
        """How many of its values are numbers."""
        return sum(not math.isnan(value) for one in self.series for _, value in one.points)


def ask(dashboard: dict[str, Any], prometheus: Prometheus, span: Span) -> Iterator[Answer]:
    """Put every target of every panel to Prometheus, over the span or at its end as the target has it."""
    picked = chosen(variables(dashboard, prometheus))
    for panel in panels(dashboard):
        for target in panel["targets"]:
            over = span.coarser() if target.get("interval") else span
            values = picked | over.builtins
            expression = substitute(target["expr"], {k: _escaped(v, k) for k, v in values.items()})
            if target.get("instant"):
                series = prometheus.instant(expression, over.end)
            else:
                series = prometheus.ranged(expression, over.start, over.end, over.step)
            yield Answer(panel, target, expression, series)


def _escaped(value: str, name: str) -> str:
    """A regular expression goes into a string of PromQL."""
    return value if name.startswith("__") else value.replace("\\", "\\\\")
