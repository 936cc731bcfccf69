import asyncio
import gzip
import json
from typing import Any

import pytest

from agent.encoding import format_time
from tests.sandbox.parts import (
    START,
    Gateway,
    following,
    new_key,
    peer_stats,
    read_events,
    run,
    scene,
    served_scene,
)


def test_the_state_is_the_whole_location_with_a_peer_count() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            await s.service.admin.add_device(
                "hq", "router", new_key(), mfa_exempt=True, allowed_ips=["192.168.7.0/24"]
            )
            state = await s.gateway.state()
            location = (await s.service.admin.locations())[0]
            assert (state["epoch"], state["revision"]) == (location["epoch"], 4)
            assert state["server_time"] == format_time(START)
            assert state["location"] == {"id": "1", "name": "hq", "mfa_required": True}
            assert state["interface"] == {
                "addresses": ["10.8.0.1/24", "fd00:8::1/64"],
                "listen_port": 51820,
            }
            assert state["session_policy"] == {
                "idle_timeout": 300,
                "connect_timeout": 180,
                "max_lifetime": 43200,
                "liveness": "gateway",
            }
            assert state["peer_count"] == len(state["peers"]) == 2
            laptop, router = state["peers"]
            assert laptop == {
                "public_key": s.laptop,
                "name": "alice-laptop",
                "allowed_ips": ["10.8.0.2/32", "fd00:8::2/128"],
                "persistent_keepalive": 25,
                "mfa_exempt": False,
                "preshared_key": None,
                "session": session,
            }
            assert (router["mfa_exempt"], router["session"]) == (True, None)

    run(main())


def test_if_none_match_is_compared_weakly_and_answered_with_304() -> None:
    async def main() -> None:
        async with scene() as s:
            etag = (await s.gateway.http.get("state")).headers["etag"]
            assert etag == f'"{await s.gateway.position()}"'
            for tag in (etag, f"W/{etag}", f'"other", W/{etag}'):
                response = await s.gateway.http.get("state", headers={"if-none-match": tag})
                assert (response.status_code, response.content) == (304, b"")
                assert response.headers["etag"] == etag
            await s.service.admin.change_location("hq", mfa_required=False)
            response = await s.gateway.http.get("state", headers={"if-none-match": etag})
            assert response.status_code == 200
            assert response.json()["location"]["mfa_required"] is False

    run(main())


def test_the_state_is_compressed_only_for_who_accepts_it() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.add_devices(
                [{"location": "hq", "name": f"d{n}", "public_key": new_key()} for n in range(20)]
            )
            for accepts, encoding in (
                ("gzip, deflate", "gzip"),
                ("*", "gzip"),
                ("identity", None),
                ("gzip;q=0", None),
            ):
                response = await s.gateway.http.get("state", headers={"accept-encoding": accepts})
                assert response.headers.get("content-encoding") == encoding
                assert len(response.json()["peers"]) == 21

    run(main())


@pytest.mark.parametrize(
    ("header", "status"),
    [({}, 401), ({"authorization": "Bearer wrong"}, 401), ({"authorization": "Basic eDp5"}, 401)],
)
def test_a_request_without_a_known_token_is_401(header: dict[str, str], status: int) -> None:
    async def main() -> None:
        async with scene() as s:
            s.gateway.http.headers.pop("authorization")
            for method, path in (("GET", "state"), ("GET", "changes"), ("POST", "applied")):
                response = await s.gateway.http.request(method, path, headers=header)
                assert response.status_code == status
                assert response.headers["www-authenticate"] == "Bearer"

    run(main())


def test_a_disabled_gateway_is_403_and_one_without_a_location_has_to_wait() -> None:
    gateways = [
        {"name": "gw1", "location": "hq", "token": "one"},
        {"name": "gw2", "location": "hq", "token": "two", "enabled": False},
        {"name": "gw3", "location": "later", "token": "three"},
    ]

    async def main() -> None:
        async with scene(gateways=gateways) as s:
            two, three = Gateway(s.service, "two"), Gateway(s.service, "three")
            assert (await two.http.get("state")).status_code == 403
            response = await three.http.get("state")
            assert (response.status_code, response.headers["retry-after"]) == (503, "2")
            await s.service.admin.add_location("later")
            assert (await three.state())["location"]["name"] == "later"
            await two.http.aclose()
            await three.http.aclose()

    run(main())


