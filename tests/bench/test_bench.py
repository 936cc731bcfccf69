"""The bench itself: what it writes, and that it measures what it says, at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.figures import KINDS, Figure, document, load, percentile, ratio, save, table
from tests.support.netns import Network

ROOT = Path(__file__).parents[2]


def test_every_figure_is_in_the_document_whether_it_was_measured_or_not() -> None:
    written = document({"grant_10k": ratio([0.2, 0.3, 0.4], [0.1, 0.2, 0.3])}, "a machine", 7)
    assert written["figures"].keys() == KINDS.keys()
    assert written["figures"]["grant_10k"]["value"] == 1.5
    assert written["figures"]["fleet_200"]["value"] is None
    assert (written["machine"], written["seed"]) == ("a machine", 7)
    json.dumps(written)


def test_a_figure_over_its_limit_is_marked_for_people() -> None:
    lines = table({"grant_10k": Figure(1.51, {}), "resync_10k": Figure(0.5, {})}).splitlines()
    assert next(line for line in lines if line.startswith("grant_10k")).split()[1] == "1.51!"
    assert next(line for line in lines if line.startswith("resync_10k")).split()[1] == "0.5"


@pytest.mark.parametrize(("percent", "value"), [(50, 2), (75, 3), (76, 4), (99, 4), (100, 4)])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(percent: int, value: int) -> None:
    assert percentile([3, 1, 4, 2], percent) == value


def test_what_a_part_measured_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    assert load(path) == {}
    save({"rss_10k": Figure(70.5, {"peers": 10})}, path)
    assert load(path) == {"rss_10k": Figure(70.5, {"peers": 10})}


def measured(path: Path, *argv: str, only: str = "") -> dict[str, Figure]:
    with Network() as network:
        space = network.namespace("bench")
        env = {**os.environ, "BENCH_ONLY": only}
        subprocess.run(
            space.argv(sys.executable, *argv), cwd=ROOT, check=True, env=env, timeout=110, capture_output=True
        )
    return load(path)


@pytest.mark.netns
@pytest.mark.userspace
def test_the_agent_is_measured_beside_wg(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    only = "cold_sync_10k resync_10k grant_10k adopt_10k"
    figures = measured(path, "-m", "tests.bench.kernel", str(path), "7", "0.003", only=only)
    assert figures.keys() == set(only.split())
    for name, figure in figures.items():
        assert figure.value is not None, f"{name}: {figure.raw}"
    assert figures["resync_10k"].raw["plans_with_set_messages"] == 0


@pytest.mark.netns
def test_a_fleet_is_back_after_core_restarts(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    [figure] = measured(path, "-m", "tests.bench.fleet", str(path), "7", "0.02").values()
    assert figure.value is not None
    assert figure.raw["most_requests"] <= 3
