import asyncio
import base64
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.sandbox.parts import Scene, run, scene

SECRET = "whsec_" + base64.b64encode(os.urandom(32)).decode()


@dataclass(slots=True)
class Agent:
    """The push endpoint of an agent: verifies signatures, then gives the next of ``answers``.

    Without any it holds what was pushed.
    """

    bodies: list[dict[str, Any]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    pushed: asyncio.Event = field(default_factory=asyncio.Event)

    async def changes(self, request: Request) -> Response:
        raw = await request.body()
        Webhook(SECRET).verify(raw, dict(request.headers))
        body = json.loads(raw)
        self.bodies.append(body)
        self.pushed.set()
        revision = int(body["changes"][-1]["id"].rpartition(":")[2])
        status, answer = self.answers.pop(0) if self.answers else (200, {"revision": revision, "refused": []})
        return JSONResponse(answer, status)


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def pushed_scene(**members: Any) -> AsyncIterator[tuple[Scene, Agent]]:
    agent = Agent()
    app = Starlette(routes=[Route("/v1/changes", agent.changes, methods=["POST"])])
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    server = Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    gateway = {
        "name": "gw1",
        "location": "hq",
        "token": "one",
        "push_url": f"http://127.0.0.1:{port}/v1/changes",
        "push_secret": SECRET,
    }
    try:
        async with scene(gateways=[gateway], stream=False, **members) as s:
            # The pusher takes up the location within a second of its creation.
            await asyncio.sleep(1.1)
            yield s, agent
    finally:
        server.should_exit = True
        await task
        sock.close()


def test_a_grant_is_pushed_signed_and_the_answer_confirms_it() -> None:
    async def main() -> None:
        async with pushed_scene() as (s, agent):
            session = await s.connect()
            [body] = agent.bodies
            assert body == {
                "location": "1",
                "changes": [
                    {
                        "id": await s.gateway.position(),
                        "type": "session_granted",
                        "data": {"public_key": s.laptop, "session": session},
                    }
                ],
            }

    run(main())


def test_a_peer_refused_in_the_answer_gets_no_psk() -> None:
    async def main() -> None:
        async with pushed_scene() as (s, agent):
            refused = [{"public_key": s.laptop, "reason": "own key"}]
            agent.answers.append((200, {"revision": 99, "refused": refused}))
            response = await s.finish(await s.token(), s.code())
            assert (response.status_code, response.json()["error"]) == (502, "gateway_refused")

    run(main())


def test_a_push_that_fails_or_does_not_fit_is_tried_again() -> None:
    async def main() -> None:
        async with pushed_scene() as (s, agent):
            agent.answers += [(503, {}), (409, {"revision": 1})]
            await s.connect()
            assert len(agent.bodies) == 3
            assert agent.bodies[0] == agent.bodies[1] == agent.bodies[2]

    run(main())


def test_changes_that_came_meanwhile_are_pushed_together() -> None:
    async def main() -> None:
        async with pushed_scene() as (s, agent):
            agent.answers.append((503, {}))
            for mtu in (1400, 1399, 1398):
                await s.service.admin.change_location("hq", mtu=mtu)
            while sum(len(body["changes"]) for body in agent.bodies[1:]) < 3:
                agent.pushed.clear()
                await asyncio.wait_for(agent.pushed.wait(), 3)
            sent = [change["id"] for body in agent.bodies[1:] for change in body["changes"]]
            assert sent == sorted(set(sent))

    run(main())
