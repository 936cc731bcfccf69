from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import msgspec
import pytest

from agent import overview
from agent.encoding import format_key
from agent.model import (
    CutPeer,
    Endpoint,
    Now,
    PeerRemoved,
    PeerUpserted,
    Refusal,
    SessionPolicy,
    UnreadablePeer,
)
from agent.overview import counts, moment, peer_series, peer_state, plan
from agent.plan import Mirror, make_plan
from agent.state import State
from tests.support.builders import (
    CORE,
    NOW,
    OWN_KEY,
    after,
    device,
    grant,
    key,
    observed,
    peer,
    psk,
    snapshot,
)


def held(*peers: object, **members: object) -> tuple[State, Mirror]:
    """A state with its interface as wanted."""
    state, mirror = State(own_key=OWN_KEY), Mirror()
    state.load(snapshot(peers, **members), NOW)  # type: ignore[arg-type]
    done = make_plan(((k, state.wanted(k, NOW)) for k in state.dirty), mirror)
    for operation in done:
        mirror.acknowledge(operation, done.tenures.get(operation.public_key, 0))
    state.dirty.clear()
    return state, mirror


def status(state: State, mirror: Mirror, now: Now, about: dict[str, Any]) -> dict[str, Any]:
    document = asyncio.run(overview.status(state, mirror, lambda: now, about))
    made: dict[str, Any] = msgspec.to_builtins(document)
    return made


HOME = Endpoint(b"\xcb\x00\x71\x09", 51000)
ALL = (
    peer(1, name="alice", session=grant("s1", 1, lasts=60)),
    peer(2, name="bob"),
    peer(3, "10.8.0.9"),
    peer(4, "10.8.0.9"),
    peer(5, mfa_exempt=True, preshared_key=psk(5)),
)


def test_states_are_up_waiting_and_refused() -> None:
    state, mirror = held(*ALL)
    shown = [peer_state(state, mirror, key(n)) for n in range(1, 6)]
    assert shown == ["up", "waiting", "refused", "refused", "up"]


def test_a_cut_peer_is_not_up() -> None:
    state, mirror = held(*ALL)
    mirror.acknowledge(CutPeer(key(1)))
    assert peer_state(state, mirror, key(1)) == "waiting"
    assert counts(state, mirror)[0] == {"up": 1, "waiting": 2, "refused": 2}


def test_status_shows_exactly_cores_list() -> None:
    broken = UnreadablePeer("nonsense", Refusal.INVALID_PUBLIC_KEY, "eve")
    state, mirror = held(*ALL, unreadable=(broken,))
    state.observe(device(observed(1, preshared_key=1, handshake=CORE + 5.5, rx=10, tx=20), observed(77)), NOW)
    document = json.loads(json.dumps(status(state, mirror, after(10), {"interface": "wg0"})))
    assert (document["interface"], document["epoch"], document["revision"]) == ("wg0", "e1", 1)
    assert (document["mfa_required"], document["location"]) == (True, "hq")
    assert len(document["peers"]) == len(ALL) + 1
    alice, bob, carol, _, router, eve = document["peers"]
    assert (eve["public_key"], eve["name"], eve["state"]) == ("nonsense", "eve", "refused")
    assert eve["reason"] == "invalid_public_key"
    assert eve.keys() == carol.keys() | {"reason"}
    assert alice == {
        "public_key": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
        "name": "alice",
        "state": "up",
        "allowed_ips": ["10.8.0.1/32"],
        "session_id": "s1",
        "session_in_use": True,
        "expires_at": "2027-01-15T08:01:00.000Z",
        "granted_at": "2027-01-15T08:00:00.000Z",
        "session_life": 60.0,
        "time_left": 50.0,
        "latest_handshake": "2027-01-15T08:00:05.500Z",
        "endpoint": None,
        "rx_bytes": 10,
        "tx_bytes": 20,
        "rx_rate": None,
        "tx_rate": None,
        "mfa_exempt": False,
    }
    assert (bob["state"], bob["session_id"], bob["latest_handshake"]) == ("waiting", None, None)
    assert (carol["state"], carol["reason"]) == ("refused", "prefix_claimed")
    assert router["mfa_exempt"] is True


