"""What single answers say of a clause."""

from __future__ import annotations

import base64

import pytest

from agent.conformance.answers import Answer
from agent.conformance.connection import (
    judge_conditional,
    judge_method,
    judge_reached,
    judge_redirects,
    judge_refusal,
    judge_running_clock,
    judge_unknown_path,
    near_misses,
)
from agent.conformance.verdicts import Ledger, Mark


@pytest.mark.parametrize(
    ("answer", "reached", "mark", "seen"),
    [
        (Answer(200), True, Mark.PASS, "GET state: core answered 200"),
        (Answer(200, error="the answer is cut"), False, Mark.PASS, "GET state: the answer is cut"),
        (Answer(401), False, Mark.FAIL, "core refuses the token (401)"),
        (Answer(403), False, Mark.FAIL, "core refuses the token (403)"),
        (Answer(404), False, Mark.FAIL, "GET state: core answered 404"),
        (Answer(307), False, Mark.SKIP, "GET state: core answered 307"),
        (Answer(304), False, Mark.FAIL, "GET state: core answered 304"),
        (
            Answer(0, error="core can't be reached", hint="is core running?"),
            False,
            Mark.FAIL,
            "GET state: core can't be reached (is core running?)",
        ),
    ],
)
def test_core_is_reached_by_a_state_with_the_token(
    answer: Answer, reached: bool, mark: Mark, seen: str
) -> None:
    ledger = Ledger()
    assert judge_reached(answer, ledger) is reached
    assert ledger.verdict("connection.reachable") == (mark, seen)


@pytest.mark.parametrize(("status", "mark"), [(301, Mark.FAIL), (308, Mark.FAIL), (304, Mark.PASS)])
def test_no_answer_may_be_a_redirect(status: int, mark: Mark) -> None:
    ledger = Ledger()
    judge_redirects([Answer(200), Answer(status)], ledger)
    assert ledger.mark("connection.no-redirects") is mark


@pytest.mark.parametrize(
    ("status", "mark"),
    [
        (401, Mark.PASS),
        (403, Mark.PASS),
        (400, Mark.FAIL),
        (200, Mark.FAIL),
        (0, Mark.FAIL),
        (429, Mark.SKIP),
    ],
)
def test_a_token_is_refused_as_such(status: int, mark: Mark) -> None:
    ledger = Ledger()
    judge_refusal("auth.wrong-token", "GET state", Answer(status), ledger)
    assert ledger.mark("auth.wrong-token") is mark


@pytest.mark.parametrize("token", ["a", "Bearer-1", "0123456789abcdef", "abc" * 20, "A" * 43, "a.b.c" * 9])
def test_a_near_miss_is_no_token_for_who_reads_tokens_as_bytes(token: str) -> None:
    misses = near_misses(token)
    assert len(set(misses)) == len(misses) == (2 if len(token) > 8 else 1)
    for miss in misses:
        assert miss.lower() != token.lower()
        assert _lenient(miss) != _lenient(token)


def _lenient(text: str) -> bytes:
    """What base64 holds for who does not look at the bits that are too many."""
    return base64.urlsafe_b64decode(text.replace(".", "") + "==") if len(text) % 4 != 1 else text.encode()


@pytest.mark.parametrize(
    ("clause", "answer", "kept"),
    [
        ("state.not-modified", Answer(304), True),
        ("state.not-modified", Answer(304, body=b"{}"), False),
        ("state.not-modified", Answer(200, body=b"{}"), False),
        ("state.modified", Answer(200, body=b"{}"), True),
        ("state.modified", Answer(200), False),
        ("state.modified", Answer(304), False),
    ],
)
def test_a_condition_is_answered_by_what_is_current(clause: str, answer: Answer, kept: bool) -> None:
    ledger = Ledger()
    judge_conditional(clause, 'W/"{}"', answer, ledger)
    assert (ledger.mark(clause) is Mark.PASS) is kept
    assert ledger.verdict(clause).seen.startswith('If-None-Match W/"EPOCH:REVISION"')


@pytest.mark.parametrize(
    ("went_on", "took", "mark"),
    [
        (2.2, 0.0, Mark.PASS),
        (3.0, 0.0, Mark.PASS),  # whole seconds
        (1.3, 0.0, Mark.PASS),
        (0.0, 0.0, Mark.FAIL),
        (4.0, 0.0, Mark.FAIL),
        (4.0, 1.0, Mark.PASS),  # what the answers took is uncertain
        (None, 0.0, Mark.SKIP),
    ],
)
def test_server_time_runs_as_time_does(went_on: float | None, took: float, mark: Mark) -> None:
    ledger = Ledger()
    first = Answer(200, sent=10.0, received=10.0 + took)
    second = Answer(200, sent=12.2, received=12.2 + took)
    later = None if went_on is None else 500.0 + went_on
    judge_running_clock((first, 500.0), (second, later), ledger)
    assert ledger.mark("state.server-time-runs") is mark


@pytest.mark.parametrize(
    ("status", "kept"),
    [
        (404, True),
        (405, True),
        (400, True),
        (501, True),
        (200, False),
        (302, False),
        (500, False),
        (0, False),
    ],
)
def test_what_is_not_of_the_api_is_refused(status: int, kept: bool) -> None:
    ledger = Ledger()
    judge_unknown_path(Answer(status), ledger)
    judge_method("POST state", Answer(status), ledger)
    assert (ledger.mark("errors.unknown-path") is Mark.PASS) is kept
    assert (ledger.mark("errors.method") is Mark.PASS) is kept
