"""docs/core-api.openapi.yaml is held to the code, both ways."""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import validate

from agent.core.documents import encode_applied, encode_ends, encode_stats, refused_json
from agent.core.messages import decode_event, decode_push, decode_snapshot
from agent.encoding import parse_public_key
from agent.errors import InvalidMessage
from agent.model import (
    Endpoint,
    EndReason,
    Peer,
    PeerStats,
    PeerUpserted,
    Refusal,
    RefusedPeer,
    SessionEnd,
    SessionGranted,
)
from agent.ports import Position
from tests.core.fakes import PSK, FakeInbox, body, key, peer, session, state
from tests.core.test_push import push, revoked, send, signed

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[2] / "docs" / "core-api.openapi.yaml").read_text(encoding="utf-8")
)
NOW = 1_795_489_200.0


def schema(name: str) -> Draft202012Validator:
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    )


def fits(name: str, document: Any) -> bool:
    return bool(schema(name).is_valid(document))


def test_the_document_is_valid_openapi() -> None:
    validate(DOCUMENT)
    for name in DOCUMENT["components"]["schemas"]:
        Draft202012Validator.check_schema(schema(name).schema)


def test_the_documents_example_is_read() -> None:
    content = DOCUMENT["paths"]["/state"]["get"]["responses"]["200"]["content"]
    for example in content["application/json"]["examples"].values():
        schema("State").validate(example["value"])
        snapshot = decode_snapshot(body(example["value"]), 0.0)
        assert snapshot.unreadable == ()
        assert [(listed.fault, listed.session_fault) for listed in snapshot.peers] == [(None, None)]


public_keys = (
    st.binary(min_size=32, max_size=32)
    .filter(any)
    .map(lambda raw: parse_public_key(key(int.from_bytes(raw, "big"))))
)
times = st.just(0.0) | st.floats(1.0, 4e9)
counters = st.integers(0, 2**64)
ids = st.text("abcdefghijklmnopqrstuvwxyz-0123456789", min_size=1, max_size=128)
endpoints = st.builds(
    Endpoint,
    st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16),
    st.integers(1, 65535),
)


@given(
    st.lists(st.builds(RefusedPeer, st.text(max_size=64), st.sampled_from([*Refusal]))),
    st.floats(0, 4e9),
)
def test_applied_as_sent_fits(refused: list[RefusedPeer], now: float) -> None:
    schema("Applied").validate(loads(encode_applied("b7e1", 42, now, refused)))


@given(
    st.lists(
        st.builds(
            PeerStats,
            public_keys,
            st.none() | ids,
            st.none() | endpoints,
            times,
            counters,
            counters,
        )
    )
)
def test_stats_as_sent_fit(peers: list[PeerStats]) -> None:
    sent = encode_stats("b7e1", 42, NOW, peers, version="0.1.0", started_at=NOW)
    schema("Stats").validate(loads(sent))


@given(
    st.lists(
        st.builds(
            SessionEnd,
            ids,
            public_keys,
            st.sampled_from([*EndReason]),
            st.floats(1, 4e9),
            times,
            counters,
            counters,
        ),
        min_size=1,
    )
)
def test_session_ends_as_sent_fit(ends: list[SessionEnd]) -> None:
    schema("SessionEnds").validate(loads(encode_ends(ends)))


def test_every_reason_is_listed() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas["Refusal"]["enum"] == [reason.value for reason in Refusal]
    ends = schemas["SessionEnds"]["properties"]["ends"]["items"]["properties"]
    assert ends["reason"]["enum"] == [reason.value for reason in EndReason]


GOOD_PEERS: list[Any] = [
    peer(),
    peer(session=None, preshared_key=PSK),
    peer(name=7, persistent_keepalive=None, mfa_exempt=True),
    {"public_key": key(3), "allowed_ips": []},
    peer(allowed_ips=["10.8.0.5", "fd00:8::/64", "0.0.0.0/0"], more=1),
    peer(session=session(granted_at="2026-11-24t03:00:00.123456789+01:00")),
]
BAD_PEERS: list[Any] = [
    7,
    {},
    peer(public_key="A" * 43 + "="),
    peer(public_key=key(1)[:-1]),
    peer(public_key="B" * 43 + "="),
    peer(allowed_ips=None),
    peer(allowed_ips=[7]),
    peer(allowed_ips=["fe80::1%eth0"]),
    peer(persistent_keepalive=65536),
    peer(persistent_keepalive="25"),
    peer(mfa_exempt="true"),
    peer(preshared_key=""),
    peer(preshared_key="A" * 43 + "="),
    peer(session={}),
    peer(session=session(preshared_key=None)),
    peer(session=session(granted_at=None)),
    peer(session=session(expires_at="2026-11-24T13:00:00")),
    peer(session=session(id="")),
    peer(session=session(id="a" * 129)),
]


@pytest.mark.parametrize("entry", GOOD_PEERS)
def test_a_peer_that_fits_is_accepted(entry: Any) -> None:
    schema("State").validate(state(entry))
    snapshot = decode_snapshot(body(state(entry)), 0.0)
    assert [(listed.fault, listed.session_fault) for listed in snapshot.peers] == [(None, None)]


