"""What the documentation names is there: files, anchors, keys, metrics, commands, reasons, alerts."""

import argparse
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml

from agent import audit, health, patience, trail, writer
from agent.__main__ import _parser
from agent.config import KEYS, SECTIONS, Sessions
from agent.core import messages
from agent.metrics import Metrics
from agent.model import EndReason, Refusal
from agent.plan import DriftKind
from agent.sandbox.config import Config as SandboxConfig
from tests.docs.markdown import ROOT, Document, documents, parse, slug

DOCUMENTS = documents()
ALERTS = ROOT / "docs/monitoring/alerts.yml"
EACH = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS.keys())
_FILE = re.compile(
    r"(?<![\w/-])(?:docs|tests|agent|systemd|requirements|\.ci)/[\w./@-]*\w|[A-Z]+\.md|config\.example\.toml"
)
_METRIC = re.compile(r"\b(?:wg_agent|wireguard)_[a-z_]+\b")
_OURS = re.compile(r"wg_agent_(wg\d+|trial)\b")
"""nftables tables, whose names begin as the metrics' do."""
LABELS = {"defguard.gateway", "defguard.ca", "defguard.core"}
"""Of the metric of certificates."""
_FOREIGN = {"wireguard_go", "wireguard_exporter"}


def _commands() -> set[str]:
    [commands] = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return set(commands.choices)


COMMANDS = _commands()


@EACH
def test_links_lead_to_what_is_there(document: Document) -> None:
    for number, target in document.links:
        if re.match(r"[a-z+]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document.name).parent / path if path else ROOT / document.name
        assert file.exists(), f"{document.name}:{number}: there is no {target}"
        if anchor:
            name = str(file.resolve().relative_to(ROOT))
            assert anchor in DOCUMENTS[name].anchors, f"{document.name}:{number}: there is no {target}"


@EACH
def test_files_that_are_named_are_there(document: Document) -> None:
    for number, span in document.spans:
        for name in _FILE.findall(span):
            assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), (
                f"{document.name}:{number}: there is no file {name}"
            )


@EACH
def test_metrics_that_are_named_are_exported(document: Document) -> None:
    known = _metric_names()
    for number, line in enumerate(document.text.splitlines(), 1):
        for name in _METRIC.findall(_OURS.sub("", line)):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in known or base in known or name.endswith("_") or name in _FOREIGN, (
                f"{document.name}:{number}: agent/metrics.py has no {name}"
            )


def _metric_names() -> set[str]:
    metrics = Metrics("wg0", "1")
    text = metrics._render(()).decode()
    return set(re.findall(r"(?m)^# TYPE (\S+) ", text))


@EACH
def test_keys_that_are_named_are_in_the_model(document: Document) -> None:
    if document.name == "docs/ARCHITECTURE.md":
        return  # sessions.begin and such are functions there
    credentials = {key.removesuffix("_file") for key in KEYS if key.endswith("_file")}
    for number, span in document.spans:
        for dotted in re.findall(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.\w+(?![\w/.])", span):
            section, _, key = dotted.partition(".")
            if dotted in LABELS or (key in {"py", "pem", "sock", "toml"} and dotted not in credentials):
                continue
            assert dotted in KEYS or dotted in credentials, (
                f"{document.name}:{number}: the configuration has no {dotted} in [{section}]"
            )


@EACH
def test_toml_that_is_shown_is_a_configuration(document: Document) -> None:
    for block in document.blocks:
        if block.language != "toml":
            continue
        shown = tomllib.loads(re.sub(r"(?m)^#(\w+ = )", r"\1", block.text))
        if "gateways" in shown:
            msgspec.convert({"database": "core.db", **shown}, SandboxConfig)
            continue
        for section, values in shown.items():
            assert section in SECTIONS, f"{block.where}: there is no section [{section}]"
            for key in values:
                assert key in SECTIONS[section].model_fields, f"{block.where}: there is no {section}.{key}"


@EACH
def test_commands_that_are_named_are_there(document: Document) -> None:
    texts = [span for _, span in document.spans]
    texts += [block.text for block in document.blocks if block.language in {"sh", "console"}]
    for text in texts:
        for name in re.findall(r"(?m)^(?:\$ |sudo )?wg-agent (?:-[ic] \S+ )?([a-z][a-z-]+)", text):
            assert name in COMMANDS, f"{document.name}: wg-agent has no command {name}"
        for target in re.findall(r"(?m)^make ([a-z]+)", text):
            assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), (
                f"{document.name}: the Makefile has no {target}"
            )


def test_every_refusal_has_its_place_in_troubleshooting() -> None:
    troubleshooting = DOCUMENTS["docs/troubleshooting.md"]

    for reason in Refusal:
        assert reason.value in {heading.title for heading in troubleshooting.headings}
        assert troubleshooting.part(reason.value).strip(), reason


