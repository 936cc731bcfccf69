import asyncio
from typing import Any

import pytest

from agent.encoding import format_time, parse_time
from agent.sandbox.sessions import EXPIRY_GRACE, IDLE_GRACE, PSK_RETENTION
from tests.sandbox.parts import START, Gateway, Scene, following, peer_stats, run, scene, served_scene, silent


@pytest.fixture(autouse=True)
def swept_by_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.sandbox.core.SWEEP_INTERVAL", 3600.0)


async def report(s: Scene, session: dict[str, Any], **members: Any) -> None:
    peer = peer_stats(s.laptop, session["id"], **members)
    assert (await s.gateway.stats(peer, now=s.clock.now)).status_code == 202


def sweep(s: Scene) -> list[str]:
    return [reason for _, reason in s.service.core.sweep(s.clock.now)]


async def last_event(s: Scene) -> Any:
    location = (await s.service.admin.locations())[0]
    held = f"{location['epoch']}:{location['revision'] - 1}"
    [event] = await s.gateway.replay(held, 1)
    return event


def test_a_session_ends_when_its_time_is_up() -> None:
    async def main() -> None:
        async with served_scene(sessions={"lifetime": 60}) as s:
            session = await s.connect()
            assert parse_time(session["expires_at"]) - parse_time(session["granted_at"]) == 60
            s.clock.advance(60 + EXPIRY_GRACE - 0.1)
            assert sweep(s) == []
            s.clock.advance(0.1)
            assert sweep(s) == ["expired"]
            event = await last_event(s)
            assert event.name == "session_revoked"
            assert event.data == {"public_key": s.laptop, "session_id": session["id"]}
            assert (await s.gateway.state())["peers"][0]["session"] is None

    run(main())


def test_a_session_that_expired_while_the_core_was_down_ends_at_its_start() -> None:
    async def main() -> None:
        async with served_scene(sessions={"lifetime": 60}) as s:
            await s.connect()
            await s.service.kill()
            s.clock.advance(70)
            await s.service.start()
            await asyncio.sleep(0.05)
            [held] = await s.service.admin.sessions()
            assert held["reason"] == "expired"

    run(main())


def test_a_lifetime_is_cut_to_the_ceiling_of_the_location() -> None:
    async def main() -> None:
        async with served_scene() as s:
            await s.service.admin.change_location("hq", max_lifetime=50)
            session = await s.connect()
            assert parse_time(session["expires_at"]) - parse_time(session["granted_at"]) == 50

    run(main())


def test_a_lowered_ceiling_ends_live_sessions() -> None:
    async def main() -> None:
        async with served_scene() as s:
            await s.connect()
            await s.service.admin.change_location("hq", max_lifetime=50)
            s.clock.advance(50 + EXPIRY_GRACE)
            assert sweep(s) == ["expired"]

    run(main())


def test_a_revoked_session_ends_with_an_event() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            revoked = await s.service.admin.revoke(session["id"])
            assert revoked["reason"] == "revoked"
            event = await last_event(s)
            assert (event.name, event.data["session_id"]) == ("session_revoked", session["id"])

    run(main())


def test_a_session_whose_client_has_gone_ends() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            await s.service.admin.change_location("hq", liveness="core", idle_timeout=100)
            s.clock.advance(50)
            await report(s, session, latest_handshake=format_time(s.clock.now))
            await silent(s, 100)
            assert sweep(s) == []
            await silent(s, 1)
            assert sweep(s) == ["idle"]
            assert (await last_event(s)).name == "session_revoked"

    run(main())


@pytest.mark.parametrize(
    ("members", "alive"),
    [
        ({"latest_handshake": START + 60}, True),
        ({"latest_handshake": START, "rx_bytes": 2}, True),
        ({"latest_handshake": START, "rx_bytes": 1, "tx_bytes": 9}, False),
        ({"latest_handshake": None, "rx_bytes": 148}, False),
    ],
)
def test_a_new_handshake_or_growing_rx_after_a_recent_one_is_a_sign_of_life(
    members: dict[str, Any], alive: bool
) -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            await s.service.admin.change_location("hq", liveness="core", idle_timeout=100)
            await report(s, session, latest_handshake=format_time(START), rx_bytes=1)
            await silent(s, 60)
            handshake = members["latest_handshake"]
            shown = None if handshake is None else format_time(handshake)
            await report(s, session, **(members | {"latest_handshake": shown}))
            await silent(s, 41)
            await silent(s, 1)
            assert sweep(s) == ([] if alive else ["idle"])

    run(main())


