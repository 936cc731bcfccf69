"""The core API for gateways: state, changes, applied, stats, session-ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from agent.sandbox import http, reports
from agent.sandbox.core import Core, KnownGateway
from agent.sandbox.directory import Location
from agent.sandbox.errors import Refusal
from agent.sandbox.store import Change

# Above this size, compressing would hold up other requests noticeably.
_THREAD_FROM = 1024 * 1024


def routes(core: Core) -> list[BaseRoute]:
    """Return the routes below ``/gateway/v1``."""
    api = _GatewayApi(core)
    return [
        Route("/state", api.state, methods=["GET"]),
        Route("/changes", api.changes, methods=["GET"]),
        Route("/applied", api.applied, methods=["POST"]),
        Route("/stats", api.stats, methods=["POST"]),
        Route("/session-ends", api.session_ends, methods=["POST"]),
    ]


class _GatewayApi:
    def __init__(self, core: Core) -> None:
        self._core = core

    def _gateway(self, request: Request) -> tuple[KnownGateway, Location]:
        gateway = self._core.gateway_of(http.bearer(request))
        try:
            location = self._core.directory.location(gateway.location)
        except Refusal as refusal:
            raise Refusal(
                503,
                "no_location",
                f"The location {gateway.location!r} has not been created yet.",
                retry_after=2,
            ) from refusal
        self._core.gateways.seen(gateway.name, location.id, self._core.clock())
        return gateway, location

    async def state(self, request: Request) -> Response:
        _, location = self._gateway(request)
        etag = f'"{location.epoch}:{location.revision}"'
        headers = {"etag": etag, "cache-control": "no-store", "vary": "Accept-Encoding"}
        if http.etag_matches(request.headers.get("if-none-match"), etag):
            return Response(status_code=304, headers=headers)
        body = self._core.sessions.snapshot(location, self._core.clock())
        if http.accepts_gzip(request):
            if len(body) < _THREAD_FROM:
                packed = http.compress(body)
            else:
                packed = await asyncio.to_thread(http.compress, body)
            if packed is not None:
                body = packed
                headers["content-encoding"] = "gzip"
        return Response(body, 200, headers, "application/json")

    async def changes(self, request: Request) -> Response:
        gateway, location = self._gateway(request)
        if not self._core.config.stream:
            raise Refusal(404, "no_stream", "This core has no change stream; poll the state.")
        return StreamingResponse(
            self._events(gateway, location.id, request.headers.get("last-event-id")),
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )

    async def _events(
        self, gateway: KnownGateway, location_id: int, last_event_id: str | None
    ) -> AsyncIterator[bytes]:
        core = self._core
        presence = core.gateways.seen(gateway.name, location_id, core.clock())
        presence.stream_opened()
        try:
            with core.store.watch(location_id) as changed:
                yield b": stream\n\n"
                held = _position(last_event_id)
                while not core.stopping:
                    changed.clear()
                    found = core.store.changes_after(location_id, *held)
                    if found is None:
                        held = core.store.position(location_id)
                        yield _event(f"{held[0]}:{held[1]}", "resync", b"{}")
                    elif found:
                        held = (held[0], found[-1].revision)
                        yield b"".join(_change(change) for change in found)
                    else:
                        try:
                            async with asyncio.timeout(core.config.heartbeat):
                                await changed.wait()
                        except TimeoutError:
                            yield b": heartbeat\n\n"
                        presence.last_seen = core.clock()
        finally:
            presence.stream_closed(core.clock())

    async def applied(self, request: Request) -> Response:
        gateway, location = self._gateway(request)
        report = await http.body_of(request, reports.Applied)
        refused = self._core.reports.applied(gateway.name, report, self._core.clock())
        self._core.gateways.applied(gateway.name, location.id, report.epoch, report.revision, refused)
        return Response(status_code=202)

    async def stats(self, request: Request) -> Response:
        gateway, location = self._gateway(request)
        report = await http.body_of(request, reports.Stats)
        gateways, now = self._core.gateways, self._core.clock()
        told = self._core.reports.stats(
            gateway.name, report, now, since=gateways.reported(gateway.name, location.id)
        )
        if told is not None:
            gateways.told(gateway.name, location.id, told)
        return Response(status_code=202)

    async def session_ends(self, request: Request) -> Response:
        gateway, _ = self._gateway(request)
        report = await http.body_of(request, reports.SessionEnds)
        self._core.reports.session_ends(gateway.name, report, self._core.clock())
        return Response(status_code=202)


def _position(last_event_id: str | None) -> tuple[str, int]:
    """Read EPOCH:REVISION; anything else is a position that can't be replayed."""
    epoch, _, revision = (last_event_id or "").rpartition(":")
    if not revision.isascii() or not revision.isdecimal() or len(revision) > 18:
        return "", -1
    return epoch, int(revision)


def _change(change: Change) -> bytes:
    return _event(change.id, change.event, msgspec.json.encode(change.data))


def _event(event_id: str, event: str, data: bytes) -> bytes:
    return f"id: {event_id}\nevent: {event}\ndata: ".encode() + data + b"\n\n"
