"""What docs/core-api.md shows and says is what the code takes and does."""

from __future__ import annotations

import datetime as dt
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from standardwebhooks.webhooks import Webhook

from agent.__main__ import _parser
from agent.conformance.clauses import CLAUSES, SECTIONS
from agent.conformance.exercise import CANNOT
from agent.conformance.history import STEPS
from agent.conformance.stream import TYPES
from agent.conformance.verdicts import Ledger, Mark
from agent.core.documents import encode_applied
from agent.core.messages import Resync, decode_event, decode_push, decode_snapshot, parse_position
from agent.core.stream import EventParser, Heartbeat, ServerEvent
from agent.model import Change, EndReason, PeerUpserted, SessionGranted
from agent.sandbox import exercise as sandbox_exercise
from agent.sandbox import reports
from tests.core.test_push import SECRET

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "core-api.md").read_text(encoding="utf-8")
OPENAPI: dict[str, Any] = yaml.safe_load((DOCS / "core-api.openapi.yaml").read_text(encoding="utf-8"))
BLOCKS = re.findall(r"^```(\w+) ?([\w-]*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SCHEMAS = {
    "state": "State",
    "applied": "Applied",
    "stats": "Stats",
    "session-ends": "SessionEnds",
    "push": "Push",
    "pushed": "PushAccepted",
}


def blocks(kind: str, name: str = "") -> list[str]:
    return [text for of, called, text in BLOCKS if (of, called) == (kind, name)]


def test_every_json_example_fits_the_normative_document() -> None:
    names = [called for kind, called, _ in BLOCKS if kind == "json"]
    assert sorted(names) == sorted(SCHEMAS)
    for called, schema in SCHEMAS.items():
        (text,) = blocks("json", called)
        reference = {"$ref": f"#/components/schemas/{schema}", "components": OPENAPI["components"]}
        Draft202012Validator(reference).validate(json.loads(text))


def test_the_state_is_read_without_a_fault() -> None:
    (text,) = blocks("json", "state")
    snapshot = decode_snapshot(text.encode(), 0.0)
    assert snapshot.unreadable == ()
    assert [(peer.fault, peer.session_fault) for peer in snapshot.peers] == [(None, None)] * 2
    assert [peer.session is not None for peer in snapshot.peers] == [True, False]


def test_the_stream_shows_every_event_in_turn_and_without_a_fault() -> None:
    (text,) = blocks("sse")
    beat, *events = EventParser().feed(text.encode())
    assert isinstance(beat, Heartbeat)
    read = []
    for event in events:
        assert isinstance(event, ServerEvent)
        read.append(decode_event(event.type, event.id, event.data))
    for change in read:
        match change:
            case Change(body=PeerUpserted(peer)):
                assert (peer.fault, peer.session_fault) == (None, None)
            case Change(body=SessionGranted(grant=grant)):
                assert grant is not None
    assert {event.type for event in events if isinstance(event, ServerEvent)} == TYPES
    assert isinstance(read[-1], Resync)
    positions = [parse_position(event.id) for event in events[:-1] if isinstance(event, ServerEvent)]
    assert all(after == (before[0], before[1] + 1) for before, after in pairwise(positions))


def test_the_push_is_read() -> None:
    (text,) = blocks("json", "push")
    assert len(decode_push(text.encode()).changes) == 1


@pytest.mark.parametrize(
    ("called", "kind"),
    [("applied", reports.Applied), ("stats", reports.Stats), ("session-ends", reports.SessionEnds)],
)
def test_the_reports_are_what_the_sandbox_core_takes(called: str, kind: type) -> None:
    (text,) = blocks("json", called)
    msgspec.json.decode(text, type=kind)


def test_applied_is_shown_as_the_agent_writes_it() -> None:
    (text,) = blocks("json", "applied")
    shown = json.loads(text)
    written = json.loads(encode_applied("b7e1", 43, 1795489260.012, []))
    assert shown | {"refused": []} == written


def test_the_signing_example_makes_what_the_agent_accepts() -> None:
    (code,) = blocks("python")
    names: dict[str, Any] = {}
    exec(code, names)
    body = blocks("json", "push")[0].encode()
    now = dt.datetime.now(dt.UTC)
    headers = names["headers"](SECRET, "msg-1", int(now.timestamp()), body)
    assert headers["webhook-signature"] == Webhook(SECRET).sign("msg-1", now, body.decode())
    Webhook(SECRET).verify(body, headers, json_parse=False)


def test_the_tables_of_events_and_reasons_are_whole() -> None:
    rows = set(re.findall(r"^\| `([\w-]+)`", TEXT, re.MULTILINE))
    assert rows >= TYPES
    assert rows >= {reason.value for reason in EndReason}


def test_the_actions_of_the_exercise_are_those_that_are_asked_for() -> None:
    table = TEXT[TEXT.index("| action |") :]
    actions = re.findall(r"^\| `([\w-]+)[ A-Z]*` \|", table, re.MULTILINE)
    assert actions == [*STEPS, "restart", "new-history"]
    assert f"with {CANNOT} if there is no way" in TEXT
    assert sandbox_exercise.CANNOT == CANNOT


def test_the_sample_is_of_clauses_as_they_are() -> None:
    (text,) = blocks("text")
    titles = {section.title for section in SECTIONS}
    shown = 0
    for line in text.splitlines():
        if found := re.fullmatch(r"  [✓✗-] ([\w.-]+): (.*)", line):
            assert CLAUSES[found[1]].text == found[2]
            shown += 1
        elif line.startswith("      → "):
            assert line[8:] in {clause.remedy for clause in CLAUSES.values()}
        else:
            assert line in titles or line.startswith("      ")
    assert shown == 5
    marks = Ledger().counts()
    assert f"`{marks[Mark.SKIP] - 2} passed, 0 failed, 2 skipped`" in TEXT


def test_the_commands_are_ones_that_the_command_line_knows() -> None:
    joined = TEXT.replace("\\\n", " ")
    commands = re.findall(r"^wg-agent (conformance .*)$", joined, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command))
        assert arguments.command == "conformance"
        assert arguments.core
        assert arguments.token_file
    for option in re.findall(r"`(--[\w-]+)", TEXT):
        assert option in _parser_help()


def _parser_help() -> str:
    (commands,) = [a for a in _parser()._actions if a.dest == "command"]
    parser = (commands.choices or {})["conformance"]  # type: ignore[index]
    return str(parser.format_help())
