"""A real Prometheus in a namespace, and what it answers."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import yaml

from tests.support.fault_proxy import inside
from tests.support.netns import Namespace
from tests.support.site import until

_PORT: Final = 9090
RULES: Final = Path(__file__).parents[2] / "docs" / "monitoring" / "alerts.yml"


@dataclass(frozen=True, slots=True)
class Series:
    """What a range query gives for one set of labels: Unix seconds and values, NaN as Prometheus has it."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


class Prometheus:
    """Prometheus with the rules of docs/monitoring, in a gateway's namespace; leave the block and it is gone.

    ``interval``: seconds between two scrapes, and between two looks at the rules.
    """

    def __init__(self, space: Namespace, folder: Path, interval: int = 1) -> None:
        self.interval = interval
        self._space = space
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        target = {"job_name": "wg-agent", "static_configs": [{"targets": ["127.0.0.1:9586"]}]}
        config = {
            "global": {
                "scrape_interval": f"{self.interval}s",
                "scrape_timeout": f"{self.interval}s",
                "evaluation_interval": f"{self.interval}s",
            },
            "rule_files": [str(RULES)],
            "scrape_configs": [target],
        }
        path = self._folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self._process = self._space.popen(
            "prometheus",
            f"--config.file={path}",
            f"--storage.tsdb.path={self._folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{_PORT}",
            "--log.level=error",
        )
        until(self._ready, 60, "Prometheus")
        return self

    def _ready(self) -> bool:
        url = f"http://127.0.0.1:{_PORT}/-/ready"
        try:
            return inside(self._space, lambda: httpx.get(url, timeout=5, trust_env=False)).is_success
        except httpx.TransportError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)

    def instant(self, expression: str, at: float) -> list[Series]:
        """The values of an expression at a moment; raises ValueError for one that can't be evaluated."""
        data = self._get("query", {"query": expression, "time": f"{at:.3f}"})
        if data["resultType"] == "scalar":
            return [_series({}, [data["result"]])]
        return [_series(one["metric"], [one["value"]]) for one in data["result"]]

    def ranged(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """Its values from ``start`` to ``end``, every ``step`` seconds; raises ValueError."""
        asked = {"query": expression, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:g}"}
        return [_series(one["metric"], one["values"]) for one in self._get("query_range", asked)["result"]]

    def label_values(self, label: str, selector: str) -> list[str]:
        """The values of a label over the series of a selector."""
        data = self._get(f"label/{label}/values", {"match[]": selector})
        return [str(value) for value in data]

    def _get(self, path: str, asked: dict[str, str]) -> Any:
        url = f"http://127.0.0.1:{_PORT}/api/v1/{path}"
        answer = inside(self._space, lambda: httpx.get(url, params=asked, timeout=20, trust_env=False))
        document = answer.json()
        if document["status"] != "success":
            raise ValueError(f"{asked}: {document['error']}")
        return document["data"]


def _series(labels: dict[str, str], values: list[list[Any]]) -> Series:
    return Series(labels, tuple((float(at), float(value)) for at, value in values))
