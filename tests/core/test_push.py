from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from standardwebhooks.webhooks import Webhook

from agent.core.push import push_app, webhook_of
from agent.errors import AgentError, ConfigError, DeviceError
from agent.model import RefusedPeer, SessionRevoked
from agent.ports import Outcome, Position, Verdict
from tests.core.fakes import FakeInbox, body, key, peer, run

SECRET = "whsec_" + base64.b64encode(b"a push secret of 32 bytes length").decode()
OTHER = "whsec_" + base64.b64encode(b"another secret of 32 bytes size!").decode()


def signed(content: bytes, secret: str = SECRET, age: float = 0.0) -> dict[str, str]:
    at = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age)
    return {
        "webhook-id": "msg-1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg-1", at, content.decode("latin-1")),
        "content-type": "application/json",
    }


def revoked(*revisions: int, epoch: str = "b7e1") -> list[dict[str, Any]]:
    data = {"public_key": key(1), "session_id": "s-19"}
    return [{"id": f"{epoch}:{number}", "type": "session_revoked", "data": data} for number in revisions]


def push(*changes: Any, location: Any = "7") -> bytes:
    return body({"location": location, "changes": list(changes)})


@asynccontextmanager
async def listening(
    inbox: FakeInbox, location: str | None = "7", **changed: Any
) -> AsyncIterator[httpx.AsyncClient]:
    app = push_app(inbox, SECRET, lambda: location, **changed)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    task = asyncio.create_task(server.serve([listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
            yield client
    finally:
        server.should_exit = True
        await task
        listener.close()


def send(
    inbox: FakeInbox,
    content: bytes,
    headers: dict[str, str] | None = None,
    location: str | None = "7",
    **changed: Any,
) -> httpx.Response:
    async def main() -> httpx.Response:
        async with listening(inbox, location, **changed) as client:
            return await client.post(
                "/v1/changes",
                content=content,
                headers=signed(content) if headers is None else headers,
            )

    return run(main())


def holding(revision: int = 42) -> FakeInbox:
    return FakeInbox(Position("b7e1", revision))


def test_a_signed_push_is_applied_and_answered_with_the_revision_held() -> None:
    inbox = holding()
    response = send(inbox, push(*revoked(43, 44)))
    assert response.status_code == 200
    assert response.json() == {"revision": 44, "refused": []}
    assert [change.revision for change in inbox.changes] == [43, 44]
    assert isinstance(inbox.changes[0].body, SessionRevoked)
    assert inbox.bytes_heard == 1


def test_the_answer_waits_for_the_kernel_and_lists_who_is_refused() -> None:
    class Waiting(FakeInbox):
        def submit(self, message: Any, received_at: float) -> asyncio.Future[Outcome]:
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            refused = (RefusedPeer(key(9), "prefix_claimed"),)
            outcome = Outcome(Verdict.APPLIED, Position("b7e1", 43), refused)
            asyncio.get_running_loop().call_later(0.3, future.set_result, outcome)
            return future

    async def main() -> None:
        content = push(*revoked(43))
        async with listening(Waiting(Position("b7e1", 42))) as client:
            began = asyncio.get_running_loop().time()
            response = await client.post("/v1/changes", content=content, headers=signed(content))
            assert asyncio.get_running_loop().time() - began >= 0.3
        assert response.json() == {
            "revision": 43,
            "refused": [{"public_key": key(9), "reason": "prefix_claimed"}],
        }

    run(main())


def test_a_revision_already_held_is_a_200_without_effect() -> None:
    inbox = holding()
    response = send(inbox, push(*revoked(41, 42)))
    assert (response.status_code, response.json()) == (200, {"revision": 42, "refused": []})
    assert inbox.changes == []


def test_changes_already_held_are_skipped_and_the_rest_applied() -> None:
    inbox = holding()
    assert send(inbox, push(*revoked(41, 42, 43))).json()["revision"] == 43
    assert [change.revision for change in inbox.changes] == [43]


def test_the_same_request_again_is_harmless() -> None:
    inbox = holding()
    content = push(*revoked(43))
    headers = signed(content)

    async def main() -> list[int]:
        async with listening(inbox) as client:
            return [
                (await client.post("/v1/changes", content=content, headers=headers)).status_code
                for _ in range(2)
            ]

    assert run(main()) == [200, 200]
    assert len(inbox.changes) == 1


@pytest.mark.parametrize("change", [revoked(44), revoked(43, epoch="c0de")])
def test_a_gap_or_another_epoch_is_a_409_and_makes_the_agent_pull(change: list[Any]) -> None:
    inbox = holding()
    response = send(inbox, push(*change))
    assert (response.status_code, response.json()) == (409, {"revision": 42})
    assert inbox.pull_wanted.is_set()


def test_another_location_is_a_409_and_makes_the_agent_pull() -> None:
    inbox = holding()
    response = send(inbox, push(*revoked(43), location="8"))
    assert (response.status_code, response.json()) == (409, {"revision": 42})
    assert inbox.pull_wanted.is_set()
    assert inbox.changes == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        push(),
        push({"id": "b7e1:43", "type": "peer_renamed", "data": {}}),
        push({"id": "43", "type": "peer_upserted", "data": peer()}),
        push(*revoked(43), location=7),
        push(*revoked(43), {"id": "b7e1:44", "type": "peer_removed", "data": {}}),
    ],
)
def test_a_malformed_push_of_cores_is_a_400_and_makes_the_agent_pull(content: bytes) -> None:
    inbox = holding()
    headers = signed(content)
    response = send(inbox, content, headers)
    if content == b"\xff\xfe":  # the scheme signs text: there is no signature for these bytes
        assert response.status_code == 401
        return
    assert response.status_code == 400
    assert response.json()["error"]
    assert inbox.pull_wanted.is_set()
    assert len(inbox.rubbish) == 1
    assert inbox.changes == []


def test_unsigned_wrongly_signed_and_stale_pushes_are_401_without_effect() -> None:
    content = push(*revoked(43))
    good = signed(content)
    refused = [
        {},
        {name: value for name, value in good.items() if name != "webhook-id"},
        {name: value for name, value in good.items() if name != "webhook-signature"},
        good | {"webhook-signature": ""},
        good | {"webhook-signature": "v1"},
        good | {"webhook-signature": "v1,"},
        good | {"webhook-signature": "v1,%%%"},
        good | {"webhook-signature": "v1,a,b"},
        good | {"webhook-signature": good["webhook-signature"].replace("v1", "v2")},
        good | {"webhook-signature": good["webhook-signature"][:-4] + "AAA="},
        good | {"webhook-id": "msg-2"},
        good | {"webhook-timestamp": "nan"},
        good | {"webhook-timestamp": "1e999"},
        good | {"webhook-timestamp": str(int(good["webhook-timestamp"]) + 1)},
        signed(content, OTHER),
        signed(content, age=301),
        signed(content, age=-360),
        signed(content + b" "),
    ]
    inbox = holding()

    async def main() -> None:
        async with listening(inbox) as client:
            for headers in refused:
                response = await client.post("/v1/changes", content=content, headers=headers)
                assert response.status_code == 401, headers
                assert SECRET not in response.text

    run(main())
    assert (inbox.changes, inbox.bytes_heard) == ([], 0)
    assert not inbox.pull_wanted.is_set()


def test_a_push_within_the_tolerance_and_with_a_rotated_key_is_taken() -> None:
    content = push(*revoked(43))
    headers = signed(content, age=290)
    other = signed(content, OTHER, age=290)["webhook-signature"]
    headers["webhook-signature"] = f"{other} {headers['webhook-signature']}"
    assert send(holding(), content, headers).status_code == 200


def test_a_push_over_the_size_limit_is_a_413() -> None:
    content = push(*revoked(43))
    assert send(holding(), content, max_body=len(content)).status_code == 200
    assert send(holding(), content, max_body=len(content) - 1).status_code == 413


def test_a_push_that_does_not_announce_its_size_is_bounded_too() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 1024

    async def main() -> int:
        async with listening(holding(), max_body=10_000) as client:
            headers = signed(b"")
            return (await client.post("/v1/changes", content=endless(), headers=headers)).status_code

    assert run(main()) == 413


def test_a_body_that_trickles_is_given_up() -> None:
    async def main() -> bytes:
        async with listening(holding(), body_timeout=0.3) as client:
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            lines = [f"{name}: {value}" for name, value in signed(b"{}").items()]
            head = ["POST /v1/changes HTTP/1.1", "Host: x", "Content-Length: 100", *lines]
            writer.write("\r\n".join([*head, "", "{"]).encode())
            status = await reader.readline()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            return status

    assert b" 408 " in run(main())


def test_before_the_first_state_a_push_is_a_503() -> None:
    content = push(*revoked(43))
    assert send(FakeInbox(), content, location=None).status_code == 503
    assert send(FakeInbox(), content, location="7").status_code == 503


def test_a_push_that_could_not_be_put_in_force_is_a_503_and_no_success() -> None:
    inbox = holding()
    inbox.raises = DeviceError("the interface is gone")
    response = send(inbox, push(*revoked(43)))
    assert (response.status_code, response.json()) == (503, {"error": "the interface is gone"})


def test_only_post_on_its_path_is_served() -> None:
    async def main() -> list[int]:
        async with listening(holding()) as client:
            return [
                (await client.get("/v1/changes")).status_code,
                (await client.get("/metrics")).status_code,
            ]

    assert run(main()) == [405, 404]


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        SECRET.removeprefix("whsec_"),
        "whsec_" + base64.b64encode(b"short").decode(),
        "whsec_ä",
        SECRET[:-9] + "!" + SECRET[-8:],
        SECRET + "\n",
    ],
)
def test_an_unusable_secret_is_a_configuration_error_that_does_not_quote_it(secret: str) -> None:
    with pytest.raises(ConfigError, match="push secret") as raised:
        webhook_of(secret)
    assert isinstance(raised.value, AgentError)
    assert len(secret) < 10 or secret.strip() not in str(raised.value)


def test_a_secret_without_padding_is_the_same_secret() -> None:
    at = dt.datetime.now(dt.UTC)
    first, second = webhook_of(SECRET), webhook_of(SECRET.rstrip("="))
    assert first.sign("a", at, "b") == second.sign("a", at, "b")
    assert json.loads(json.dumps(SECRET)) == SECRET
