"""Which clause a state breaks: one fault, one clause."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.conformance.answers import Answer
from agent.conformance.clauses import CLAUSES
from agent.conformance.state import Reading, read_state
from agent.conformance.verdicts import Ledger, Mark
from agent.encoding import parse_time
from tests.conformance.site import marked
from tests.core.fakes import PSK, TIME, body, key, peer, session, state

ETAG = {"etag": 'W/"b7e1:42"', "content-type": "application/json; charset=utf-8"}
OTHER_PSK = key(7)


def read(
    content: Any,
    headers: dict[str, str] | None = None,
    *,
    sent_at: float = parse_time(TIME),
    took: float = 0.2,
) -> tuple[Ledger, Reading]:
    ledger = Ledger()
    raw = content if isinstance(content, bytes) else body(content)
    answer = Answer(200, ETAG | (headers or {}), raw, sent_wall=sent_at, sent=5.0, received=5.0 + took)
    return ledger, read_state(answer, ledger)


def two(**second: Any) -> dict[str, Any]:
    other = {"session": session(id="s-20", preshared_key=OTHER_PSK)} | second
    return state(peer(1), peer(2, **other))


def test_a_good_state_keeps_all_that_a_state_can_break() -> None:
    ledger, reading = read(two())

    assert marked(ledger, Mark.FAIL) == {}
    kept = set(marked(ledger, Mark.PASS))
    assert {name for name in CLAUSES if name.startswith("state.")} - kept == {
        "state.not-modified",
        "state.modified",
        "state.server-time-runs",
        "state.never-back",
        "state.gzip",
    }
    assert {"keys.canonical", "keys.preshared", "prefixes.strict", "times.offset"} <= kept
    assert reading.snapshot is not None
    assert str(reading.position) == "b7e1:42"
    assert reading.server_time == parse_time(TIME)


BAD_STATES: list[tuple[Any, str]] = [
    (b"<html>", "state.json"),
    (b"[]", "state.json"),
    (b'{"epoch": NaN}', "state.json"),
    (b"[" * 100_000, "state.json"),
    (two() | {"epoch": "with space"}, "state.epoch"),
    (two() | {"revision": "42"}, "state.revision"),
    (two() | {"server_time": None}, "state.server-time"),
    (two() | {"server_time": "2026-11-24T03:00:00"}, "times.offset"),
    (two() | {"location": {"id": "7"}}, "state.location"),
    (two() | {"location": {"id": 7, "mfa_required": True}}, "state.location"),
    (two() | {"interface": {"mtu": 9}}, "state.interface"),
    (two() | {"session_policy": {"liveness": "both"}}, "state.session-policy"),
    (two() | {"peer_count": 1}, "state.peer-count"),
    (two() | {"peer_count": None}, "state.peer-count"),
    (two() | {"peer_count": True}, "state.peer-count"),
    (two() | {"peers": None}, "state.peers"),
    (two() | {"peers": {}}, "state.peers"),
    (state(peer(1), "a peer"), "state.peers"),
    (two(persistent_keepalive=-1), "state.peers"),
    (two(mfa_exempt="no"), "state.peers"),
    (two(allowed_ips=None), "state.peers"),
    (two(allowed_ips=[7]), "state.peers"),
    (two(allowed_ips=["10.8.1.1/24"]), "prefixes.strict"),
    (two(allowed_ips=["::ffff:10.8.1.1"]), "prefixes.strict"),
    (two(public_key=key(2)[:-2] + "B="), "keys.canonical"),
    (two(public_key="A" * 43 + "="), "keys.canonical"),
    (two(public_key=[key(2)]), "keys.canonical"),
    (two(public_key={"base64": key(2)}), "keys.canonical"),
    (two(preshared_key="A" * 43 + "="), "keys.preshared"),
    (two(session=session(id="s-20", preshared_key="")), "keys.preshared"),
    (two(session={"id": "s-20", "granted_at": TIME, "expires_at": TIME}), "state.sessions"),
    (two(session=session(id="", preshared_key=OTHER_PSK)), "state.sessions"),
    (two(session="s-20"), "state.sessions"),
    (two(session=session(id="s-20", preshared_key=OTHER_PSK, granted_at=None)), "state.sessions"),
    (two(session=session(id="s-20", preshared_key=OTHER_PSK, expires_at=TIME)), "state.sessions"),
    (
        two(session=session(id="s-20", preshared_key=OTHER_PSK, expires_at="2026-11-24T13:00:00")),
        "times.offset",
    ),
    (two(public_key=key(1), session=None), "state.one-entry"),
    (two(allowed_ips=["10.8.0.1/32"]), "state.one-owner"),
    (two(allowed_ips=["10.8.0.0/24"]), "state.one-owner"),
    (two(session=session()), "session.id-is-new"),
]


@pytest.mark.parametrize(("content", "clause"), BAD_STATES)
def test_a_fault_of_a_state_breaks_its_clause_alone(content: Any, clause: str) -> None:
    ledger, _ = read(content)

    failed = marked(ledger, Mark.FAIL)
    assert set(failed) == {clause}
    assert PSK not in failed[clause]


def test_an_object_that_repeats_a_key_breaks_one_clause_wherever_it_stands() -> None:
    text = json.dumps(two())
    for place in ('"mfa_exempt": false', '"epoch": "b7e1"', '"id": "7"'):
        ledger, _ = read(text.replace(place, f"{place}, {place}", 1).encode())
        assert set(marked(ledger, Mark.FAIL)) == {"json.no-repeated-keys"}


@pytest.mark.parametrize(
    ("headers", "clause"),
    [
        ({"content-type": "text/html"}, "state.json"),
        ({"etag": '"b7e1:41"'}, "state.etag"),
        ({"etag": "b7e1:42"}, "state.etag"),
        ({"etag": ""}, "state.etag"),
    ],
)
def test_a_header_that_is_wrong_breaks_its_clause_alone(headers: dict[str, str], clause: str) -> None:
    assert set(marked(read(two(), headers)[0], Mark.FAIL)) == {clause}


def test_a_header_that_is_wrong_is_shown() -> None:
    for headers, clause, seen in (
        ({"content-type": "text/html"}, "state.json", "Content-Type is text/html"),
        ({"content-type": ""}, "state.json", "Content-Type is missing"),
        ({"etag": '"b7e1:41"'}, "state.etag", 'ETag is "b7e1:41", the body b7e1:42'),
        ({"etag": ""}, "state.etag", "ETag is missing, the body b7e1:42"),
    ):
        assert read(two(), headers)[0].verdict(clause).seen == seen


@pytest.mark.parametrize(("off", "kept"), [(299.0, True), (-299.0, True), (301.0, False), (-3600.0, False)])
def test_a_clock_may_differ_by_what_signatures_bear(off: float, kept: bool) -> None:
    ledger, _ = read(two(), sent_at=parse_time(TIME) - 0.1 + off)
    assert (ledger.mark("state.server-time") is Mark.PASS) is kept


@pytest.mark.parametrize(("off", "kept"), [(-305.0, True), (285.0, True), (295.0, False), (-315.0, False)])
def test_cores_clock_is_taken_to_have_been_read_halfway_through_the_request(off: float, kept: bool) -> None:
    ledger, _ = read(two(), sent_at=parse_time(TIME) + off, took=20.0)
    assert (ledger.mark("state.server-time") is Mark.PASS) is kept


def test_faulty_parts_are_replaced_by_sound_ones_and_the_rest_is_read_on() -> None:
    _, reading = read(two() | {"peer_count": 7, "location": None})
    assert reading.snapshot is not None
    assert len(reading.snapshot.peers) == 2
    assert str(reading.position) == "b7e1:42"

    _, reading = read(two() | {"revision": -1})
    assert reading.position is None
    assert reading.server_time == parse_time(TIME)


def test_what_the_agents_reader_refuses_never_passes() -> None:
    # More addresses than an interface may have: no clause of its own says how many.
    ledger, _ = read(two() | {"interface": {"addresses": ["10.8.0.1/24"] * 300}})
    assert set(marked(ledger, Mark.FAIL)) == {"state.interface"}
    assert ledger.mark("state.readable") is Mark.SKIP

    dense = b'{"more": [' + b"1," * 600_000 + b"1]," + body(two())[1:]
    ledger, _ = read(dense)
    assert set(marked(ledger, Mark.FAIL)) == {"state.readable"}