def test_the_stream_resumes_after_the_last_event_id_with_every_revision_once() -> None:
    async def main() -> None:
        async with served_scene() as s:
            held = await s.gateway.position()
            session = await s.connect()
            await s.service.admin.revoke(session["id"])
            await s.service.admin.change_location("hq", mfa_required=False)
            phone = new_key()
            await s.service.admin.add_device("hq", "phone", phone)
            devices = await s.service.admin.devices("hq")
            await s.service.admin.remove_device(devices[-1]["id"])
            events = await s.gateway.replay(held, 5)
            epoch, _, revision = held.partition(":")
            assert [e.id for e in events] == [f"{epoch}:{int(revision) + n}" for n in range(1, 6)]
            granted, revoked, changed, upserted, removed = events
            assert [e.name for e in events] == [
                "session_granted",
                "session_revoked",
                "location_changed",
                "peer_upserted",
                "peer_removed",
            ]
            assert granted.data == {"public_key": s.laptop, "session": session}
            assert revoked.data == {"public_key": s.laptop, "session_id": session["id"]}
            assert changed.data["location"]["mfa_required"] is False
            assert (upserted.data["public_key"], upserted.data["session"]) == (phone, None)
            assert removed.data == {"public_key": phone}
            assert await s.gateway.replay(events[3].id, 1) == [removed]

    run(main())


@pytest.mark.parametrize("held", [None, "", "rubbish", "other:1", "{epoch}:99", "{epoch}:-1"])
def test_a_position_that_cannot_be_replayed_gets_a_resync_with_the_current_one(
    held: str | None,
) -> None:
    async def main() -> None:
        async with scene() as s:
            current = await s.gateway.position()
            asked = held.format(epoch=current.partition(":")[0]) if held else held
            async with s.gateway.stream(asked) as response:
                events = (e async for e in read_events(response) if e.name is not None)
                resync = await anext(events)
                assert (resync.name, resync.id, resync.data) == ("resync", current, {})
                await s.service.admin.change_location("hq", mtu=1380)
                assert (await anext(events)).name == "location_changed"

    run(main())


def test_a_revision_trimmed_from_the_changelog_gets_a_resync() -> None:
    async def main() -> None:
        async with scene(changelog=3) as s:
            held = await s.gateway.position()
            epoch, _, revision = held.partition(":")
            for mtu in range(1400, 1404):
                await s.service.admin.change_location("hq", mtu=mtu)
            [event] = await s.gateway.replay(held, 1)
            assert (event.name, event.id) == ("resync", f"{epoch}:{int(revision) + 4}")
            events = await s.gateway.replay(f"{epoch}:{int(revision) + 1}", 3)
            assert {e.name for e in events} == {"location_changed"}

    run(main())


def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    async def main() -> None:
        async with scene(heartbeat=0.05) as s, s.gateway.stream(await s.gateway.position()) as r:
            events = read_events(r)
            assert [(await anext(events)).id for _ in range(3)] == [
                "stream",
                "heartbeat",
                "heartbeat",
            ]

    run(main())


def test_a_core_without_a_stream_answers_404() -> None:
    async def main() -> None:
        async with scene(stream=False) as s:
            assert (await s.gateway.http.get("changes")).status_code == 404

    run(main())


def test_a_restart_keeps_epoch_revision_stream_position_and_live_sessions() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            before = await s.gateway.state()
            held = await s.gateway.position()
            await s.service.kill()
            await s.service.start()
            assert await s.gateway.state() == before
            assert before["peers"][0]["session"] == session
            await s.service.admin.change_location("hq", mtu=1380)
            [event] = await s.gateway.replay(held, 1)
            assert event.name == "location_changed"

    run(main())


def test_stopping_the_core_ends_open_streams_at_once() -> None:
    async def main() -> None:
        async with scene() as s, s.gateway.stream(await s.gateway.position()) as response:
            events = read_events(response)
            await anext(events)
            await asyncio.wait_for(s.service.stop(), 1)
            assert [e async for e in events] == []

    run(main())


def test_the_database_and_its_folder_are_their_owners_alone() -> None:
    async def main() -> None:
        async with served_scene() as s:
            await s.connect()
            folder = s.mail.parent / "core"
            assert folder.stat().st_mode & 0o777 == 0o700
            modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
            assert modes == dict.fromkeys(("core.db", "core.db-wal", "core.db-shm"), 0o600)

    run(main())


def applied(**members: Any) -> dict[str, Any]:
    return {
        "epoch": "e",
        "revision": 1,
        "applied_at": "2026-11-24T03:00:00+01:00",
        "refused": [],
        **members,
    }


def test_a_gzip_body_is_accepted() -> None:
    async def main() -> None:
        async with scene() as s:
            response = await s.gateway.http.post(
                "applied",
                content=gzip.compress(json.dumps(applied(revision=7)).encode()),
                headers={"content-encoding": "gzip"},
            )
            assert response.status_code == 202
            [gateway] = await s.service.admin.gateways()
            assert gateway["applied"]["revision"] == 7

    run(main())