@pytest.mark.parametrize(
    ("anchor", "values"),
    [("disconnected-too-early", list(EndReason)), ("drift-again-and-again", list(DriftKind))],
)
def test_every_reason_has_its_row_in_troubleshooting(anchor: str, values: list[str]) -> None:
    part = DOCUMENTS["docs/troubleshooting.md"].part(anchor)
    firsts = " ".join(line.split("|")[1] for line in part.splitlines() if line.startswith("|"))

    for value in values:
        assert f"`{value}`" in firsts, value


def test_every_reason_not_to_be_ready_has_its_row() -> None:
    source = (ROOT / "agent/health.py").read_text()
    [body] = re.findall(r"def is_ready.*?def _line", source, re.DOTALL)
    part = DOCUMENTS["docs/troubleshooting.md"].part("readyz-is-503")

    reasons = re.findall(r'return (?:False, )?f?"([^"{]+)', body)
    assert len(reasons) == 5
    for reason in reasons:
        assert f"`{reason.strip()}" in part, reason


def test_times_are_those_of_the_unit_and_of_the_configuration() -> None:
    unit = dict(re.findall(r"(?m)^(\w+Sec)=(\d+)$", (ROOT / "systemd/wg-agent@.service").read_text()))
    operations = DOCUMENTS["docs/operations.md"].text
    troubleshooting = DOCUMENTS["docs/troubleshooting.md"].text

    assert f"clock tick has not got through for {unit['WatchdogSec']} s" in operations
    assert f"After {unit['TimeoutStartSec']} s systemd gives up" in troubleshooting
    assert f"acts\nafter {unit['WatchdogSec']}" in troubleshooting
    assert (health.STALLED, "has not got through for ten seconds" in troubleshooting) == (10, True)
    assert (Sessions().agent_lease, "(five minutes unless configured" in operations) == (300, True)


def test_sizes_in_the_architecture_are_those_of_the_code() -> None:
    text = DOCUMENTS["docs/ARCHITECTURE.md"].text

    assert f"the last {trail.ROOM:,} occurrences" in text
    assert f"more than {writer.SLICE} updates and adds" in text
    assert (writer.HANDFUL, "a few at a time, eight at most" in text) == (8, True)
    assert (audit._ONE_BY_ONE, "fifty lines a moment" in text) == (50, True)
    assert (patience.LOOK_UP, "longer than a quarter of a second there" in text) == (0.25, True)
    assert (patience.SLOW, "longer than a second is named" in text) == (1, True)
    assert (messages._PORTION, "a thousand entries at a time" in text) == (1000, True)


def test_every_alert_leads_to_a_section_that_says_what_to_do() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    alerts = [rule for rule in rules if "alert" in rule]

    assert alerts
    for alert in alerts:
        links = [value for name, value in alert["annotations"].items() if "runbook" in name]
        assert links, alert["alert"]
        [(name, _, anchor)] = [link[link.index("docs/") :].partition("#") for link in links]
        assert anchor in DOCUMENTS[name].anchors, f"{name} has no #{anchor} for {alert['alert']}"
        assert "**Do:**" in DOCUMENTS[name].part(anchor), f"{name}#{anchor} does not say what to do"


def test_no_section_is_about_an_alert_that_is_gone() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    names = {rule.get("alert") for rule in rules}

    for heading in DOCUMENTS["docs/operations.md"].headings:
        if re.fullmatch(r"WgAgent\w+", heading.title):
            assert heading.title in names, f"docs/operations.md:{heading.line}: there is no such alert"


# The means themselves.


@pytest.mark.parametrize(
    ("title", "anchor"),
    [("Rotating core's token", "rotating-cores-token"), ("[core]", "core"), ("A `b` (c), d", "a-b-c-d")],
)
def test_anchors_are_githubs(title: str, anchor: str) -> None:
    assert slug(title) == anchor


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (test_links_lead_to_what_is_there, "[a](nowhere.md)"),
        (test_links_lead_to_what_is_there, "[a](#nowhere)"),
        (test_files_that_are_named_are_there, "`docs/nowhere.md`"),
        (test_metrics_that_are_named_are_exported, "`wg_agent_nothing_total`"),
        (test_keys_that_are_named_are_in_the_model, "`core.nothing`"),
        (test_toml_that_is_shown_is_a_configuration, "```toml\n[core]\nnothing = 1\n```"),
        (test_commands_that_are_named_are_there, "`wg-agent nothing`"),
        (test_commands_that_are_named_are_there, "```sh\nmake nothing\n```"),
    ],
)
def test_what_is_not_there_is_found(check: Callable[[Document], None], text: str) -> None:
    with pytest.raises(AssertionError, match=r"nothing|nowhere"):
        check(parse("README.md", text))


def test_a_section_ends_where_the_next_of_its_level_begins() -> None:
    document = parse("x.md", "# a\n## b\nin b\n### c\nin c\n```sh\n# no heading\n```\n## d\nin d\n")

    assert document.part("b") == "in b\n### c\nin c\n```sh\n# no heading\n```"
    assert [heading.anchor for heading in document.headings] == ["a", "b", "c", "d"]
    assert Path(document.name) == Path("x.md")
