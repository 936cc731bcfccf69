"""The administrator's API: directory, sessions, and what gateways reported.

Names go into paths as they are, percent-encoded; devices have numbers, sessions their ids.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agent.encoding import format_time
from agent.sandbox import http, specs
from agent.sandbox.core import Core
from agent.sandbox.directory import Location
from agent.sandbox.errors import Refusal
from agent.sandbox.sessions import Session

Handler = Callable[[Request], Awaitable[Response]]


class DeviceList(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Many devices at once, created together or not at all."""

    devices: list[specs.DeviceSpec]


def routes(core: Core) -> list[BaseRoute]:
    """Return the routes below ``/admin/v1``."""
    api = _AdminApi(core)
    table: list[tuple[str, str, Handler]] = [
        ("GET", "/locations", api.list_locations),
        ("POST", "/locations", api.add_location),
        ("PATCH", "/locations/{name}", api.change_location),
        ("GET", "/users", api.list_users),
        ("POST", "/users", api.add_user),
        ("POST", "/users/{name}/totp", api.enable_totp),
        ("DELETE", "/users/{name}/totp", api.disable_totp),
        ("POST", "/users/{name}/email", api.enable_email),
        ("DELETE", "/users/{name}/email", api.disable_email),
        ("GET", "/devices", api.list_devices),
        ("POST", "/devices", api.add_devices),
        ("PATCH", "/devices/{id:int}", api.change_device),
        ("DELETE", "/devices/{id:int}", api.remove_device),
        ("GET", "/sessions", api.list_sessions),
        ("DELETE", "/sessions/{id}", api.revoke_session),
        ("POST", "/sessions/{id}/renew", api.renew_session),
        ("GET", "/gateways", api.list_gateways),
        ("GET", "/stats", api.list_stats),
        ("GET", "/traffic", api.list_traffic),
        ("GET", "/session-ends", api.list_session_ends),
    ]
    return [Route(path, api.guarded(do), methods=[method]) for method, path, do in table]


class _AdminApi:
    def __init__(self, core: Core) -> None:
        self._core = core

    def guarded(self, handler: Handler) -> Handler:
        async def guard(request: Request) -> Response:
            if self._core.admin_digest is None:
                raise Refusal(403, "no_admin", "This core has no admin token configured.")
            if not hmac.compare_digest(http.bearer(request), self._core.admin_digest):
                raise Refusal(401, "unauthorized", "The admin token is wrong.")
            return await handler(request)

        return guard

    async def list_locations(self, request: Request) -> Response:
        return http.answer([_location(held) for held in self._core.directory.locations()])

    async def add_location(self, request: Request) -> Response:
        spec = await http.body_of(request, specs.LocationSpec)
        return http.answer(_location(self._core.directory.add_location(spec)), 201)

    async def change_location(self, request: Request) -> Response:
        patch = await http.body_of(request, specs.LocationPatch)
        changed = self._core.directory.change_location(request.path_params["name"], patch)
        return http.answer(_location(changed))

    async def list_users(self, request: Request) -> Response:
        return http.answer([asdict(user) for user in self._core.directory.users()])

    async def add_user(self, request: Request) -> Response:
        spec = await http.body_of(request, specs.UserSpec)
        return http.answer(asdict(self._core.directory.add_user(spec)), 201)

    async def enable_totp(self, request: Request) -> Response:
        secret, uri = self._core.mfa.enable_totp(request.path_params["name"])
        return http.answer({"secret": secret, "otpauth_uri": uri}, 201)

    async def disable_totp(self, request: Request) -> Response:
        self._core.mfa.disable_totp(request.path_params["name"])
        return Response(status_code=204)

    async def enable_email(self, request: Request) -> Response:
        self._core.mfa.enable_email(request.path_params["name"])
        return Response(status_code=204)

    async def disable_email(self, request: Request) -> Response:
        self._core.mfa.enable_email(request.path_params["name"], enabled=False)
        return Response(status_code=204)

    async def list_devices(self, request: Request) -> Response:
        location = request.query_params.get("location")
        return http.answer([asdict(held) for held in self._core.directory.devices(location)])

    async def add_devices(self, request: Request) -> Response:
        wanted = await http.body_of(request, dict[str, msgspec.Raw])
        many = "devices" in wanted
        try:
            specs_wanted = (
                msgspec.json.decode(wanted["devices"], type=list[specs.DeviceSpec])
                if many
                else [msgspec.json.decode(msgspec.json.encode(wanted), type=specs.DeviceSpec)]
            )
        except msgspec.ValidationError as error:
            raise Refusal(400, "malformed", f"The body can't be used: {error}.") from None
        added = [asdict(held) for held in self._core.directory.add_devices(specs_wanted)]
        return http.answer({"devices": added} if many else added[0], 201)

    async def change_device(self, request: Request) -> Response:
        patch = await http.body_of(request, specs.DevicePatch)
        changed = self._core.directory.change_device(request.path_params["id"], patch)
        return http.answer(asdict(changed))

    async def remove_device(self, request: Request) -> Response:
        self._core.directory.remove_device(request.path_params["id"], self._core.clock())
        return Response(status_code=204)

    async def list_sessions(self, request: Request) -> Response:
        name = request.query_params.get("location")
        found = self._core.sessions.all(
            location_id=None if name is None else self._core.directory.location(name).id,
            live=request.query_params.get("live") == "true",
        )
        return http.answer([_session(session) for session in found])

    async def revoke_session(self, request: Request) -> Response:
        session_id = request.path_params["id"]
        if not self._core.sessions.end(session_id, "revoked", self._core.clock()):
            raise Refusal(409, "session_ended", "The session has ended already.")
        return http.answer(_session(self._core.sessions.get(session_id)))

    async def renew_session(self, request: Request) -> Response:
        spec = await http.body_of(request, specs.RenewSpec)
        session = self._core.sessions.get(request.path_params["id"])
        location = self._core.directory.location_by_id(session.location_id)
        grant = self._core.sessions.renew(
            session.id,
            spec.lifetime,
            self._core.clock(),
            ceiling=location.policy["max_lifetime"],
            rotate=spec.rotate,
        )
        return http.answer(_session(grant.session))

    async def list_gateways(self, request: Request) -> Response:
        return http.answer(self._core.gateway_list())

    async def list_stats(self, request: Request) -> Response:
        return http.answer(self._core.reports.list_stats())

    async def list_traffic(self, request: Request) -> Response:
        return http.answer(self._core.reports.list_traffic())

    async def list_session_ends(self, request: Request) -> Response:
        return http.answer(self._core.reports.list_session_ends())


def _location(location: Location) -> dict[str, Any]:
    return {**asdict(location), "id": str(location.id)}


def _session(session: Session) -> dict[str, Any]:
    """Return a session without its PSK: that is for the client and the gateways alone."""

    def time(value: float | None) -> str | None:
        return None if value is None else format_time(value)

    return {
        "id": session.id,
        "location_id": str(session.location_id),
        "public_key": session.public_key,
        "method": session.method,
        "granted_at": time(session.granted_at),
        "expires_at": time(session.expires_at),
        "alive_at": time(session.alive_at),
        "ended_at": time(session.ended_at),
        "reason": session.reason,
    }