@pytest.mark.parametrize("entry", BAD_PEERS)
def test_a_peer_that_does_not_fit_is_refused(entry: Any) -> None:
    assert not fits("Peer", entry)
    snapshot = decode_snapshot(body(state(entry)), 0.0)
    assert snapshot.unreadable or snapshot.peers[0].fault or snapshot.peers[0].session_fault


@pytest.mark.parametrize(
    "changed",
    [
        {"epoch": ""},
        {"epoch": "a b"},
        {"revision": -1},
        {"revision": 2**63},
        {"revision": "42"},
        {"server_time": "2026-11-24T03:00:00"},
        {"peer_count": None},
        {"peers": None},
        {"location": {"id": "7"}},
        {"location": {"id": "7", "mfa_required": 1}},
        {"location": {"id": "", "mfa_required": True}},
        {"interface": []},
        {"interface": {"listen_port": 65536}},
        {"interface": {"mtu": 575}},
        {"interface": {"fwmark": 2**32}},
        {"interface": {"addresses": "10.8.0.1/24"}},
        {"session_policy": {"idle_timeout": 0}},
        {"session_policy": {"liveness": "both"}},
    ],
)
def test_a_state_that_does_not_fit_is_refused(changed: dict[str, Any]) -> None:
    assert not fits("State", state() | changed)
    with pytest.raises(InvalidMessage):
        decode_snapshot(body(state() | changed), 0.0)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"interface": None, "session_policy": None},
        {"interface": {"addresses": None, "listen_port": 0, "mtu": 576, "fwmark": 2**32 - 1}},
        {"session_policy": {"idle_timeout": 1, "connect_timeout": 1.5, "liveness": "core"}},
        {"session_policy": {"max_lifetime": None, "liveness": None}},
        {"revision": 2**63 - 1},
    ],
)
def test_a_state_that_fits_is_accepted(changed: dict[str, Any]) -> None:
    schema("State").validate(state() | changed)
    decode_snapshot(body(state() | changed), 0.0)


GOOD_CHANGES: list[tuple[str, Any]] = [
    *(("peer_upserted", entry) for entry in GOOD_PEERS),
    ("peer_removed", {"public_key": key(1)}),
    ("session_granted", {"public_key": key(1), "session": session()}),
    ("session_revoked", {"public_key": key(1), "session_id": "s-19"}),
    ("location_changed", {"location": state()["location"]}),
    ("location_changed", {name: state()[name] for name in ("location", "interface")}),
]
BAD_CHANGES: list[tuple[str, Any]] = [
    *(("peer_upserted", entry) for entry in BAD_PEERS),
    ("peer_removed", {}),
    ("session_granted", {"public_key": key(1)}),
    ("session_granted", {"public_key": key(1), "session": None}),
    ("session_revoked", {"public_key": key(1)}),
    ("location_changed", {}),
    ("resync", {}),
    ("peer_renamed", peer()),
]


def _refuses(kind: str, data: Any) -> bool:
    try:
        (change,) = decode_push(push({"id": "b7e1:43", "type": kind, "data": data})).changes
    except InvalidMessage:
        return True
    if kind != "resync":
        assert decode_event(kind, "b7e1:43", body(data)) == change
    match change.body:
        case PeerUpserted(Peer(fault=fault, session_fault=session_fault)):
            return fault is not None or session_fault is not None
        case SessionGranted(fault=fault):
            return fault is not None
        case _:
            return False


@pytest.mark.parametrize(("kind", "data"), GOOD_CHANGES)
def test_a_change_that_fits_is_accepted(kind: str, data: Any) -> None:
    document = {"location": "7", "changes": [{"id": "b7e1:43", "type": kind, "data": data}]}
    schema("Push").validate(document)
    assert not _refuses(kind, data)


@pytest.mark.parametrize(("kind", "data"), BAD_CHANGES)
def test_a_change_that_does_not_fit_is_refused(kind: str, data: Any) -> None:
    assert not fits("Change", {"id": "b7e1:43", "type": kind, "data": data})
    assert _refuses(kind, data)


def test_the_pushs_answers_are_documented_and_fit() -> None:
    responses = DOCUMENT["paths"]["/v1/changes"]["post"]["responses"]
    held = Position("b7e1", 42)
    good = push(*revoked(43))
    answers = [
        send(FakeInbox(held), good),
        send(FakeInbox(held), push(*revoked(44))),
        send(FakeInbox(held), b"{}"),
        send(FakeInbox(held), good, {}),
        send(FakeInbox(held), good, signed(good, age=400)),
        send(FakeInbox(held), good, max_body=10),
        send(FakeInbox(), good, location=None),
    ]
    assert [got.status_code for got in answers] == [200, 409, 400, 401, 401, 413, 503]
    for got in answers:
        documented = responses[str(got.status_code)]
        if "$ref" in documented:
            documented = DOCUMENT["components"]["responses"][documented["$ref"].split("/")[-1]]
        name = documented["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        schema(name).validate(got.json())
    assert fits("Refused", refused_json([RefusedPeer(key(1), Refusal.OWN_KEY)]))


def test_every_path_of_the_client_is_documented() -> None:
    core_paths = {path for path in DOCUMENT["paths"] if path != "/v1/changes"}
    assert core_paths == {"/state", "/changes", "/applied", "/stats", "/session-ends"}
