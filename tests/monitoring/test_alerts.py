"""The alert rules, by Prometheus's own tools, and that what they ask for is there."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.metric_names import metric_names, names_in

FOLDER = Path(__file__).parents[2] / "docs" / "monitoring"
RULES = FOLDER / "alerts.yml"
TESTS = FOLDER / "alerts_test.yml"

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (prometheus)")


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load(RULES.read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


ALERTS = [rule["alert"] for rule in rules()]


def kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def run(*argv: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["promtool", *map(str, argv)], capture_output=True, text=True, check=False)


@promtool
@pytest.mark.parametrize("what", ["rules alerts.yml", "config prometheus.yml"])
def test_promtool_takes_rules_and_example(what: str) -> None:
    kind, file = what.split()
    checked = run("check", kind, FOLDER / file)

    assert checked.returncode == 0, checked.stderr


@promtool
def test_the_rules_pass_their_tests() -> None:
    tested = run("test", "rules", TESTS)

    assert tested.returncode == 0, tested.stdout + tested.stderr


def alone(folder: Path, rule: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    """Only this rule, with the tests of its alert."""
    (folder / RULES.name).write_text(yaml.safe_dump({"groups": [{"name": "wg-agent", "rules": [rule]}]}))
    document = yaml.safe_load(TESTS.read_text())
    about = f'alertname="{rule["alert"]}"'
    for test in document["tests"]:
        test["promql_expr_test"] = [one for one in test.get("promql_expr_test", ()) if about in one["expr"]]
        test.pop("alert_rule_test", None)
    document["tests"] = [test for test in document["tests"] if test["promql_expr_test"]]
    (folder / TESTS.name).write_text(yaml.safe_dump(document))
    return run("test", "rules", folder / TESTS.name)


@promtool
@pytest.mark.parametrize("rule", rules(), ids=ALERTS)
def test_an_alert_that_never_fires_or_does_not_wait_is_found_out(
    rule: dict[str, Any], tmp_path: Path
) -> None:
    never = alone(tmp_path, rule | {"expr": f"({rule['expr']}) and on () vector(0) > 0"})
    hasty = alone(tmp_path, {key: value for key, value in rule.items() if key != "for"})

    assert alone(tmp_path, rule).returncode == 0
    assert never.returncode != 0
    assert (hasty.returncode != 0) == ("for" in rule)


def test_each_alert_is_tested_to_fire_not_to_fire_before_and_to_end() -> None:
    asked: dict[str, list[bool]] = {alert: [] for alert in ALERTS}
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        for one in test.get("promql_expr_test", ()):
            named = re.search(r'alertname="(\w+)"', one["expr"])
            if named:
                asked[named[1]].append(bool(one["exp_samples"]))

    for alert, fires in asked.items():
        assert True in fires, f"{alert} is not tested to fire"
        assert not fires[0], f"{alert} is not tested just below its threshold"
        assert not fires[-1], f"{alert} is not tested to end"


@pytest.mark.parametrize("rule", rules(), ids=ALERTS)
def test_each_alert_says_what_happened_what_to_do_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("WgAgent")
    assert rule["labels"]["severity"] in {"critical", "warning"}
    told = rule["annotations"]
    assert told.keys() == {"summary", "description", "runbook"}
    assert "{{ $labels.instance }}" in told["summary"]
    assert len(told["description"]) > 120
    assert told["runbook"] == f"docs/operations.md#{kebab(rule['alert'])}"


def test_names_are_alike_only_once() -> None:
    assert len(set(ALERTS)) == len(ALERTS)


@pytest.mark.parametrize("rule", rules(), ids=ALERTS)
def test_every_metric_of_a_rule_is_one_of_the_agents(rule: dict[str, Any]) -> None:
    asked = names_in(rule["expr"]) - {"up"}

    assert asked <= metric_names()
    assert asked or "up{" in rule["expr"]
