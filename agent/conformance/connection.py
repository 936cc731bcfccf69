"""Judging single answers: connection, token, conditions, clock, paths and methods."""

from __future__ import annotations

from collections.abc import Iterable

from agent.conformance.answers import Answer
from agent.conformance.verdicts import Ledger


def near_misses(token: str) -> list[str]:
    """Tokens that are almost this one.

    Not altered at its end: the last character of base64 can have bits that mean nothing. Nor by its
    case, which hexadecimal digits may have either way.
    """
    middle = len(token) // 2
    other = "B" if token[middle] in "Aa" else "A"
    found = [token[:middle] + other + token[middle + 1 :]]
    if len(token) > 8:
        found.append(token[:-4])
    return found


def judge_reached(answer: Answer, ledger: Ledger) -> bool:
    """Whether the first GET state was answered as to a gateway whose token core knows."""
    what = f"GET state: {answer}"
    if answer.status in {401, 403}:
        what = f"core refuses the token ({answer.status})"
    if answer.hint and not answer.status:
        what += f" ({answer.hint})"
    if _is_redirect(answer):
        ledger.skipped("connection.reachable", what)
        return False
    if answer.status == 200:
        encoding = answer.headers.get("content-encoding", "identity")[:20]
        ledger.judged("state.gzip", not answer.error, answer.error or f"Content-Encoding is {encoding}")
    return ledger.judged("connection.reachable", answer.status == 200, what) and not answer.error


def judge_redirects(answers: Iterable[Answer], ledger: Ledger) -> None:
    """No answer of the walk was a redirect."""
    redirects = [a.status for a in answers if _is_redirect(a)]
    ledger.judged(
        "connection.no-redirects",
        not redirects,
        f"core redirects ({redirects[0]})" if redirects else "none came",
    )


def judge_refusal(clause: str, what: str, answer: Answer, ledger: Ledger) -> None:
    """A request without a good token was refused; one that a limit was put on tells nothing."""
    if answer.status == 429:
        ledger.skipped(clause, f"{what}: {answer}")
        return
    ledger.judged(clause, answer.status in {401, 403}, f"{what}: {answer}")


def judge_conditional(clause: str, form: str, answer: Answer, ledger: Ledger) -> None:
    """GET state with If-None-Match was answered by 304, or the whole state, as ``clause`` wants."""
    what = f"If-None-Match {form.format('EPOCH:REVISION')}: {answer}"
    if clause == "state.modified":
        ledger.judged(clause, answer.status == 200 and bool(answer.body), what)
    elif answer.status == 304 and answer.body:
        ledger.failed(clause, f"{what} with a body")
    else:
        ledger.judged(clause, answer.status == 304, what)


def judge_running_clock(
    first: tuple[Answer, float | None], second: tuple[Answer, float | None], ledger: Ledger
) -> None:
    """Two states' server_time are as far apart as the requests; whole seconds are good enough."""
    (one, earlier), (two, later) = first, second
    if earlier is None or later is None:
        ledger.skipped("state.server-time-runs", "server_time can't be read")
        return
    passed = (two.sent + two.received - one.sent - one.received) / 2
    uncertain = 1.0 + (two.received - two.sent + one.received - one.sent) / 2
    off = abs(later - earlier - passed)
    seen = f"server_time went on by {later - earlier:.1f} s in {passed:.1f} s"
    ledger.judged("state.server-time-runs", off <= uncertain, seen)


def judge_unknown_path(answer: Answer, ledger: Ledger) -> None:
    """A path that is not of the API."""
    ledger.judged("errors.unknown-path", _is_not_served(answer), str(answer))


def judge_method(what: str, answer: Answer, ledger: Ledger) -> None:
    """A path asked by the wrong method."""
    ledger.judged("errors.method", _is_not_served(answer), f"{what}: {answer}")


def _is_redirect(answer: Answer) -> bool:
    return 300 <= answer.status < 400 and answer.status != 304


def _is_not_served(answer: Answer) -> bool:
    return 400 <= answer.status < 500 or answer.status == 501
