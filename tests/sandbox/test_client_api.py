import asyncio

from tests.sandbox.parts import Gateway, following, new_key, run, scene, served_scene


def test_finishing_waits_until_the_gateway_has_the_session() -> None:
    async def main() -> None:
        async with scene() as s:
            s.gateway.confirms = False
            async with following(s.gateway):
                waiting = asyncio.create_task(s.finish(await s.token(), s.code()))
                await asyncio.sleep(0.2)
                assert not waiting.done()
                [granted] = s.gateway.events
                epoch, _, revision = granted.id.partition(":")
                await s.gateway.apply(f"{epoch}:{int(revision) - 1}")
                await s.gateway.apply(f"other:{revision}")
                await asyncio.sleep(0.1)
                assert not waiting.done()
                await s.gateway.apply(f"{epoch}:{int(revision) + 3}")
                assert (await asyncio.wait_for(waiting, 2)).status_code == 200

    run(main())


def test_the_answer_has_all_that_a_tunnel_needs() -> None:
    async def main() -> None:
        async with served_scene() as s:
            response = await s.finish(await s.token(), s.code())
            answer = response.json()
            assert response.headers["cache-control"] == "no-store"
            [location] = await s.service.admin.locations()
            assert answer | {"session": None} == {
                "location": {"id": "1", "name": "hq", "mfa_required": True},
                "endpoint": "127.0.0.1:51820",
                "server_public_key": location["server_public_key"],
                "addresses": ["10.8.0.2/32", "fd00:8::2/128"],
                "allowed_ips": ["10.8.0.0/24", "fd00:8::/64"],
                "persistent_keepalive": 25,
                "mtu": None,
                "session": None,
            }

    run(main())


def test_a_refused_peer_gets_no_psk_and_the_session_is_revoked() -> None:
    async def main() -> None:
        async with served_scene() as s:
            s.gateway.refuse.add(s.laptop)
            response = await s.finish(await s.token(), s.code())
            assert (response.status_code, response.json()["error"]) == (502, "gateway_refused")
            assert "prefix claimed" in response.json()["message"]
            assert "preshared_key" not in response.text
            assert await s.service.admin.sessions(live=True) == []
            await asyncio.sleep(0.1)
            assert [e.name for e in s.gateway.events] == ["session_granted", "session_revoked"]

    run(main())


def test_a_refused_peer_does_not_concern_another() -> None:
    async def main() -> None:
        async with served_scene() as s:
            s.gateway.refuse.add(new_key())
            await s.connect()

    run(main())


def test_without_a_confirmation_the_session_is_taken_back() -> None:
    async def main() -> None:
        async with scene(applied_timeout=0.2) as s:
            response = await s.finish(await s.token(), s.code())
            assert (response.status_code, response.json()["error"]) == (504, "gateway_timeout")
            [session] = await s.service.admin.sessions()
            assert session["reason"] == "revoked"

    run(main())


def test_every_connected_gateway_has_to_confirm_before_the_time_is_up() -> None:
    gateways = [
        {"name": "gw1", "location": "hq", "token": "one"},
        {"name": "gw2", "location": "hq", "token": "two"},
    ]

    async def main() -> None:
        async with scene(gateways=gateways, applied_timeout=0.6) as s:
            silent = Gateway(s.service, "two", confirms=False)
            async with following(s.gateway), following(silent):
                waiting = asyncio.create_task(s.finish(await s.token(), s.code()))
                await asyncio.sleep(0.3)
                assert not waiting.done()
                await silent.apply(silent.events[0].id)
                assert (await asyncio.wait_for(waiting, 0.2)).status_code == 200
                s.clock.advance(30)
                # A gateway that stays silent to the end does not lock everybody out.
                assert (await s.finish(await s.token(), s.code())).status_code == 200

    run(main())


def test_the_configuration_of_a_device_holds_no_secret_and_needs_its_user() -> None:
    async def main() -> None:
        async with scene() as s:
            answer = await s.post("config", user="alice", device_public_key=s.laptop)
            assert answer.status_code == 200
            assert "session" not in answer.json()
            assert "preshared_key" not in answer.text
            other = await s.post("config", user="bob", device_public_key=s.laptop)
            assert (other.status_code, other.json()["error"]) == (404, "unknown_device")

    run(main())


def test_no_code_is_used_up_while_the_gateway_is_not_known() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.change_location("hq", endpoint=None)
            response = await s.start()
            assert (response.status_code, response.json()["error"]) == (503, "gateway_unknown")

    run(main())


def test_an_unknown_path_and_a_wrong_method_are_json_errors() -> None:
    async def main() -> None:
        async with scene() as s:
            response = await s.post("nowhere")
            assert (response.status_code, response.json()["error"]) == (404, "not_found")
            response = await s.gateway.http.get("applied")
            assert (response.status_code, response.json()["error"]) == (405, "method_not_allowed")

    run(main())


def test_a_gateway_that_has_lost_its_stream_is_not_waited_for() -> None:
    gateways = [
        {"name": "gw1", "location": "hq", "token": "one"},
        {"name": "gw2", "location": "hq", "token": "two"},
    ]

    async def main() -> None:
        async with scene(gateways=gateways) as s, following(s.gateway):
            async with following(Gateway(s.service, "two")):
                s.clock.advance(100)
                listed = await s.service.admin.gateways()
                assert [gateway["connected"] for gateway in listed] == [True, True]
            s.clock.advance(6)
            await asyncio.wait_for(s.connect(), 2)
            listed = await s.service.admin.gateways()
            assert [gateway["connected"] for gateway in listed] == [True, False]

    run(main())
