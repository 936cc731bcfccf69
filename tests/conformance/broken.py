"""Cores that are broken in one way each: a proxy before a good one, which alters what it must not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from agent.encoding import format_time, parse_time
from tests.conformance.site import Site

_HOP = {"connection", "transfer-encoding", "content-length", "host", "date"}
Headers = MutableMapping[str, str]


@dataclass
class Asked:
    """A request on its way to the good core; what is changed here is what that gets."""

    method: str
    path: str
    headers: Headers
    body: bytes
    status: int = 0
    """What the good core answered."""

    @property
    def is_state(self) -> bool:
        return self.path == "state" and self.status == 200


@dataclass
class Proxy:
    """Passes everything on as it is; a broken core overrides one method."""

    site: Site
    url: str = ""
    core: httpx.AsyncClient = field(
        default_factory=lambda: httpx.AsyncClient(
            timeout=60, verify=False, limits=httpx.Limits(max_keepalive_connections=0)
        )
    )

    async def exercise(self, action: str, *keys: str) -> bool:
        return await self.site(action, *keys)

    def asked(self, asked: Asked) -> Response | None:
        """Look at a request, change it or answer it."""
        return None

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        """Change an answer that is whole."""
        return body

    def block(self, block: bytes) -> bytes:
        """Change an event or a comment of the stream, given with its blank line."""
        return block

    async def serve(self, request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in _HOP}
        asked = Asked(request.method, request.path_params["path"], headers, await request.body())
        if (own := self.asked(asked)) is not None:
            return own
        stack = contextlib.AsyncExitStack()
        to = self.site.service.gateway_url + asked.path
        try:
            sent = self.core.build_request(asked.method, to, headers=asked.headers, content=asked.body)
            got = await self.core.send(sent, stream=True)
            stack.push_async_callback(got.aclose)
            passed: Headers = {n: v for n, v in got.headers.items() if n not in _HOP}
            if asked.path == "changes" and got.status_code == 200:
                return StreamingResponse(self._blocks(got, stack), 200, passed)
            passed.pop("content-encoding", None)
            asked.status = got.status_code
            body = self.answered(asked, passed, await got.aread())
        except httpx.HTTPError:
            await stack.aclose()
            return Response(status_code=502)
        await stack.aclose()
        return Response(body, got.status_code, passed)

    async def _blocks(self, got: httpx.Response, stack: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
        async with stack:
            pending = b""
            with contextlib.suppress(httpx.HTTPError):
                async for chunk in got.aiter_raw():
                    *whole, pending = (pending + chunk).split(b"\n\n")
                    for block in whole:
                        yield self.block(block + b"\n\n")


def parts(block: bytes) -> dict[str, str]:
    """The fields of an event; none of a comment."""
    lines = (line.partition(": ") for line in block.decode().strip().split("\n"))
    return {name: value for name, _, value in lines if name}


def written(fields: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\n" for name, value in fields.items()).encode() + b"\n"


def renumbered(position: str, change: Callable[[int], int]) -> str:
    epoch, _, revision = position.partition(":")
    return f"{epoch}:{change(int(revision))}"


class Honest(Proxy):
    """Not broken at all: what the proxy itself does is no fault."""


@dataclass
class HoldsOneStream(Proxy):
    """A gateway's new stream is the end of its older one: allowed, and good against dead connections."""

    open: contextlib.AsyncExitStack | None = None

    async def _blocks(self, got: httpx.Response, stack: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
        if self.open is not None:
            await self.open.aclose()
        self.open = stack
        async for block in super()._blocks(got, stack):
            yield block


@dataclass
class LimitsRates(Proxy):
    """Every tenth report has to wait for a second."""

    count: int = 0

    def asked(self, asked: Asked) -> Response | None:
        self.count += asked.method == "POST"
        if self.count % 10:
            return None
        self.count += 1
        return Response(status_code=429, headers={"retry-after": "1"})


class WeakensTags(Proxy):
    """As proxies that compress do."""

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        if "etag" in headers:
            headers["etag"] = "W/" + headers["etag"]
        return body


class RefusesByBadRequest(Proxy):
    """What is not of the API is 400, as some frameworks have it."""

    def asked(self, asked: Asked) -> Response | None:
        wanted = {
            "state": "GET",
            "changes": "GET",
            "applied": "POST",
            "stats": "POST",
            "session-ends": "POST",
        }
        return None if wanted.get(asked.path) == asked.method else Response(status_code=400)


class ReadsTokensLeniently(Proxy):
    """Tokens are base64 to it, and the bits that are too many at their end are looked at by nobody."""

    def asked(self, asked: Asked) -> None:
        token = self.site.service.gateway_token
        scheme, _, sent = asked.headers.get("authorization", "").partition(" ")
        with contextlib.suppress(ValueError):
            if base64.urlsafe_b64decode(sent + "==") == base64.urlsafe_b64decode(token + "=="):
                asked.headers["authorization"] = f"{scheme} {token}"


class WritesOtherwise(Proxy):
    """The same in other words: white space, escapes, members left out or unknown, CRLF, a byte at a time."""

    _utc = re.compile(r'(:\d\d\.\d\d\d)Z"')

    def _written(self, text: str, **layout: Any) -> str:
        def sparse(value: Any) -> Any:
            if isinstance(value, list):
                return [sparse(entry) for entry in value]
            if not isinstance(value, dict):
                return value
            return {n: sparse(v) for n, v in value.items() if v is not None} | {"x-more": [1.5, {"of": None}]}

        written = json.dumps(sparse(json.loads(text)), **layout)
        return self._utc.sub(r'\g<1>000000+00:00"', written).replace("/", "\\/")

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        if asked.is_state:
            headers["content-type"] = "Application/JSON; charset=UTF-8"
            return self._written(body.decode(), indent=3).replace("\n", "\r\n\t").encode()
        return b'{"taken": true}' if asked.status == 202 else body

    def block(self, block: bytes) -> bytes:
        fields = parts(block)
        lines = [f"{name}:{value}" for name, value in fields.items() if name != "data"]
        if "data" in fields:
            lines += [f"data: {line}" for line in self._written(fields["data"], indent=1).split("\n")]
            return "\r\n".join([": traced", "retry: 3000", *lines, "", ""]).encode()
        return block.replace(b"\n", b"\r\n")

    async def _blocks(self, got: httpx.Response, stack: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
        async for block in super()._blocks(got, stack):
            for byte in block:
                yield bytes([byte])


GOOD: list[type[Proxy]] = [
    Honest,
    HoldsOneStream,
    LimitsRates,
    WeakensTags,
    RefusesByBadRequest,
    ReadsTokensLeniently,
    WritesOtherwise,
]


class HasNoChanges(Proxy):
    """No route at all, whoever asks: it is polled."""

    def asked(self, asked: Asked) -> Response | None:
        return Response(status_code=404) if asked.path == "changes" else None


class LetsItsStreamOpen(Proxy):
    """Asks for tokens everywhere but for the stream."""

    def asked(self, asked: Asked) -> None:
        if asked.path == "changes":
            asked.headers.setdefault("authorization", f"Bearer {self.site.service.gateway_token}")


@dataclass
class SkipsARevision(Proxy):
    """There is no revision 8: until a restart, what should have it and all after it have one more."""

    first: int = 8

    async def exercise(self, action: str, *keys: str) -> bool:
        if action == "restart":
            self.first = 1 << 30
        return await self.site(action, *keys)

    def block(self, block: bytes) -> bytes:
        fields = parts(block)
        if "id" not in fields or fields["event"] == "resync":
            return block
        fields["id"] = renumbered(fields["id"], lambda n: n + (n >= self.first))
        return written(fields)


class NeverSaysNotModified(Proxy):
    def asked(self, asked: Asked) -> None:
        asked.headers.pop("if-none-match", None)


class ComparesTagsStrongly(Proxy):
    def asked(self, asked: Asked) -> None:
        if asked.headers.get("if-none-match", "").startswith("W/"):
            del asked.headers["if-none-match"]


class TagsTheBody(Proxy):
    """The ETag is a hash, as frameworks make it."""

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        if asked.is_state:
            headers["etag"] = '"d41d8cd98f00b204"'
        return body


class ResyncsWithoutARevision(Proxy):
    def block(self, block: bytes) -> bytes:
        fields = parts(block)
        if fields.get("event") == "resync":
            del fields["id"]
            return written(fields)
        return block


@dataclass
class ReplaysNothing(Proxy):
    """Begins with what comes next, wherever the agent left off."""

    newest: str = ""

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        if asked.is_state:
            document = json.loads(body)
            self.newest = f"{document['epoch']}:{document['revision']}"
        return body

    def asked(self, asked: Asked) -> None:
        held, _, revision = asked.headers.get("last-event-id", "").partition(":")
        epoch, _, newest = self.newest.partition(":")
        if asked.path == "changes" and held == epoch and int(revision) < int(newest):
            asked.headers["last-event-id"] = self.newest


class TakesTheFutureForThePresent(Proxy):
    """A position that core has not reached yet is followed in silence."""

    def asked(self, asked: Asked) -> None:
        epoch, _, revision = asked.headers.get("last-event-id", "").partition(":")
        if revision and int(revision) > 1000:
            asked.headers["last-event-id"] = f"{epoch}:{int(revision) - 1_000_000}"


@dataclass
class LosesAnEvent(Proxy):
    """A change comes into the state, and once not into the stream."""

    lost: bool = False

    def block(self, block: bytes) -> bytes:
        if not self.lost and parts(block).get("event") == "location_changed":
            self.lost = True
            return b""
        return block


class HasNoHeartbeat(Proxy):
    def block(self, block: bytes) -> bytes:
        return b"" if block.startswith(b":") else block


@dataclass
class FailsOnRepeatedEnds(Proxy):
    known: set[bytes] = field(default_factory=set)

    def asked(self, asked: Asked) -> Response | None:
        repeated = asked.path == "session-ends" and asked.body in self.known
        return Response("duplicate key value", 500) if repeated else None

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        if asked.path == "session-ends" and asked.status == 202:
            self.known.add(asked.body)
        return body


class CountsOneTooMany(Proxy):
    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        return re.sub(rb'"peer_count":(\d+)', lambda found: b'"peer_count":%d' % (int(found[1]) + 1), body)


class WritesLocalTimes(Proxy):
    """Times without an offset, in states and events."""

    _utc = re.compile(rb'(:\d\d\.\d\d\d)Z"')

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        return self._utc.sub(rb'\1"', body)

    def block(self, block: bytes) -> bytes:
        return self._utc.sub(rb'\1"', block)


class TakesAnyToken(Proxy):
    def asked(self, asked: Asked) -> None:
        if asked.headers.get("authorization", "").startswith("Bearer "):
            asked.headers["authorization"] = f"Bearer {self.site.service.gateway_token}"


class ComparesTheBeginningOfTokens(Proxy):
    def asked(self, asked: Asked) -> None:
        token = self.site.service.gateway_token
        if asked.headers.get("authorization", "").startswith(f"Bearer {token[:-6]}"):
            asked.headers["authorization"] = f"Bearer {token}"


class LetsReportsInWithoutAToken(Proxy):
    def asked(self, asked: Asked) -> None:
        if asked.method == "POST":
            asked.headers.setdefault("authorization", f"Bearer {self.site.service.gateway_token}")


@dataclass
class StoresServerTime(Proxy):
    """Answers with a stored state for as long as it is the current one."""

    stored: dict[str, bytes] = field(default_factory=dict)

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        if asked.is_state:
            return self.stored.setdefault(headers["etag"], body)
        return body


class GivesEverybodyOnePsk(Proxy):
    _psk = re.compile(rb'"preshared_key":"[^"]+"')
    _one = b'"preshared_key":"%b"' % base64.b64encode(bytes([7]) * 32)

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        return self._psk.sub(self._one, body)

    def block(self, block: bytes) -> bytes:
        return self._psk.sub(self._one, block)


@dataclass
class RenewalsBeginAnew(Proxy):
    """A renewed session is granted later than it was, in events and states alike."""

    renewing: bool = False
    renewed: str = ""
    moved: tuple[bytes, bytes] = (b"-", b"-")

    async def exercise(self, action: str, *keys: str) -> bool:
        self.renewing = action == "renew"
        return await self.site(action, *keys)

    def block(self, block: bytes) -> bytes:
        fields = parts(block)
        if self.renewing and not self.renewed and fields.get("event") == "session_granted":
            granted_at: str = json.loads(fields["data"])["session"]["granted_at"]
            self.renewed = fields["id"]
            later = format_time(parse_time(granted_at) + 0.5)
            self.moved = granted_at.encode(), later.encode()
        return block.replace(*self.moved) if fields.get("id") == self.renewed else block

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        return body.replace(*self.moved)


class GivesPrefixesBeforeTakingThem(Proxy):
    """The new owner's upsert comes first, in the stream and whenever it is replayed."""

    async def exercise(self, action: str, *keys: str) -> bool:
        if action != "move":
            return await self.site(action, *keys)
        admin = self.site.service.admin
        one, other = [next(d for d in await admin.devices("hq") if d["public_key"] == key) for key in keys]
        store = self.site.service.core.store
        # Both at once, as one transaction: the address plan would not have it one after the other.
        with store.transaction():
            for device, prefixes in ((other, one["allowed_ips"]), (one, ["10.8.0.77/32"])):
                store.execute(
                    "UPDATE devices SET allowed_ips = ? WHERE id = ?", json.dumps(prefixes), device["id"]
                )
                data = {
                    name: device[name]
                    for name in ("public_key", "name", "persistent_keepalive", "mfa_exempt")
                }
                upsert = data | {"allowed_ips": prefixes, "preshared_key": None, "session": None}
                store.append(device["location_id"], "peer_upserted", upsert)
        return True


@dataclass
class ReadsFromALaggard(Proxy):
    """While the exercise goes on, states come from a replica that is some way behind the stream."""

    fresh: list[tuple[float, str, bytes]] = field(default_factory=list)
    behind: float = 0.0

    async def exercise(self, action: str, *keys: str) -> bool:
        self.behind = 1.5 if action in {"upsert", "grant", "renew", "replace"} else 0.0
        return await self.site(action, *keys)

    def answered(self, asked: Asked, headers: Headers, body: bytes) -> bytes:
        if not asked.is_state:
            return body
        now = time.monotonic()
        self.fresh.append((now, headers["etag"], body))
        seen = [kept for kept in self.fresh if kept[0] <= now - self.behind] or self.fresh[:1]
        _, headers["etag"], old = seen[-1]
        server_time = json.loads(body)["server_time"]
        return json.dumps(json.loads(old) | {"server_time": server_time}).encode()


class StartsOverInTheSameEpoch(Proxy):
    async def exercise(self, action: str, *keys: str) -> bool:
        store = self.site.service.core.store
        row = store.row("SELECT epoch FROM locations")
        assert row is not None
        done = await self.site(action, *keys)
        if action == "new-history":
            self.site.service.core.store.execute("UPDATE locations SET epoch = ?", row["epoch"])
        return done


class AnswersEveryPath(Proxy):
    """A page for whatever is asked, as a portal has it."""

    def asked(self, asked: Asked) -> Response | None:
        known = {"state", "changes", "applied", "stats", "session-ends"}
        return None if asked.path in known else Response("<html></html>", 200, media_type="text/html")


class SwallowsMalformedReports(Proxy):
    def asked(self, asked: Asked) -> Response | None:
        return Response(status_code=202) if asked.body == b"[]" else None


class ForgetsTheSessionInUpserts(Proxy):
    """An upsert has no session, though the peer has one: it ends tunnels."""

    async def exercise(self, action: str, *keys: str) -> bool:
        done = await self.site(action, *keys)
        if action == "renew":
            admin = self.site.service.admin
            device = next(d for d in await admin.devices("hq") if d["public_key"] == keys[0])
            await admin.change_device(device["id"], name="renamed")
        return done

    def block(self, block: bytes) -> bytes:
        fields = parts(block)
        if fields.get("event") == "peer_upserted":
            fields["data"] = json.dumps(json.loads(fields["data"]) | {"session": None})
            return written(fields)
        return block


BROKEN: dict[type[Proxy], str] = {
    SkipsARevision: "stream.revision-by-one",
    NeverSaysNotModified: "state.not-modified",
    ComparesTagsStrongly: "state.not-modified",
    TagsTheBody: "state.etag",
    ResyncsWithoutARevision: "stream.resync-carries-revision",
    ReplaysNothing: "stream.resume",
    TakesTheFutureForThePresent: "stream.resync-future",
    LosesAnEvent: "stream.complete",
    HasNoHeartbeat: "stream.heartbeat",
    FailsOnRepeatedEnds: "ends.idempotent",
    CountsOneTooMany: "state.peer-count",
    WritesLocalTimes: "times.offset",
    TakesAnyToken: "auth.wrong-token",
    ComparesTheBeginningOfTokens: "auth.wrong-token",
    LetsReportsInWithoutAToken: "auth.missing-token",
    LetsItsStreamOpen: "auth.missing-token",
    StoresServerTime: "state.server-time-runs",
    GivesEverybodyOnePsk: "session.psk-is-fresh",
    RenewalsBeginAnew: "session.granted-at-stays",
    GivesPrefixesBeforeTakingThem: "change.prefix-moves",
    ReadsFromALaggard: "state.never-back",
    StartsOverInTheSameEpoch: "restart.new-epoch",
    AnswersEveryPath: "errors.unknown-path",
    SwallowsMalformedReports: "json.malformed-request",
    ForgetsTheSessionInUpserts: "change.snapshot-agrees",
}


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(proxy: Proxy) -> AsyncIterator[Proxy]:
    """The proxy on a port of its own."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    methods = ["GET", "POST"]
    app = Starlette(routes=[Route("/gateway/v1/{path:path}", proxy.serve, methods=methods)])
    server = _Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    proxy.url = f"http://127.0.0.1:{sock.getsockname()[1]}/gateway/v1/"
    try:
        yield proxy
    finally:
        server.should_exit = True
        await task
        await proxy.core.aclose()
