import asyncio

import httpx
import pytest

from agent.sandbox.admin import AdminClient
from agent.sandbox.errors import Refusal
from tests.core.fakes import Request, core
from tests.sandbox.parts import new_key, run, scene, served_scene


def test_the_admin_api_wants_the_admin_token() -> None:
    async def main() -> None:
        async with scene() as s, httpx.AsyncClient(trust_env=False) as client:
            url = f"{s.service.url}/admin/v1/users"
            assert (await client.get(url)).status_code == 401
            for token in ("wrong", s.service.gateway_token):
                headers = {"authorization": f"Bearer {token}"}
                assert (await client.get(url, headers=headers)).status_code == 401

    run(main())


def test_switching_mfa_sends_location_changed_and_only_a_change_does() -> None:
    async def main() -> None:
        async with scene() as s:
            held = await s.gateway.position()
            await s.service.admin.change_location("hq", mfa_required=True)
            await s.service.admin.change_location("hq", endpoint="vpn.example.com:51820")
            assert await s.gateway.position() == held
            await s.service.admin.change_location("hq", mfa_required=False, idle_timeout=60)
            [event] = await s.gateway.replay(held, 1)
            assert event.name == "location_changed"
            assert event.data == {
                "location": {"id": "1", "name": "hq", "mfa_required": False},
                "interface": {"addresses": ["10.8.0.1/24", "fd00:8::1/64"], "listen_port": 51820},
                "session_policy": {
                    "idle_timeout": 60,
                    "connect_timeout": 180,
                    "max_lifetime": 43200,
                    "liveness": "gateway",
                },
            }

    run(main())


def test_a_member_set_to_null_is_absent_from_what_gateways_get() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.change_location("hq", listen_port=None, fwmark=7)
            assert (await s.gateway.state())["interface"] == {
                "addresses": ["10.8.0.1/24", "fd00:8::1/64"],
                "fwmark": 7,
            }

    run(main())


def test_devices_get_the_next_free_address_of_each_network() -> None:
    async def main() -> None:
        async with scene() as s:
            admin = s.service.admin
            await admin.add_device("hq", "a", new_key(), allowed_ips=["10.8.0.3/32"])
            device = await admin.add_device("hq", "b", new_key())
            assert device["allowed_ips"] == ["10.8.0.4/32", "fd00:8::3/128"]
            await admin.remove_device(device["id"])
            device = await admin.add_device("hq", "c", new_key())
            assert device["allowed_ips"] == ["10.8.0.4/32", "fd00:8::3/128"]

    run(main())


@pytest.mark.parametrize(
    ("prefix", "code"),
    [
        ("10.8.0.2/32", "prefix_taken"),
        ("10.8.0.1", "prefix_taken"),
        ("10.8.0.0/24", "prefix_taken"),
        ("0.0.0.0/0", "prefix_taken"),
        ("192.168.7.9", "prefix_taken"),
        ("10.8.0.9/24", "bad_prefix"),
        ("::ffff:10.8.0.9", "bad_prefix"),
    ],
)
def test_a_prefix_belongs_to_one_device(prefix: str, code: str) -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.add_device("hq", "router", new_key(), allowed_ips=["192.168.7.0/24"])
            held = await s.gateway.position()
            with pytest.raises(Refusal) as refusal:
                await s.service.admin.add_device("hq", "x", new_key(), allowed_ips=[prefix])
            assert refusal.value.code == code
            assert await s.gateway.position() == held

    run(main())


def test_a_full_network_is_a_clear_error() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.add_location("small", addresses=["10.9.0.1/30"])
            await s.service.admin.add_device("small", "a", new_key())
            with pytest.raises(Refusal, match=r"No address of 10\.9\.0\.0/30 is free"):
                await s.service.admin.add_device("small", "b", new_key())

    run(main())


def test_many_devices_are_registered_together_or_not_at_all() -> None:
    async def main() -> None:
        async with scene() as s:
            wanted = [{"location": "hq", "name": f"d{n}", "public_key": new_key()} for n in range(3)]
            held = await s.gateway.position()
            with pytest.raises(Refusal):
                await s.service.admin.add_devices([*wanted, wanted[0]])
            assert await s.gateway.position() == held
            await s.service.admin.add_devices(wanted)
            assert len(await s.gateway.replay(held, 3)) == 3

    run(main())


@pytest.mark.parametrize("key", ["", "short", "A" * 43 + "=", "A" * 42 + "B="])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    async def main() -> None:
        async with scene() as s:
            with pytest.raises(Refusal) as refusal:
                await s.service.admin.add_device("hq", "x", key)
            assert (refusal.value.status, refusal.value.code) == (400, "bad_public_key")

    run(main())


def test_the_gateways_own_key_is_no_device() -> None:
    async def main() -> None:
        async with scene() as s:
            [location] = await s.service.admin.locations()
            with pytest.raises(Refusal, match="own public key"):
                await s.service.admin.add_device("hq", "x", location["server_public_key"])

    run(main())


def test_removing_a_device_ends_its_session() -> None:
    async def main() -> None:
        async with served_scene() as s:
            await s.connect()
            [device] = await s.service.admin.devices()
            await s.service.admin.remove_device(device["id"])
            [session] = await s.service.admin.sessions()
            assert session["reason"] == "peer_removed"
            assert (await s.gateway.state())["peers"] == []

    run(main())


def test_a_psk_is_never_answered_to_an_administrator() -> None:
    async def main() -> None:
        async with served_scene() as s:
            static = new_key()
            [device] = await s.service.admin.devices()
            changed = await s.service.admin.change_device(device["id"], preshared_key=static)
            assert changed["has_preshared_key"]
            session = await s.connect()
            shown = f"{changed}{await s.service.admin.sessions()}{await s.service.admin.devices()}"
            assert static not in shown
            assert session["preshared_key"] not in shown
            assert (await s.gateway.state())["peers"][0]["preshared_key"] == static

    run(main())


def test_unknown_members_are_refused_by_name() -> None:
    async def main() -> None:
        async with scene() as s:
            with pytest.raises(Refusal, match="mfa_requird"):
                await s.service.admin.change_location("hq", mfa_requird=False)

    run(main())


def test_an_unknown_location_user_device_and_session_are_404() -> None:
    async def main() -> None:
        async with scene() as s:
            admin = s.service.admin
            for attempt in (
                admin.change_location("nowhere", mtu=1400),
                admin.enable_totp("nobody"),
                admin.remove_device(99),
                admin.revoke("s-0"),
            ):
                with pytest.raises(Refusal) as refusal:
                    await attempt
                assert refusal.value.status == 404

    run(main())


def test_no_request_is_lost_on_a_connection_that_core_closes_after_an_answer() -> None:
    async def answers_once(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
        await writer.drain()
        await asyncio.sleep(1.0)  # what comes on it meanwhile is not read any more

    async def main() -> None:
        async with core() as told:
            told.on("devices", answers_once)
            async with AdminClient(told.url.removesuffix("/gateway/v1/"), "admin") as admin:
                assert [await admin.devices() for _ in range(3)] == [[], [], []]

    run(main())