@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [
        (b"not gzip", "gzip", 400),
        (gzip.compress(b"{}")[:-4], "gzip", 400),
        (gzip.compress(bytes(17 * 1024 * 1024)), "gzip", 413),
        (b"{}", "br", 415),
        (b"not JSON", "identity", 400),
        (b"[]", "identity", 400),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(content: bytes, encoding: str, status: int) -> None:
    async def main() -> None:
        async with scene() as s:
            response = await s.gateway.http.post(
                "applied", content=content, headers={"content-encoding": encoding}
            )
            assert response.status_code == status

    run(main())


@pytest.mark.parametrize(
    "members",
    [
        {"epoch": "with space"},
        {"epoch": None},
        {"revision": "1"},
        {"revision": -1},
        {"applied_at": "2026-11-24T03:00:00"},
        {"refused": None},
    ],
)
def test_a_malformed_applied_is_400(members: dict[str, Any]) -> None:
    async def main() -> None:
        async with scene() as s:
            response = await s.gateway.http.post("applied", json=applied(**members))
            assert (response.status_code, response.json()["error"]) == (400, "malformed")

    run(main())


@pytest.mark.parametrize(
    "members",
    [
        {"public_key": "A" * 44},
        {"latest_handshake": "2026-11-24T03:00:00"},
        {"rx_bytes": -1},
        {"tx_bytes": 1.5},
    ],
)
def test_malformed_stats_are_400(members: dict[str, Any]) -> None:
    async def main() -> None:
        async with scene() as s:
            peer = peer_stats(s.laptop, None) | members
            assert (await s.gateway.stats(peer, now=START)).status_code == 400
            assert await s.service.admin.stats() == []

    run(main())


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("applied", '{"revision": 1, "epoch": "x", "revision": 2, "applied_at": "%s", "refused": []}'),
        ("session-ends", '{"ends": [], "ends": []}'),
        (
            "applied",
            '{"epoch": "x", "revision": 2, "applied_at": "%s", "refused": [], "more": [{"a": 1, "a": 2}]}',
        ),
    ],
)
def test_a_report_that_repeats_a_key_is_400(path: str, text: str) -> None:
    async def main() -> None:
        async with scene() as s:
            content = text.replace("%s", format_time(START))
            response = await s.gateway.http.post(path, content=content)
            assert (response.status_code, response.json()["error"]) == (400, "malformed")
            assert "repeats a key" in response.json()["message"]

    run(main())


def test_more_than_5000_peers_in_a_report_are_413() -> None:
    async def main() -> None:
        async with scene() as s:
            peers = [peer_stats(s.laptop, None)] * 5001
            assert (await s.gateway.stats(*peers, now=START)).status_code == 413

    run(main())


def test_reported_counters_are_kept_per_gateway_and_peer() -> None:
    async def main() -> None:
        async with scene() as s:
            for rx in (1, 5):
                peer = peer_stats(s.laptop, "s-1", rx_bytes=rx, latest_handshake=format_time(START))
                assert (await s.gateway.stats(peer, now=START)).status_code == 202
            [row] = await s.service.admin.stats()
            assert (row["gateway"], row["public_key"], row["rx_bytes"]) == ("gw1", s.laptop, 5)
            assert row["latest_handshake"] == format_time(START)
            assert row["endpoint"] == "203.0.113.9:51000"

    run(main())


def test_a_reported_end_is_stored_once_and_ends_the_session_with_a_new_revision() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            end = {
                "session_id": session["id"],
                "public_key": s.laptop,
                "reason": "idle",
                "ended_at": format_time(START),
                "latest_handshake": None,
                "rx_bytes": 1,
                "tx_bytes": 2,
            }
            before = (await s.gateway.state())["revision"]
            for _ in range(2):
                response = await s.gateway.http.post("session-ends", json={"ends": [end]})
                assert response.status_code == 202
            [stored] = await s.service.admin.session_ends()
            assert {name: stored[name] for name in end} == end
            [held] = await s.service.admin.sessions()
            assert held["reason"] == "idle"
            state = await s.gateway.state()
            assert (state["revision"], state["peers"][0]["session"]) == (before + 1, None)

    run(main())


def test_an_end_of_an_unknown_session_is_stored() -> None:
    async def main() -> None:
        async with scene() as s:
            end = {
                "session_id": "s-of-a-lost-database",
                "public_key": s.laptop,
                "reason": "expired",
                "ended_at": format_time(START),
                "latest_handshake": format_time(START),
                "rx_bytes": 1,
                "tx_bytes": 2,
            }
            before = await s.gateway.position()
            response = await s.gateway.http.post("session-ends", json={"ends": [end]})
            assert response.status_code == 202
            assert len(await s.service.admin.session_ends()) == 1
            assert await s.gateway.position() == before

    run(main())


def test_two_gateways_of_a_location_both_get_a_grant() -> None:
    gateways = [
        {"name": "gw1", "location": "hq", "token": "one"},
        {"name": "gw2", "location": "hq", "token": "two"},
    ]

    async def main() -> None:
        async with (
            scene(gateways=gateways) as s,
            following(s.gateway),
            following(Gateway(s.service, "two")) as second,
        ):
            session = await s.connect()
            for gateway in (s.gateway, second):
                assert [e.data["session"] for e in gateway.events] == [session]

    run(main())
