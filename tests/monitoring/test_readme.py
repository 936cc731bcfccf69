"""What docs/monitoring/README.md says of alerts and metrics is what there is.

To renew both tables: RENEW=1 pytest tests/monitoring/test_readme.py
"""

import os
import re
from pathlib import Path

import pytest
import yaml

from tests.support.metric_names import families

FOLDER = Path(__file__).parents[2] / "docs" / "monitoring"
README = FOLDER / "README.md"
OPERATIONS = FOLDER.parent / "operations.md"


def alerts() -> str:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    lines = ["| alert | severity | after | what it means |", "| --- | --- | --- | --- |"]
    for rule in (rule for group in groups for rule in group["rules"]):
        about = re.sub(r"\{\{ \$labels\.instance \}\}", "a gateway", rule["annotations"]["summary"])
        about = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", about)
        about = re.sub(r"\{\{ \$value[^}]*\}\}", "…", about)
        severity, wait = rule["labels"]["severity"], rule.get("for", "at once")
        about = about if about.startswith("wg-agent") else about[0].upper() + about[1:]
        lines.append(f"| `{rule['alert']}` | {severity} | {wait} | {about} |")
    return "\n".join(lines)


def metrics() -> str:
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in sorted(families(), key=lambda family: family.name):
        if family.name.startswith("process_"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = [label for label in family.samples[0].labels if label != "le"]
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(lines)


def with_table(text: str, mark: str, table: str) -> str:
    """The text with the table between its two marks."""
    head, _, rest = text.partition(f"<!-- {mark} -->\n")
    tail = rest.partition(f"<!-- /{mark} -->\n")[2] or rest
    return f"{head}<!-- {mark} -->\n{table}\n<!-- /{mark} -->\n{tail}"


def test_the_tables_of_alerts_and_metrics_are_what_there_is() -> None:
    text = README.read_text()
    wanted = with_table(with_table(text, "alerts", alerts()), "metrics", metrics())
    if os.environ.get("RENEW") == "1":
        README.write_text(wanted)

    assert README.read_text() == wanted


@pytest.mark.skipif(not OPERATIONS.exists(), reason="docs/operations.md is written beside this")
def test_each_alert_has_its_place_in_the_operations_guide() -> None:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    named = {rule["annotations"]["runbook"].partition("#")[2] for group in groups for rule in group["rules"]}

    assert named <= set(re.findall(r'<a id="([\w-]+)">', OPERATIONS.read_text()))


def test_every_file_that_is_named_is_there() -> None:
    links = re.findall(r"\]\(([\w./-]+)\)", README.read_text())
    missing = [link for link in links if not (FOLDER / link).exists()]

    assert set(missing) <= {"../operations.md"}  # written beside this
