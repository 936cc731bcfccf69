"""A clock to set, a gateway's side of the protocol, and a core with one user."""

import asyncio
import base64
import json
import os
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pyotp

from agent.encoding import format_time
from agent.sandbox.mail import MailServer, code_in, messages
from agent.sandbox.service import CoreService, running_core
from agent.sandbox.urls import core_url

T = TypeVar("T")
START = 1_800_000_000.0


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def new_key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


@dataclass(slots=True)
class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass(slots=True)
class Event:
    """``name`` is None for a comment, whose text is in ``id``."""

    name: str | None
    id: str
    data: Any


async def read_events(response: httpx.Response) -> AsyncIterator[Event]:
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line.startswith(":"):
            yield Event(None, line[1:].strip(), None)
        elif line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
            fields = {}


def connection(service: CoreService) -> httpx.AsyncClient:
    at = core_url(service.url)
    return httpx.AsyncClient(
        base_url=at.base + "/",
        transport=httpx.AsyncHTTPTransport(uds=at.socket, verify=at.verify),
        timeout=15,
    )


@dataclass(slots=True)
class Gateway:
    """Follows the stream and confirms every revision, refusing the public keys in ``refuse``."""

    service: CoreService
    token: str = ""
    refuse: set[str] = field(default_factory=set)
    confirms: bool = True
    events: list[Event] = field(default_factory=list)
    http: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.http = connection(self.service)
        self.http.base_url = self.http.base_url.join("gateway/v1/")
        self.http.headers["authorization"] = f"Bearer {self.token or self.service.gateway_token}"

    async def state(self) -> dict[str, Any]:
        response = await self.http.get("state")
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def position(self) -> str:
        state = await self.state()
        return f"{state['epoch']}:{state['revision']}"

    def stream(self, last_event_id: str | None) -> Any:
        headers = {} if last_event_id is None else {"last-event-id": last_event_id}
        # Longer than core's heartbeat, or a follower is lost on a slow machine while nothing happens.
        return self.http.stream("GET", "changes", headers=headers, timeout=15)

    async def apply(self, position: str) -> httpx.Response:
        epoch, _, revision = position.partition(":")
        body = {
            "epoch": epoch,
            "revision": int(revision),
            "applied_at": format_time(START),
            "refused": [{"public_key": key, "reason": "prefix claimed"} for key in self.refuse],
        }
        return await self.http.post("applied", json=body)

    async def replay(self, last_event_id: str | None, count: int) -> list[Event]:
        """The first events of a stream opened there, comments left out."""
        found: list[Event] = []
        async with self.stream(last_event_id) as response:
            assert response.status_code == 200
            async for event in read_events(response):
                if event.name is not None:
                    found.append(event)
                if len(found) == count:
                    break
        return found

    async def follow(self, opened: asyncio.Event) -> None:
        async with self.stream(await self.position()) as response:
            async for event in read_events(response):
                opened.set()
                if event.name is None:
                    continue
                self.events.append(event)
                if self.confirms:
                    assert (await self.apply(event.id)).status_code == 202

    async def stats(self, *peers: dict[str, Any], now: float) -> httpx.Response:
        state = await self.state()
        body = {
            "sent_at": format_time(now),
            "epoch": state["epoch"],
            "revision": state["revision"],
            "agent": {"version": "0.1.0", "started_at": format_time(START)},
            "peers": peers,
        }
        return await self.http.post("stats", json=body)


def peer_stats(public_key: str, session_id: str | None, **members: Any) -> dict[str, Any]:
    return {
        "public_key": public_key,
        "session_id": session_id,
        "endpoint": "203.0.113.9:51000",
        "latest_handshake": None,
        "rx_bytes": 0,
        "tx_bytes": 0,
        **members,
    }


def _open_streams(service: CoreService) -> int:
    """How many change streams core has open; none when it does not run."""
    try:
        return sum(held.streams for held in service.core.gateways.present.values())
    except RuntimeError:
        return 0


@asynccontextmanager
async def following(gateway: Gateway) -> AsyncIterator[Gateway]:
    opened = asyncio.Event()
    task = asyncio.create_task(gateway.follow(opened))
    await asyncio.wait_for(opened.wait(), 5)
    try:
        yield gateway
    finally:
        before = _open_streams(gateway.service)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await gateway.http.aclose()
        # Core's clock is a test's to set: it must not move before core has noticed.
        async with asyncio.timeout(5):
            while before and _open_streams(gateway.service) >= before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@dataclass(slots=True)
class Scene:
    """A location hq that requires MFA; alice with TOTP and e-mail, her laptop, a mail server."""

    service: CoreService
    gateway: Gateway
    clock: Clock
    mail: Path
    laptop: str
    totp: pyotp.TOTP

    def code(self) -> str:
        return self.totp.at(int(self.clock.now))

    def wrong_code(self) -> str:
        near = {self.totp.at(int(self.clock.now), counter_offset=n) for n in range(-12, 3)}
        return next(code for n in range(100) if (code := f"{n:06}") not in near)

    async def post(self, path: str, **body: str) -> httpx.Response:
        async with connection(self.service) as client:
            return await client.post(f"client/v1/{path}", json=body)

    async def start(self, method: str = "totp") -> httpx.Response:
        return await self.post("mfa/start", user="alice", device_public_key=self.laptop, method=method)

    async def token(self, method: str = "totp") -> str:
        response = await self.start(method)
        assert response.status_code == 200, response.text
        return str(response.json()["token"])

    async def finish(self, token: str, code: str) -> httpx.Response:
        return await self.post("mfa/finish", token=token, code=code)

    def mailed_code(self) -> str:
        code = code_in(messages(self.mail)[-1])
        assert code is not None
        return code

    async def connect(self) -> dict[str, Any]:
        """The session of a successful authentication by TOTP."""
        response = await self.finish(await self.token(), self.code())
        assert response.status_code == 200, response.text
        return dict(response.json()["session"])


@asynccontextmanager
async def scene(**members: Any) -> AsyncIterator[Scene]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        async with (
            MailServer(root / "mail") as mail,
            running_core(root, clock=clock, smtp_port=mail.port, **members) as service,
        ):
            admin = service.admin
            await admin.add_location(
                "hq",
                addresses=["10.8.0.1/24", "fd00:8::1/64"],
                listen_port=51820,
                endpoint="127.0.0.1:51820",
                server_public_key=new_key(),
            )
            await admin.add_user("alice", "alice@example.com")
            totp = pyotp.TOTP(await admin.enable_totp("alice"))
            await admin.enable_email("alice")
            laptop = new_key()
            await admin.add_device("hq", "alice-laptop", laptop, user="alice")
            gateway = Gateway(service)
            try:
                yield Scene(service, gateway, clock, root / "mail", laptop, totp)
            finally:
                await gateway.http.aclose()


@asynccontextmanager
async def served_scene(**members: Any) -> AsyncIterator[Scene]:
    """The same with the gateway following the stream."""
    async with scene(**members) as held, following(held.gateway):
        yield held


async def silent(held: Scene, seconds: float, *gateways: Gateway) -> None:
    """Time goes by; these gateways (none: the first) say at its end, and 1 s before, that nothing changed."""
    for step in (seconds - 1, 1):
        held.clock.advance(step)
        for gateway in gateways or (held.gateway,):
            assert (await gateway.stats(now=held.clock.now)).status_code == 202
