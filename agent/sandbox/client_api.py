"""The API for clients: what a device's tunnel looks like, and the second factor.

``POST config``      {user, device_public_key} -> location, endpoint, addresses, routes; no secret
``POST mfa/start``   {user, device_public_key, method} -> {token, method, expires_at}
``POST mfa/finish``  {token, code} -> the same as ``config``, and the session with its PSK, once
                     the gateway has confirmed that it is in the kernel
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agent.encoding import format_key, format_time
from agent.sandbox import http
from agent.sandbox.core import Core
from agent.sandbox.directory import Device, Location
from agent.sandbox.errors import Refusal
from agent.sandbox.mfa import Method

Short = Annotated[str, Meta(max_length=256)]


class ConfigRequest(Struct):
    """Body of POST config."""

    user: Short
    device_public_key: Short


class StartRequest(Struct):
    """Body of POST mfa/start."""

    user: Short
    device_public_key: Short
    method: Method


class FinishRequest(Struct):
    """Body of POST mfa/finish."""

    token: Short
    code: Short


def routes(core: Core) -> list[BaseRoute]:
    """Return the routes below ``/client/v1``."""
    api = _ClientApi(core)
    return [
        Route("/config", api.config, methods=["POST"]),
        Route("/mfa/start", api.start, methods=["POST"]),
        Route("/mfa/finish", api.finish, methods=["POST"]),
    ]


class _ClientApi:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def config(self, request: Request) -> Response:
        asked = await http.body_of(request, ConfigRequest)
        device, location = self._core.mfa.device_of(asked.user, asked.device_public_key)
        return http.answer(_tunnel(device, location))

    async def start(self, request: Request) -> Response:
        asked = await http.body_of(request, StartRequest)
        # What finish will need is checked before a code is used up for nothing.
        _tunnel(*self._core.mfa.device_of(asked.user, asked.device_public_key))
        started = await self._core.mfa.start(
            asked.user, asked.device_public_key, asked.method, self._core.clock()
        )
        return http.answer(
            {
                "token": started.token,
                "method": started.method,
                "expires_at": format_time(started.expires_at),
            }
        )

    async def finish(self, request: Request) -> Response:
        asked = await http.body_of(request, FinishRequest)
        who = self._core.mfa.finish(asked.token, asked.code, self._core.clock())
        tunnel = _tunnel(who.device, who.location)
        session = await self._core.grant(who.device, who.location, who.method)
        return http.answer(
            {
                **tunnel,
                "session": {
                    "id": session.id,
                    "preshared_key": format_key(session.preshared_key or b""),
                    "granted_at": format_time(session.granted_at),
                    "expires_at": format_time(session.expires_at),
                },
            }
        )


def _tunnel(device: Device, location: Location) -> dict[str, Any]:
    if location.endpoint is None or location.server_public_key is None:
        raise Refusal(
            503,
            "gateway_unknown",
            f"The gateway of {location.name!r} has no endpoint or public key in core yet.",
            retry_after=5,
        )
    return {
        "location": {
            "id": str(location.id),
            "name": location.name,
            "mfa_required": location.mfa_required and not device.mfa_exempt,
        },
        "endpoint": location.endpoint,
        "server_public_key": location.server_public_key,
        "addresses": device.allowed_ips,
        "allowed_ips": location.client_routes,
        "persistent_keepalive": device.persistent_keepalive,
        "mtu": location.interface.get("mtu"),
    }
