"""What core is sent as reports: good ones fit the document of the core API, bad ones break it in one way."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from typing import Any

import pytest

from agent.conformance.answers import Answer
from agent.conformance.clauses import SECTIONS
from agent.conformance.reports import Report, Reporter, cut_gzip, judge_bad, judge_good
from agent.conformance.verdicts import Ledger, Mark
from agent.encoding import format_key
from agent.fence import Position
from agent.model import PublicKey
from tests.core.test_openapi import fits, schema
from tests.support.builders import CORE, key

SCHEMAS = {"applied": "Applied", "stats": "Stats", "session-ends": "SessionEnds"}
STRANGER = PublicKey(b"\xfe" * 32)
KNOWN = ((key(1), "s-1"), (key(2), None))


def reporter(*known: tuple[PublicKey, str | None]) -> Reporter:
    return Reporter(Position("b7e1", 42), STRANGER, known, CORE)


def good(clause: str, *known: tuple[PublicKey, str | None]) -> list[Report]:
    return [report for report in reporter(*known).good() if report.clause == clause]


def bad(clause: str) -> list[Report]:
    found = [report for report in reporter().bad() if report.clause == clause]
    assert found
    return found


def document(report: Report) -> Any:
    return json.loads(report.body)


def test_what_core_has_to_take_fits_the_core_api_and_names_what_is_held() -> None:
    for report in reporter(*KNOWN).good():
        told = document(report)
        schema(SCHEMAS[report.path]).validate(told)
        if report.path != "session-ends":
            assert (told["epoch"], told["revision"]) == ("b7e1", 42)


def test_every_clause_about_reports_has_its_report_but_the_one_that_an_exercise_is_needed_for() -> None:
    (clauses,) = ({clause.id for clause in part.clauses} for part in SECTIONS if part.title == "Reports")
    assert {report.clause for report in reporter().good()} == clauses - {"ends.taken"}


def test_stats_are_of_listed_peers_with_their_sessions_and_of_a_stranger_where_nobody_is_listed() -> None:
    (stats,) = good("stats.accepted", *KNOWN)
    told = [(peer["public_key"], peer["session_id"]) for peer in document(stats)["peers"]]
    assert told == [(format_key(key(1)), "s-1"), (format_key(key(2)), None)]
    assert stats.what == "2 peers"
    for report in (*good("stats.unknown-peer", *KNOWN), *good("stats.accepted")):
        assert [peer["public_key"] for peer in document(report)["peers"]] == [format_key(STRANGER)]


def test_a_repetition_is_byte_for_byte_what_was_sent_before() -> None:
    for first, again in (("applied.accepted", "applied.repeated"), ("ends.accepted", "ends.idempotent")):
        assert [report.body for report in good(first)] == [report.body for report in good(again)]


def test_one_applied_refuses_a_peer_without_a_key_and_the_last_refuses_nobody() -> None:
    (refusing,) = good("applied.refused")
    assert document(refusing)["refused"] == [{"public_key": "not a key", "reason": "invalid_public_key"}]
    applied = [report for report in reporter().good() if report.path == "applied"]
    assert document(applied[-1])["refused"] == []


@pytest.mark.parametrize(
    ("clause", "same"), [("stats.gzip", "stats.accepted"), ("ends.gzip", "ends.accepted")]
)
def test_what_comes_in_gzip_is_a_report_of_more_than_8_kib(clause: str, same: str) -> None:
    (packed,), (plain,) = good(clause), good(same)
    assert packed.headers == {"Content-Encoding": "gzip"}
    assert gzip.decompress(packed.content) == packed.body
    assert len(packed.body) > 8192
    assert document(packed) == document(plain)
    assert (plain.headers, plain.content) == ({}, plain.body)
    with pytest.raises(EOFError):
        gzip.decompress(cut_gzip(packed))


def test_unknown_members_stand_in_the_report_and_in_each_entry_of_it() -> None:
    more = good("reports.unknown-fields-ignored", *KNOWN)
    assert [report.path for report in more] == ["stats", "session-ends", "applied"]
    for report in more:
        told = document(report)
        entries = [entry for value in told.values() if isinstance(value, list) for entry in value]
        assert "conformance" in told
        assert all("conformance" in entry for entry in entries)
        assert bool(entries) == (report.path != "applied")


def test_a_malformed_report_is_no_json_or_does_not_fit_the_core_api() -> None:
    for report in bad("json.malformed-request"):
        try:
            told = document(report)
        except ValueError:
            continue
        assert not fits(SCHEMAS[report.path], told), report.what
    ways = Counter(report.path for report in bad("json.malformed-request"))
    assert ways == {"applied": 6, "stats": 5, "session-ends": 5}
    assert len({(report.path, report.body) for report in bad("json.malformed-request")}) == 16


def test_a_revision_that_is_a_string_is_all_that_is_wrong_with_its_report() -> None:
    (report,) = (one for one in bad("json.malformed-request") if "revision that" in one.what)
    told = document(report)
    assert told["revision"] == "42"
    assert fits("Applied", told | {"revision": 42})


def test_a_key_twice_is_all_that_is_wrong_with_its_report() -> None:
    assert [report.path for report in bad("json.repeated-key-refused")] == list(SCHEMAS)
    for report in bad("json.repeated-key-refused"):
        pairs: list[tuple[str, Any]] = json.loads(report.body, object_pairs_hook=list)
        names = [name for name, _ in pairs]
        assert (names.count(names[0]), len(set(names))) == (2, len(names) - 1)
        assert fits(SCHEMAS[report.path], document(report))


def test_a_time_without_an_offset_is_all_that_is_wrong_with_its_report() -> None:
    assert [report.path for report in bad("times.offset-required")] == list(SCHEMAS)
    for report in bad("times.offset-required"):
        assert not fits(SCHEMAS[report.path], document(report))
        with_offset = report.body.replace(b'"2026-11-24T03:00:00"', b'"2026-11-24T03:00:00Z"')
        assert fits(SCHEMAS[report.path], json.loads(with_offset))


@pytest.mark.parametrize("last", range(16))
def test_a_loose_key_has_the_bytes_of_a_good_one_and_is_all_that_is_wrong_with_its_report(last: int) -> None:
    stranger = PublicKey(b"\xfe" * 31 + bytes([last]))
    reports = Reporter(Position("b7e1", 42), stranger, (), CORE).bad()
    loose = [report for report in reports if report.clause == "keys.canonical-required"]
    assert [report.path for report in loose] == ["stats", "session-ends"]
    for report in loose:
        part = "peers" if report.path == "stats" else "ends"
        written = document(report)[part][0]["public_key"]
        assert written != format_key(stranger)
        assert base64.b64decode(written) == stranger
        canonical = report.body.replace(written.encode(), format_key(stranger).encode())
        assert fits(SCHEMAS[report.path], json.loads(canonical))


@pytest.mark.parametrize(("status", "mark"), [(202, Mark.PASS), (200, Mark.FAIL), (0, Mark.FAIL)])
def test_a_report_is_taken_by_202_alone(status: int, mark: Mark) -> None:
    ledger = Ledger()
    judge_good(good("stats.accepted")[0], Answer(status, error="" if status else "no answer"), ledger)
    assert ledger.mark("stats.accepted") is mark


@pytest.mark.parametrize(
    ("status", "mark"),
    [(status, Mark.PASS) for status in (400, 413, 415, 422, 499)]
    # Neither a refused token nor a wrong path, a time-out or a limit says that the body was read.
    + [(status, Mark.FAIL) for status in (401, 403, 404, 405, 408, 429, 202, 399, 500, 0)],
)
def test_a_malformed_report_is_refused_for_its_body_alone(status: int, mark: Mark) -> None:
    ledger = Ledger()
    answer = Answer(status, error="" if status else "no answer")
    judge_bad("json.malformed-request", "a list", answer, ledger)
    assert ledger.mark("json.malformed-request") is mark
