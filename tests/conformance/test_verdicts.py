"""How verdicts on one clause add up."""

from __future__ import annotations

import pytest

from agent.conformance.clauses import CLAUSES, SECTIONS
from agent.conformance.verdicts import Ledger, Mark, Verdict


def test_every_clause_has_one_place_and_a_remedy() -> None:
    assert len(CLAUSES) == sum(len(section.clauses) for section in SECTIONS)
    for clause in CLAUSES.values():
        assert clause.text.endswith(".")
        assert clause.remedy
        assert clause.remedy[-1] not in ".!"


def test_a_failure_stays_and_a_skip_gives_way() -> None:
    ledger = Ledger()
    assert not ledger
    assert ledger.verdict("state.etag") == Verdict(Mark.SKIP, "not seen")

    ledger.skipped("state.etag", "no state")
    assert ledger
    ledger.skipped("state.etag", "another reason")
    assert ledger.verdict("state.etag") == Verdict(Mark.SKIP, "no state")

    ledger.passed("state.etag", "b7e1:1")
    ledger.passed("state.etag", "b7e1:2")
    ledger.skipped("state.etag", "late")
    assert ledger.verdict("state.etag") == Verdict(Mark.PASS, "b7e1:1 (the first of 2 times)")
    assert not ledger.failures()

    assert not ledger.judged("state.etag", False, "no tag")
    ledger.failed("state.etag", "another failure")
    ledger.passed("state.etag", "b7e1:3")
    assert ledger.verdict("state.etag") == Verdict(Mark.FAIL, "no tag")
    assert ledger.failures("state.etag", "state.epoch")
    assert not ledger.failures("state.epoch")
    assert ledger.counts() == {Mark.PASS: 0, Mark.FAIL: 1, Mark.SKIP: len(CLAUSES) - 1}


def test_a_remedy_is_given_for_failures_alone() -> None:
    ledger = Ledger()
    ledger.passed("state.epoch", "b7e1")
    ledger.failed("state.etag", "missing")
    remedies = {entry["id"]: entry["remedy"] for entry in ledger.document() if entry["remedy"]}
    assert remedies == {"state.etag": CLAUSES["state.etag"].remedy}


def test_secrets_and_floods_of_core_do_not_get_into_a_verdict() -> None:
    ledger = Ledger(["the-token", ""])
    ledger.failed("state.etag", "ETag is the-token, twice the-token" + "x" * 1000)
    mark, seen = ledger.verdict("state.etag")
    assert mark is Mark.FAIL
    assert seen.startswith("ETag is ***, twice ***x")
    assert len(seen) == 300


def test_a_clause_that_is_none_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        Ledger().passed("state.unheard-of", "")
