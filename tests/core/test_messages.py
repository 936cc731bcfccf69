from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core import messages
from agent.core.messages import Resync, decode_event, decode_push, decode_snapshot
from agent.encoding import format_key, parse_prefix
from agent.errors import InvalidMessage
from agent.model import (
    Change,
    ChangeBody,
    InterfaceSettings,
    Location,
    LocationChanged,
    Peer,
    PeerRemoved,
    PeerUpserted,
    Refusal,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
    Snapshot,
    UnreadablePeer,
)
from tests.core.fakes import PSK, body, key, peer, session, state

ZERO = "A" * 43 + "="


@pytest.fixture(autouse=True, params=[0, 1 << 30], ids=["quickly", "by the standard parser"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule holds however a message is read."""
    monkeypatch.setattr(messages, "_QUICK", request.param)


def decode(document: Any) -> Snapshot:
    return decode_snapshot(body(document), 17.0)


def only(entry: Any) -> Peer:
    snapshot = decode(state(entry))
    assert snapshot.unreadable == ()
    return snapshot.peers[0]


def test_a_snapshot_is_read_whole() -> None:
    snapshot = decode(state(peer(1), peer(2, session=None, preshared_key=PSK)))

    assert (snapshot.epoch, snapshot.revision, snapshot.requested_at) == ("b7e1", 42, 17.0)
    assert snapshot.server_time == 1795489200.0
    assert snapshot.location == Location("7", "hq", mfa_required=True)
    assert [str(a) for a in snapshot.interface.addresses or ()] == ["10.8.0.1/24", "fd00:8::1/64"]
    assert snapshot.session_policy == SessionPolicy(300.0, None, 43200.5, "gateway")
    first, second = snapshot.peers
    assert first.session is not None
    assert format_key(first.session.preshared_key.raw) == PSK
    assert (first.session.granted_at, first.session.expires_at) == (1795489200.0, 1795525200.0)
    assert first.preshared_key is None
    assert second.session is None
    assert second.preshared_key == first.session.preshared_key
    assert (first.fault, second.fault) == (None, None)


def test_absent_and_null_members_leave_it_to_the_configuration() -> None:
    for absent in ({}, {"interface": None, "session_policy": None}):
        document = state() | {"interface": {}, "session_policy": {}} | absent
        assert decode(document).interface == InterfaceSettings()
        assert decode(document).session_policy == SessionPolicy()
    document = state()
    del document["interface"], document["session_policy"]
    assert decode(document).interface == InterfaceSettings()


def test_unknown_fields_are_ignored() -> None:
    assert decode(state(peer(1, colour="red"), weather=None)) == decode(state(peer(1)))


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"epoch": None}, "epoch is missing"),
        ({"epoch": ""}, "epoch"),
        ({"epoch": "a b"}, "epoch"),
        ({"epoch": "é"}, "epoch"),
        ({"epoch": "a\n"}, "epoch"),
        ({"epoch": "a" * 65}, "epoch"),
        ({"epoch": 7}, "epoch"),
        ({"revision": None}, "revision"),
        ({"revision": -1}, "revision"),
        ({"revision": True}, "revision"),
        ({"revision": 1.0}, "revision"),
        ({"revision": "42"}, "revision"),
        ({"revision": 2**63}, "revision"),
        ({"server_time": None}, "server_time"),
        ({"server_time": "2026-11-24T03:00:00"}, "server_time"),
        ({"server_time": 1795489200}, "server_time"),
        ({"server_time": "9999-12-31T23:59:59-23:59"}, "server_time"),
        ({"peer_count": None}, "peer_count is missing"),
        ({"peer_count": 1}, "peer_count"),
        ({"peer_count": False}, "peer_count"),
        ({"peer_count": 0.0}, "peer_count"),
        ({"peers": None}, "peers is missing"),
        ({"peers": {}}, "peers"),
        ({"location": None}, "location is missing"),
        ({"location": []}, "location"),
        ({"location": {"id": "7"}}, "location.mfa_required is missing"),
        ({"location": {"id": "7", "mfa_required": 1}}, "location.mfa_required"),
        ({"location": {"id": "7", "mfa_required": "true"}}, "location.mfa_required"),
        ({"location": {"id": "", "mfa_required": True}}, "location.id"),
        ({"location": {"id": 7, "mfa_required": True}}, "location.id"),
        ({"interface": []}, "interface"),
        ({"interface": {"addresses": "10.8.0.1/24"}}, "interface.addresses"),
        ({"interface": {"addresses": ["10.8.0.300/24"]}}, "interface.addresses"),
        ({"interface": {"addresses": [7]}}, "interface.addresses"),
        ({"interface": {"listen_port": 65536}}, "interface.listen_port"),
        ({"interface": {"listen_port": "51820"}}, "interface.listen_port"),
        ({"interface": {"mtu": 100}}, "interface.mtu"),
        ({"interface": {"fwmark": -1}}, "interface.fwmark"),
        ({"session_policy": "strict"}, "session_policy"),
        ({"session_policy": {"idle_timeout": 0}}, "session_policy.idle_timeout"),
        ({"session_policy": {"idle_timeout": 0.999}}, "session_policy.idle_timeout"),
        ({"session_policy": {"connect_timeout": True}}, "session_policy.connect_timeout"),
        ({"session_policy": {"max_lifetime": "1d"}}, "session_policy.max_lifetime"),
        ({"session_policy": {"max_lifetime": 10**400}}, "session_policy.max_lifetime"),
        ({"session_policy": {"liveness": "both"}}, "session_policy.liveness"),
    ],
)
def test_a_wrong_frame_refuses_the_whole_answer_and_names_the_place(
    changed: dict[str, Any], place: str
) -> None:
    with pytest.raises(InvalidMessage) as raised:
        decode(state() | changed)
    assert place in str(raised.value)


@pytest.mark.parametrize("name", ["epoch", "revision", "server_time", "location", "peer_count", "peers"])
def test_a_required_member_that_is_absent_refuses_the_whole_answer(name: str) -> None:
    document = state(peer())
    del document[name]
    with pytest.raises(InvalidMessage, match=name):
        decode(document)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b'"x"',
        body(state(peer()))[:-1],
        body(state(peer()))[:200],
        body(state()) + b"x",
        body(state(peer())).replace(b'"revision": 42', b'"revision": NaN'),
        body(state()).replace(b"300", b"Infinity"),
        body(state()).replace(b"300", b"1e999"),
        body(state(peer(name="x"))).replace(b'"x"', b'"\xff"'),
        b"\xef\xbb\xbf" + body(state()),
        body(state()).decode().encode("utf-16"),
        b'{"peers":' + b"[" * 100_000,
        b'{"revision":' + b"9" * 10_000 + b"}",
        body(state()).replace(b'"revision": 42', b'"revision": 42, "revision": 43'),
        body(state()).replace(b'"mfa_required": true', b'"mfa_required": true, "mfa_required": 0'),
        body(state()).replace(b'"revision": 42', b'"revision": 42, "revis\\u0069on": 43'),
    ],
)
def test_what_is_not_one_json_object_refuses_the_whole_answer(text: bytes) -> None:
    with pytest.raises(InvalidMessage):
        decode_snapshot(text, 0.0)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"preshared_key": ""}, Refusal.INVALID_PRESHARED_KEY),
        ({"preshared_key": ZERO}, Refusal.INVALID_PRESHARED_KEY),
        ({"preshared_key": PSK[:-1]}, Refusal.INVALID_PRESHARED_KEY),
        ({"preshared_key": False}, Refusal.INVALID_PRESHARED_KEY),
        ({"allowed_ips": None}, Refusal.INVALID_ALLOWED_IPS),
        ({"allowed_ips": "10.8.0.5/32"}, Refusal.INVALID_ALLOWED_IPS),
        ({"allowed_ips": {"10.8.0.5/32": 1}}, Refusal.INVALID_ALLOWED_IPS),
        ({"allowed_ips": ["10.8.0.5/24"]}, Refusal.INVALID_ALLOWED_IPS),
        ({"allowed_ips": ["fe80::1%eth0"]}, Refusal.INVALID_ALLOWED_IPS),
        ({"allowed_ips": ["::ffff:10.8.0.5"]}, Refusal.INVALID_ALLOWED_IPS),
        ({"allowed_ips": [None]}, Refusal.INVALID_ALLOWED_IPS),
        ({"allowed_ips": [["10.8.0.5"]]}, Refusal.INVALID_ALLOWED_IPS),
        ({"persistent_keepalive": 65536}, Refusal.INVALID_KEEPALIVE),
        ({"persistent_keepalive": -1}, Refusal.INVALID_KEEPALIVE),
        ({"persistent_keepalive": True}, Refusal.INVALID_KEEPALIVE),
        ({"persistent_keepalive": "25"}, Refusal.INVALID_KEEPALIVE),
        ({"mfa_exempt": "true"}, Refusal.INVALID_MFA_EXEMPT),
        ({"mfa_exempt": 1}, Refusal.INVALID_MFA_EXEMPT),
        ({"session": {}}, Refusal.INVALID_PRESHARED_KEY),
        ({"session": "s-19"}, Refusal.INVALID_SESSION),
        ({"session": False}, Refusal.INVALID_SESSION),
        ({"session": session(preshared_key=None)}, Refusal.INVALID_PRESHARED_KEY),
        ({"session": session(preshared_key="")}, Refusal.INVALID_PRESHARED_KEY),
        ({"session": session(preshared_key=ZERO)}, Refusal.INVALID_PRESHARED_KEY),
        ({"session": session(preshared_key=PSK + "=")}, Refusal.INVALID_PRESHARED_KEY),
        ({"session": session(granted_at=None)}, Refusal.INVALID_TIME),
        ({"session": session(expires_at=None)}, Refusal.INVALID_TIME),
        ({"session": session(expires_at="2026-11-24T13:00:00")}, Refusal.INVALID_TIME),
        ({"session": session(expires_at="2026-02-30T13:00:00Z")}, Refusal.INVALID_TIME),
        ({"session": session(expires_at=1e12)}, Refusal.INVALID_TIME),
        ({"session": session(expires_at=session()["granted_at"])}, Refusal.INVALID_TIME),
        ({"session": session(id="")}, Refusal.INVALID_SESSION),
        ({"session": session(id=None)}, Refusal.INVALID_SESSION),
        ({"session": session(id="a\x00b")}, Refusal.INVALID_SESSION),
        ({"session": session(id="a" * 129)}, Refusal.INVALID_SESSION),
    ],
)
def test_a_bad_peer_is_refused_alone(changed: dict[str, Any], reason: Refusal) -> None:
    snapshot = decode(state(peer(1), peer(2, **changed), peer(3)))

    good, bad, other = snapshot.peers
    assert (good.fault, bad.fault or bad.session_fault, other.fault) == (None, reason, None)
    assert format_key(bad.public_key) == key(2)
    if "session" in changed:
        assert bad.session is None
    else:
        assert bad.session == good.session
    if "allowed_ips" in changed:
        assert bad.allowed_ips == ()
    else:
        assert bad.allowed_ips == (parse_prefix("10.8.0.2/32"),)
    assert bad.mfa_exempt is False
    assert bad.preshared_key is None


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        (peer(public_key=None), ""),
        (peer(public_key=7), ""),
        (peer(public_key=ZERO), ZERO),
        (peer(public_key=key(1)[:-1]), key(1)[:-1]),
        (peer(public_key=key(1).replace("E=", "F=")), key(1).replace("E=", "F=")),
        (peer(public_key="x" * 1000), "x" * 64),
        (peer(public_key="\x1b[31m\ud800"), "\\x1b[31m\\ud800"),
    ],
)
def test_a_peer_without_a_readable_key_is_refused_alone(entry: Any, shown: str) -> None:
    snapshot = decode(state(peer(2), entry))
    assert [format_key(p.public_key) for p in snapshot.peers] == [key(2)]
    assert snapshot.unreadable == (UnreadablePeer(shown, Refusal.INVALID_PUBLIC_KEY, "device-1"),)


@pytest.mark.parametrize("entry", [None, 7, "x", [], [peer()]])
def test_an_entry_that_is_no_object_is_refused_alone(entry: Any) -> None:
    snapshot = decode(state(peer(2), entry))
    assert snapshot.unreadable == (UnreadablePeer("", Refusal.INVALID_PEER),)
    assert len(snapshot.peers) == 1


def test_a_peer_that_repeats_a_key_is_refused_alone() -> None:
    text = body(state(peer(1), peer(2, mfa_exempt="?"))).replace(
        b'"mfa_exempt": "?"', b'"mfa_exempt": false, "mfa_exempt": true'
    )
    assert [p.fault for p in decode_snapshot(text, 0.0).peers] == [None, Refusal.INVALID_PEER]

    text = body(state(peer(1), peer(2, session=session(id="twice")))).replace(
        b'"id": "twice"', b'"id": "a", "id": "b"'
    )
    bad = decode_snapshot(text, 0.0).peers[1]
    assert (bad.fault, bad.session_fault, bad.session) == (None, Refusal.INVALID_SESSION, None)


def test_null_and_absent_mean_the_default_of_a_peer() -> None:
    expected = only(peer(persistent_keepalive=0, mfa_exempt=False, session=None))
    assert only(peer(persistent_keepalive=None, mfa_exempt=None, session=None)) == expected
    bare = {"public_key": key(1), "name": "device-1", "allowed_ips": ["10.8.0.1"]}
    assert only(bare) == expected


def test_allowed_ips_are_sorted_and_without_repetition_and_may_be_empty() -> None:
    listed = only(peer(allowed_ips=["fd00::/64", "10.8.0.9", "10.8.0.9/32", "10.8.0.0/29"]))
    assert [str(p) for p in listed.allowed_ips] == ["10.8.0.0/29", "10.8.0.9/32", "fd00::/64"]
    assert only(peer(allowed_ips=[])).fault is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [(None, ""), (7, ""), ("x" * 70, "x" * 64), ("a\nb", "a\\nb"), ("\ud83d", "\\ud83d")],
)
def test_a_name_never_refuses_a_peer(name: Any, shown: str) -> None:
    assert only(peer(name=name)).fault is None
    assert only(peer(name=name)).name == shown


def test_errors_and_reprs_hold_no_secret() -> None:
    assert PSK not in repr(decode(state(peer(preshared_key=PSK))))
    text = body(state(peer(preshared_key=PSK)))
    for broken in (text[:-2], text.replace(b"b7e1", b"b 7"), text.replace(b"42", b"[42]")):
        with pytest.raises(InvalidMessage) as raised:
            decode_snapshot(broken, 0.0)
        error: BaseException | None = raised.value
        while error is not None:
            assert PSK not in repr(vars(error)) + repr(error.args)
            error = error.__context__ or error.__cause__


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from([PSK, key(1), ZERO, "b7e1:43", "7", "gateway", "10.8.0.5/32"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*state(), *peer(), *session(), "changes", "type", "data", "session_id"]),
            inner,
            max_size=8,
        )
    ),
    max_leaves=12,
)
TYPES = st.sampled_from(
    [
        "peer_upserted",
        "peer_removed",
        "session_granted",
        "session_revoked",
        "location_changed",
        "resync",
        "message",
    ]
)


@given(st.binary() | JSON.map(body))
def test_arbitrary_bytes_raise_nothing_but_invalid_message(text: bytes) -> None:
    for read in (lambda: decode_snapshot(text, 0.0), lambda: decode_push(text)):
        with contextlib.suppress(InvalidMessage):
            read()


@given(TYPES | st.text(), st.just("b7e1:43") | st.text(), st.binary() | JSON.map(body))
def test_arbitrary_events_raise_nothing_but_invalid_message(kind: str, position: str, data: bytes) -> None:
    try:
        decoded = decode_event(kind, position, data)
    except InvalidMessage:
        return
    assert f"{decoded.epoch}:{decoded.revision}" == position


@given(st.sampled_from([*peer()]), JSON)
def test_whatever_a_member_of_a_peer_is_the_other_peers_go_on(name: str, value: Any) -> None:
    snapshot = decode(state(peer(1), peer(2) | {name: value}))
    assert snapshot.peers[0] == only(peer(1))
    assert len(snapshot.peers) + len(snapshot.unreadable) == 2


@given(st.sampled_from([*session()]), JSON)
def test_a_session_is_read_whole_or_not_at_all(name: str, value: Any) -> None:
    read = only(peer(session=session() | {name: value}))
    assert (read.session is None) == (read.session_fault is not None)


def test_each_event_of_the_api_is_read() -> None:
    grant = only(peer(1)).session
    public_key = only(peer(1)).public_key
    moved = {"location": state()["location"], "interface": {"mtu": 1400}}
    expected: list[tuple[str, Any, ChangeBody]] = [
        ("peer_upserted", peer(1), PeerUpserted(only(peer(1)))),
        ("peer_removed", {"public_key": key(1)}, PeerRemoved(public_key)),
        (
            "session_granted",
            {"public_key": key(1), "session": session()},
            SessionGranted(public_key, grant),
        ),
        (
            "session_revoked",
            {"public_key": key(1), "session_id": "s-19"},
            SessionRevoked(public_key, "s-19"),
        ),
        (
            "location_changed",
            moved,
            LocationChanged(
                Location("7", "hq", mfa_required=True),
                InterfaceSettings(mtu=1400),
                SessionPolicy(),
            ),
        ),
    ]
    for kind, data, change in expected:
        assert decode_event(kind, "b7e1:43", body(data)) == Change("b7e1", 43, change)
    pushed = decode_push(
        body(
            {
                "location": "7",
                "changes": [
                    {"id": f"b7e1:{number}", "type": kind, "data": data}
                    for number, (kind, data, _) in enumerate(expected)
                ],
            }
        )
    )
    assert pushed.location == "7"
    assert pushed.changes == tuple(
        Change("b7e1", number, change) for number, (_, _, change) in enumerate(expected)
    )
    assert decode_event("resync", "b7e1:50", b"{}") == Resync("b7e1", 50)


@pytest.mark.parametrize(
    ("kind", "data", "fault"),
    [
        ("session_granted", {"session": session(preshared_key="")}, Refusal.INVALID_PRESHARED_KEY),
        ("session_granted", {"session": session(granted_at=None)}, Refusal.INVALID_TIME),
        ("session_granted", {"session": None}, Refusal.INVALID_SESSION),
        ("session_granted", {}, Refusal.INVALID_SESSION),
        ("session_revoked", {}, Refusal.INVALID_SESSION),
        ("session_revoked", {"session_id": 19}, Refusal.INVALID_SESSION),
    ],
)
def test_a_bad_event_with_a_readable_key_refuses_that_peer_and_advances(
    kind: str, data: dict[str, Any], fault: Refusal
) -> None:
    change = decode_event(kind, "b7e1:43", body({"public_key": key(1)} | data))
    assert change == Change("b7e1", 43, SessionGranted(only(peer(1)).public_key, None, fault))


def test_a_bad_upsert_with_a_readable_key_refuses_that_peer_and_advances() -> None:
    change = decode_event("peer_upserted", "b7e1:43", body(peer(1, allowed_ips=7)))
    assert isinstance(change, Change)
    assert isinstance(change.body, PeerUpserted)
    assert change.body.peer.fault is Refusal.INVALID_ALLOWED_IPS


@pytest.mark.parametrize(
    ("kind", "position", "data"),
    [
        ("peer_upserted", "", body(peer())),
        ("peer_upserted", "b7e1", body(peer())),
        ("peer_upserted", "b7e1:", body(peer())),
        ("peer_upserted", "b7e1:-1", body(peer())),
        ("peer_upserted", "b7e1:043", body(peer())),
        ("peer_upserted", "b7e1:43 ", body(peer())),
        ("peer_upserted", f"b7e1:{2**63}", body(peer())),
        ("peer_upserted", "b7e1:٤٣", body(peer())),
        ("peer_upserted", "b7e1:43", b"{"),
        ("peer_upserted", "b7e1:43", b""),
        ("peer_upserted", "b7e1:43", b"[]"),
        ("peer_upserted", "b7e1:43", body(peer(public_key=ZERO))),
        ("peer_removed", "b7e1:43", b"{}"),
        ("peer_renamed", "b7e1:43", body(peer())),
        ("message", "b7e1:43", body(peer())),
        ("location_changed", "b7e1:43", b"{}"),
        ("location_changed", "b7e1:43", b'{"location":{"id":"7"}}'),
        ("resync", "", b"{}"),
        ("peer_removed", "b7e1:43", body({"public_key": key(1)})[:-1] + b',"public_key":1}'),
    ],
)
def test_any_other_bad_event_asks_for_a_pull(kind: str, position: str, data: bytes) -> None:
    with pytest.raises(InvalidMessage):
        decode_event(kind, position, data)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"changes": []},
        {"location": "7"},
        {"location": "7", "changes": []},
        {"location": "7", "changes": {}},
        {"location": 7, "changes": [{"id": "e:1", "type": "peer_upserted", "data": peer()}]},
        {"location": "7", "changes": [None]},
        {"location": "7", "changes": [{"type": "peer_upserted", "data": peer()}]},
        {"location": "7", "changes": [{"id": "e:1", "type": ["peer_upserted"], "data": peer()}]},
        {"location": "7", "changes": [{"id": "e:1", "type": "resync", "data": {}}]},
    ],
)
def test_a_malformed_push_is_refused_whole(document: Any) -> None:
    with pytest.raises(InvalidMessage):
        decode_push(body(document))


def test_the_time_to_read_a_list_grows_with_it_and_not_faster() -> None:
    peers = [
        peer(number, allowed_ips=[f"10.{number >> 8}.{number & 255}.0/24", f"fd00::{number:x}"])
        for number in range(1, 10_001)
    ]
    many = json.dumps(state(*peers), separators=(",", ":")).encode()
    some = json.dumps(state(*peers[:2_000]), separators=(",", ":")).encode()
    assert sum(p.fault is None for p in decode_snapshot(many, 0.0).peers) == 10_000
    took: dict[bytes, list[float]] = {some: [], many: []}
    for _ in range(7):
        for text, times in took.items():
            began = time.perf_counter()
            decode_snapshot(text, 0.0)
            times.append(time.perf_counter() - began)
    # Five times the list; what grows with the square takes 25 times as long.
    assert min(took[many]) < 12 * min(took[some])


_pieces = st.sampled_from(
    [b'"', b":", b",", b"{}", b"[", b"]", b'"id":', b'{"id":1}', b"\\", b" ", b"null", b"1"]
)


TIMES = {"granted_at": "2026-11-24T03:00:00.000Z", "expires_at": "2026-11-24T13:00:00.000Z"}


def usual(number: int, **members: Any) -> dict[str, Any]:
    """An entry as nearly all are."""
    entry = peer(number, session=session(**TIMES), name=f"device-{number}")
    entry["allowed_ips"] = [f"10.8.0.{number}/32", f"fd00:8::{number:x}/128"]
    return entry | members


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"session": None},
        {"preshared_key": PSK, "session": None, "mfa_exempt": True, "persistent_keepalive": 25},
        {"allowed_ips": ["10.9.0.0/16", "fd00::/32", "fd00:9::1/128"]},
        {"session": session(granted_at="2026-11-24T03:00:00Z", expires_at="2026-11-24T13:00:00Z")},
        {
            "session": session(
                granted_at="2026-11-24T03:00:00.123456Z", expires_at="2027-11-24T13:00:00.000001Z"
            )
        },
    ],
)
def test_the_usual_is_read_by_column(monkeypatch: pytest.MonkeyPatch, members: dict[str, Any]) -> None:
    text = body(state(*(usual(n, **members) for n in range(1, 50))))
    monkeypatch.setattr(messages, "_QUICK", 1 << 30)
    expected = decode_snapshot(text, 0.0)
    monkeypatch.setattr(messages, "_QUICK", 0)
    monkeypatch.setattr(messages, "_peer", lambda _: pytest.fail("an entry was read alone"))
    assert decode_snapshot(text, 0.0) == expected
    assert not any(p.fault or p.session_fault for p in expected.peers)


_ODD: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "no session": {"session": None},
    "a static key": {"preshared_key": "/".ljust(43, "A") + "=", "session": None},
    "a static key besides": {"preshared_key": "/".ljust(43, "A") + "="},
    "exempt": {"mfa_exempt": True, "persistent_keepalive": 25},
    "nulls": {"mfa_exempt": None, "persistent_keepalive": None, "preshared_key": None},
    "a net": {"allowed_ips": ["10.9.0.0/16", "fd00:9::/48"]},
    "an IPv6 net of 32 bits": {"allowed_ips": ["fd00::/32"]},
    "a bare address": {"allowed_ips": ["10.9.9.9"]},
    "host bits": {"allowed_ips": ["10.9.9.9/8"]},
    "twice the same": {"allowed_ips": ["10.9.9.9/32", "10.9.9.9"]},
    "three of them": {"allowed_ips": ["fd00::9/128", "10.9.9.9/32", "10.9.9.8/32"]},
    "none of them": {"allowed_ips": []},
    "no list of them": {"allowed_ips": "10.9.9.9/32"},
    "IPv4 in IPv6": {"allowed_ips": ["::ffff:10.1.1.1/128"]},
    "IPv4 of 128 bits": {"allowed_ips": ["10.1.1.1/128"]},
    "an odd name": {"name": 'a"b\x07' + "x" * 80},
    "no name": {"name": None},
    "a number for a name": {"name": 7},
    "a key that is none": {"public_key": "x"},
    "a key of zeros": {"public_key": "A" * 43 + "="},
    "a key with bits left over": {"public_key": "A" * 42 + "B="},
    "a key in two": {"public_key": "A" * 40 + "==AA"},
    "a PSK of zeros": {"preshared_key": "A" * 43 + "="},
    "a keepalive out of range": {"persistent_keepalive": 65_536},
    "a keepalive that is no integer": {"persistent_keepalive": 25.0},
    "more than is known": {"colour": "blue"},
    "another time": {"session": session(**TIMES | {"granted_at": "2026-11-24T03:00:00+00:00"})},
    "a time that is none": {"session": session(**TIMES | {"granted_at": "2026-13-24T03:00:00.000Z"})},
    "a time with a hole": {"session": session(**TIMES | {"granted_at": "2026-11-24T03:00:00 000Z"})},
    "the end before the beginning": {
        "session": session(**TIMES | {"expires_at": "2000-01-01T00:00:00.000Z"})
    },
    "an id that is none": {"session": session(**TIMES, id="")},
    "an id that is too long": {"session": session(**TIMES, id="x" * 129)},
    "a session with more": {"session": session(**TIMES, more=1)},
    "a session with less": {"session": {"id": "s-1"}},
}


@given(st.data())
def test_what_is_read_quickly_is_what_the_standard_parser_reads(data: st.DataObject) -> None:
    """Documents that are cut up and patched, so that many are no JSON, repeat keys or hide colons."""
    text = bytearray(body(state(peer(1), peer(2, name='a":"b'), peer(3, extra={"a": [{"b": 1}]}))))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 12))] = data.draw(_pieces)
    said: list[Any] = []
    for quick in (0, 1 << 30):
        messages._QUICK = quick  # type: ignore[misc]
        try:
            said.append(decode_snapshot(bytes(text), 0.0))
        except InvalidMessage as error:
            said.append(str(error))
    assert said[0] == said[1]


@given(st.lists(st.sampled_from(sorted(_ODD)), max_size=6))
def test_an_unusual_entry_is_read_as_the_standard_parser_reads_it(odd: list[str]) -> None:
    entries = [usual(1), *(usual(n) | _ODD[what] for n, what in enumerate(odd, 2)), usual(99)]
    text = body(state(*entries))
    messages._QUICK = 0  # type: ignore[misc]
    by_column = decode_snapshot(text, 0.0)
    messages._QUICK = 1 << 30  # type: ignore[misc]
    assert by_column == decode_snapshot(text, 0.0)


class _Pairs(list[Any]):
    """An object as it stands there."""


def _pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    return _Pairs(pairs)


def _repeats_a_key(value: Any) -> bool:
    if isinstance(value, _Pairs):
        keys = [key for key, _ in value]
        return len(keys) != len(set(keys)) or any(_repeats_a_key(member) for _, member in value)
    return isinstance(value, list) and any(map(_repeats_a_key, value))


@pytest.mark.parametrize(
    ("patch", "refused"),
    [
        ((b'"peer_count":', b'"epoch":"x","peer_count":'), None),
        ((b'"granted_at":', b'"id":"s-9","granted_at":'), (None, Refusal.INVALID_SESSION)),
        ((b'"mfa_required":', b'"id" :"9","mfa_required":'), None),
        ((b'"allowed_ips":', b'"n\\u0061me":"x","allowed_ips":'), (Refusal.INVALID_PEER, None)),
    ],
)
def test_a_repeated_key_is_never_overlooked(
    patch: tuple[bytes, bytes], refused: tuple[Refusal | None, Refusal | None] | None
) -> None:
    text = body(state(peer(1), peer(2)))
    patched = text.replace(*patch, 1)
    assert patched != text
    if refused is None:
        with pytest.raises(InvalidMessage, match="repeats a key"):
            decode_snapshot(patched, 0.0)
        return
    first, second = decode_snapshot(patched, 0.0).peers
    assert (first.fault, first.session_fault) == refused
    assert (second.fault, second.session_fault) == (None, None)


def test_a_list_that_is_written_as_before_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_QUICK", 0)
    first = decode_snapshot(body(state(usual(1), peer(2), {"public_key": "x"})), 0.0)
    again = state(usual(1), peer(2), {"public_key": "x"}) | {"revision": 43}
    monkeypatch.setattr(messages, "_read_entries", lambda _: pytest.fail("it was read again"))
    second = decode_snapshot(body(again), 5.0, first)
    assert second.peers is first.peers
    assert (second.unreadable, second.revision, second.requested_at) == (first.unreadable, 43, 5.0)
    with pytest.raises(InvalidMessage, match="peer_count"):
        decode_snapshot(body(again | {"peer_count": 2}), 5.0, first)


def test_a_list_that_is_written_otherwise_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_QUICK", 0)
    first = decode_snapshot(body(state(usual(1), usual(2))), 0.0)
    for entries in ([usual(2), usual(1)], [usual(1)], [usual(1), usual(2, persistent_keepalive=1)]):
        second = decode_snapshot(body(state(*entries)), 0.0, first)
        assert second == decode_snapshot(body(state(*entries)), 0.0)
        assert second.digest != first.digest


def test_a_dense_member_that_nobody_reads_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_LARGE", 10_000)
    entries = usual(1, x=[0] * 6000), usual(2, pad="y" * 300_000)
    read = decode_snapshot(body(state(*entries, weather=[1] * 6000)), 0.0)
    assert [p.fault for p in read.peers] == [None, None]