def test_a_long_status_lets_others_work_and_is_cores_list_as_it_is_then() -> None:
    many = [peer(n, f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", name=f"p{n}") for n in range(1, 3500)]
    state, mirror = held(*many)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            if turns == 2:
                for body in (PeerRemoved(key(1)), PeerRemoved(key(3000))):
                    state.change(body, NOW)
                state.change(PeerUpserted(peer(4000, "10.99.0.1", name="new")), NOW)
            await asyncio.sleep(0)

    async def main() -> dict[str, Any]:
        beside = asyncio.create_task(others())
        try:
            return await overview.status(state, mirror, lambda: NOW, {})
        finally:
            beside.cancel()

    names = [row.name for row in asyncio.run(main())["peers"]]
    assert turns >= 3
    assert names == [p.name for p in many if p.public_key not in {key(1), key(3000)}] + ["new"]


def test_a_session_that_is_not_needed_is_held_and_not_in_use() -> None:
    state, mirror = held(peer(1, session=grant("s1", 1)), peer(2), mfa_required=False)
    alice, bob = status(state, mirror, NOW, {})["peers"]
    assert (alice["state"], alice["session_id"], alice["session_in_use"]) == ("up", "s1", False)
    assert bob["session_in_use"] is None


def test_rates_come_with_the_second_look() -> None:
    state, mirror = held(*ALL)
    for rx, seconds in ((1000, 0), (1600, 30)):
        state.observe(device(observed(1, preshared_key=1, handshake=CORE, rx=rx, tx=0)), after(seconds))
    document = status(state, mirror, after(40), {})
    rates = {peer["name"]: (peer["rx_rate"], peer["tx_rate"]) for peer in document["peers"]}
    assert (rates["alice"], rates["bob"]) == ((20.0, 0.0), (0.0, 0.0))
    assert document["observed_at"] == "2027-01-15T08:00:30.000Z"


def test_the_life_of_a_session_is_that_under_the_ceilings() -> None:
    state, mirror = held(peer(1, session=grant("s1", 1, lasts=7200)), policy=SessionPolicy(max_lifetime=3600))
    (shown,) = status(state, mirror, after(600), {})["peers"]
    assert (shown["session_life"], shown["time_left"]) == (3600.0, 3000.0)


def test_a_moment_is_told_by_the_wall_clock_of_today() -> None:
    assert moment(NOW.boot - 60, after(0, step=3600)) == "2027-01-15T08:59:00.000Z"
    assert moment(None, NOW) is None


def test_before_the_first_state_the_status_says_so() -> None:
    document = status(State(), Mirror(), NOW, {})
    assert {k: document[k] for k in ("epoch", "revision", "mfa_required", "peers")} == {
        "epoch": None,
        "revision": None,
        "mfa_required": None,
        "peers": [],
    }


def test_no_document_holds_a_secret() -> None:
    state, mirror = held(*ALL)
    shown = device(observed(1, preshared_key=1), observed(77, preshared_key=77))
    text = json.dumps([status(state, mirror, NOW, {}), plan("wg0", state, mirror, shown, NOW)])
    text += repr(peer_series(state))
    for number in (1, 5, 77):
        assert psk(number).raw.hex() not in text
        assert base64.b64encode(psk(number).raw).decode() not in text


def test_counts_add_up_to_cores_list() -> None:
    state, mirror = held(*ALL, unreadable=(UnreadablePeer("x", Refusal.INVALID_PUBLIC_KEY),))
    by_state, by_reason = counts(state, mirror)
    assert by_state == {"up": 2, "waiting": 1, "refused": 3}
    assert by_reason == {Refusal.PREFIX_CLAIMED: 2, Refusal.INVALID_PUBLIC_KEY: 1}


def test_a_refused_peer_that_is_still_on_the_interface_counts_as_refused_only() -> None:
    state, mirror = held(*ALL)
    state.block([key(1)], Refusal.DEVICE)
    assert key(1) in mirror.peers
    assert counts(state, mirror)[0] == {"up": 1, "waiting": 1, "refused": 3}


def test_series_stay_while_core_lists_the_peer() -> None:
    state, _ = held(*ALL)
    state.observe(device(observed(2, rx=7)), NOW)
    series = {s.peer.public_key: s for s in peer_series(state)}
    assert len(series) == len(ALL)
    assert (series[key(2)].traffic.rx_bytes, series[key(2)].peer.name) == (7, "bob")


def test_the_plan_shows_what_would_be_done_and_does_nothing() -> None:
    state, mirror = held(*ALL)
    before = dict(mirror.peers)
    now = observed(1, "10.8.0.1", "10.8.0.200", preshared_key=1)
    document = plan("wg0", state, mirror, device(now, observed(77)), NOW)
    operations = {(o["operation"], o["name"]): o["change"] for o in document["operations"]}
    assert operations.keys() == {("update", "alice"), ("remove", ""), ("add", "")}
    assert operations["update", "alice"] == "update: allowed ips 10.8.0.1/32"
    assert sorted(d["kind"] for d in document["drift"]) == ["allowed_ips", "peer_added", "peer_removed"]
    assert {d["kind"]: d["name"] for d in document["drift"]}["allowed_ips"] == "alice"
    assert mirror.peers == before
    assert not state.dirty


def test_a_plan_tells_of_each_peer_what_was_and_what_comes() -> None:
    state, mirror = held(*ALL)
    found = observed(1, "10.8.0.1", "10.8.0.200", preshared_key=1, keepalive=7, endpoint=HOME)
    stranger = observed(77, preshared_key=77, endpoint=HOME)
    document = plan("wg0", state, mirror, device(found, stranger), NOW)
    by_key = {entry["public_key"]: entry for entry in document["operations"]}
    update, removed, added = (by_key[format_key(key(number))] for number in (1, 77, 5))

    assert update["before"] == {
        "allowed_ips": ["10.8.0.1/32", "10.8.0.200/32"],
        "persistent_keepalive": 7,
        "preshared_key": True,
    }
    assert update["after"] == {
        "allowed_ips": ["10.8.0.1/32"],
        "persistent_keepalive": 0,
        "preshared_key": True,
    }
    assert (update["preshared_key_changes"], update["session_id"], update["why"]) == (False, "s1", "")
    assert (removed["after"], removed["why"]) == (None, "not listed by core")
    assert removed["endpoint"] == "203.0.113.9:51000"
    assert (added["before"], added["preshared_key_changes"], added["endpoint"]) == (None, True, None)


def test_a_plan_says_why_a_peer_has_to_go() -> None:
    state, mirror = held(*ALL)
    state.block([key(5)], Refusal.DEVICE)
    there = device(*(observed(n, preshared_key=n) for n in (1, 5)), observed(2))
    why = {entry["name"]: entry["why"] for entry in plan("wg0", state, mirror, there, NOW)["operations"]}
    assert why == {"": "refused: device_refused", "bob": "no live session"}


def test_another_psk_in_a_plan_is_told_as_a_change_only() -> None:
    state, mirror = held(*ALL)
    there = device(observed(1, preshared_key=9), observed(5, preshared_key=5))
    document = plan("wg0", state, mirror, there, NOW)
    assert [entry["operation"] for entry in document["operations"]] == ["remove", "add"]
    removed, added = document["operations"]
    assert removed["before"]["preshared_key"] is True
    assert added["preshared_key_changes"] is True


def test_before_the_first_state_a_plan_does_not_say_that_core_does_not_list_a_peer() -> None:
    state, mirror = State(own_key=OWN_KEY), Mirror()
    mirror.find(device(observed(1)))
    state.adopt(device(observed(1)), {key(1): 5.0}, NOW)
    document = plan("wg0", state, mirror, device(observed(1)), after(10))
    assert document["epoch"] is None
    assert [entry["why"] for entry in document["operations"]] == ["core has not been heard yet"]


@pytest.mark.parametrize("seconds", [0, 60])
def test_the_plan_is_of_this_moment(seconds: float) -> None:
    state, mirror = held(*ALL)
    shown = device(observed(1, preshared_key=1), observed(5, preshared_key=5))
    document = plan("wg0", state, mirror, shown, after(seconds))
    assert [o["operation"] for o in document["operations"]] == (["remove"] if seconds else [])