def test_rx_growing_without_any_handshake_is_no_connection() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            await s.service.admin.change_location("hq", liveness="core", connect_timeout=50)
            s.clock.advance(49)
            await report(s, session, rx_bytes=148)
            assert sweep(s) == []
            await silent(s, 2)
            assert sweep(s) == ["never_connected"]

    run(main())


def test_a_gateway_that_judges_for_itself_is_given_time_to_do_so_first() -> None:
    async def main() -> None:
        async with served_scene() as s:
            await s.connect()
            s.clock.advance(180 + IDLE_GRACE - 1)
            assert sweep(s) == []
            s.clock.advance(1)
            assert sweep(s) == ["never_connected"]

    run(main())


def test_silence_ends_nothing_while_no_gateway_is_there_to_report() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.change_location("hq", liveness="core", idle_timeout=100)
            async with following(s.gateway):
                session = await s.connect()
                await report(s, session, latest_handshake=format_time(START))
            await s.service.kill()
            s.clock.advance(1000)
            await s.service.start()
            assert sweep(s) == []
            async with following(Gateway(s.service)) as back:
                assert sweep(s) == []
                await silent(s, 2, back)
                assert sweep(s) == ["idle"]

    run(main())


def test_a_renewal_keeps_id_and_grant_time_and_stays_below_the_ceiling() -> None:
    async def main() -> None:
        async with served_scene(sessions={"lifetime": 60, "max_lifetime": 100}) as s:
            session = await s.connect()
            s.clock.advance(30)
            await s.service.admin.renew(session["id"], 60)
            event = await last_event(s)
            assert event.name == "session_granted"
            assert event.data["session"] == session | {"expires_at": format_time(START + 90)}
            await s.service.admin.renew(session["id"], 600, rotate=True)
            renewed = (await last_event(s)).data["session"]
            assert renewed["expires_at"] == format_time(START + 100)
            assert renewed["preshared_key"] != session["preshared_key"]
            assert renewed["granted_at"] == session["granted_at"]

    run(main())


def test_the_psk_of_an_ended_session_is_erased_and_its_grant_no_longer_replayed() -> None:
    async def main() -> None:
        async with served_scene() as s:
            held = await s.gateway.position()
            session = await s.connect()
            await s.service.admin.revoke(session["id"])
            assert [e.name for e in await s.gateway.replay(held, 2)] == [
                "session_granted",
                "session_revoked",
            ]
            s.clock.advance(PSK_RETENTION)
            sweep(s)
            [event] = await s.gateway.replay(held, 1)
            assert event.name == "resync"
            rows = s.service.core.store.rows("SELECT psk FROM sessions WHERE psk IS NOT NULL")
            assert rows == []

    run(main())


def test_the_changelog_itself_holds_no_psk() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            [device] = await s.service.admin.devices()
            await s.service.admin.change_device(device["id"], name="renamed")
            event = await last_event(s)
            assert event.data["session"] == session
            rows = s.service.core.store.rows("SELECT data FROM changes")
            assert all(session["preshared_key"] not in row["data"] for row in rows)

    run(main())


def test_nothing_of_a_failed_transaction_is_kept_or_announced() -> None:
    async def main() -> None:
        async with scene() as s:
            store, before = s.service.core.store, await s.gateway.position()

            def fail() -> None:
                with store.transaction():
                    store.append(1, "peer_removed", {"public_key": s.laptop})
                    raise ZeroDivisionError

            with store.watch(1) as changed:
                with pytest.raises(ZeroDivisionError):
                    fail()
                assert not changed.is_set()
            assert await s.gateway.position() == before

    run(main())
