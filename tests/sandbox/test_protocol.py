"""Core and agent, written apart, read each other."""

import json

from agent.core.documents import encode_applied, encode_ends, encode_stats
from agent.core.messages import Resync, decode_event, decode_snapshot
from agent.encoding import parse_public_key
from agent.model import (
    Change,
    EndReason,
    LocationChanged,
    PeerRemoved,
    PeerStats,
    PeerUpserted,
    SessionEnd,
    SessionGranted,
    SessionRevoked,
)
from tests.sandbox.parts import START, new_key, run, scene, served_scene


def test_the_agent_reads_the_whole_state_without_refusing_anything() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            admin = s.service.admin
            await admin.add_device("hq", "static", new_key(), preshared_key=new_key(), mfa_exempt=True)
            body = (await s.gateway.http.get("state")).content
            snapshot = decode_snapshot(body, 0.0)
            assert snapshot.unreadable == ()
            assert [peer.fault for peer in snapshot.peers] == [None, None]
            assert f"{snapshot.epoch}:{snapshot.revision}" == await s.gateway.position()
            laptop, static = snapshot.peers
            assert laptop.session is not None
            assert (laptop.session.id, laptop.session.granted_at) == (session["id"], START)
            assert static.preshared_key is not None

    run(main())


def test_the_agent_reads_every_kind_of_event() -> None:
    async def main() -> None:
        async with served_scene() as s:
            held = await s.gateway.position()
            admin = s.service.admin
            session = await s.connect()
            await admin.revoke(session["id"])
            await admin.change_location("hq", mfa_required=False)
            device = await admin.add_device("hq", "phone", new_key())
            await admin.remove_device(device["id"])
            bodies = []
            for event in await s.gateway.replay(held, 5):
                assert event.name is not None
                change = decode_event(event.name, event.id, json.dumps(event.data).encode())
                assert isinstance(change, Change)
                bodies.append(change.body)
            kinds = [SessionGranted, SessionRevoked, LocationChanged, PeerUpserted, PeerRemoved]
            assert [type(body) for body in bodies] == kinds
            assert isinstance(bodies[0], SessionGranted)
            assert bodies[0].grant is not None
            [event] = await s.gateway.replay("other:1", 1)
            assert isinstance(decode_event("resync", event.id, b"{}"), Resync)

    run(main())


def test_core_takes_every_report_of_the_agents() -> None:
    async def main() -> None:
        async with scene() as s:
            key = parse_public_key(s.laptop)
            peer = PeerStats(key, "s-1", None, 0.0, 1, 2)
            end = SessionEnd("s-1", key, EndReason.EXPIRED, START, 0.0, 1, 2)
            for path, body in (
                ("applied", encode_applied("e", 1, START, [])),
                ("stats", encode_stats("e", 1, START, [peer], version="0.1.0", started_at=START)),
                ("session-ends", encode_ends([end])),
            ):
                response = await s.gateway.http.post(path, content=body)
                assert (response.status_code, response.text) == (202, "")

    run(main())
