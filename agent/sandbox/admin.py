"""An administrator's client of the core, for the demo, tests and scripts."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from agent.sandbox.errors import Refusal
from agent.sandbox.urls import core_url


class AdminClient:
    """Talks to ``/admin/v1``. Methods return decoded JSON; a refused request raises Refusal."""

    def __init__(self, url: str, token: str, *, ca_file: str | None = None) -> None:
        """``url``: the core without a path, such as http://127.0.0.1:8480."""
        core = core_url(url, ca_file)
        self._http = httpx.AsyncClient(
            base_url=core.base + "/admin/v1/",
            # Core closes idle connections: a change must not be lost on one that closes as it is taken up.
            transport=httpx.AsyncHTTPTransport(
                uds=core.socket,
                verify=core.verify,
                trust_env=False,
                limits=httpx.Limits(max_keepalive_connections=0),
            ),
            headers={"authorization": f"Bearer {token}"},
            timeout=30,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _ask(self, method: str, path: str, body: object = None, **query: str) -> Any:
        response = await self._http.request(
            method, path, json=body, params={k: v for k, v in query.items() if v} or None
        )
        if response.is_error:
            raise refusal_in(response)
        return response.json() if response.content else None

    async def add_location(self, name: str, **members: object) -> dict[str, Any]:
        """Create a location; ``members`` as in ``specs.LocationSpec``."""
        return dict(await self._ask("POST", "locations", {"name": name, **members}))

    async def change_location(self, name: str, **members: object) -> dict[str, Any]:
        """Change a location, for example ``mfa_required=False``."""
        return dict(await self._ask("PATCH", f"locations/{quote(name, safe='')}", members))

    async def locations(self) -> list[dict[str, Any]]:
        """Return all locations with their epochs and revisions."""
        return list(await self._ask("GET", "locations"))

    async def add_user(self, name: str, email: str | None = None) -> dict[str, Any]:
        """Create a user."""
        return dict(await self._ask("POST", "users", {"name": name, "email": email}))

    async def enable_totp(self, user: str) -> str:
        """Enable TOTP for a user; return the secret in base32."""
        answer = await self._ask("POST", f"users/{quote(user, safe='')}/totp")
        return str(answer["secret"])

    async def enable_email(self, user: str) -> None:
        """Enable e-mailed codes for a user."""
        await self._ask("POST", f"users/{quote(user, safe='')}/email")

    async def add_device(
        self, location: str, name: str, public_key: str, **members: object
    ) -> dict[str, Any]:
        """Register a device; ``members`` as in ``specs.DeviceSpec``."""
        body = {"location": location, "name": name, "public_key": public_key, **members}
        return dict(await self._ask("POST", "devices", body))

    async def add_devices(self, devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Register many devices in one transaction."""
        return list((await self._ask("POST", "devices", {"devices": devices}))["devices"])

    async def devices(self, location: str = "") -> list[dict[str, Any]]:
        """Return the devices, of one location or of all."""
        return list(await self._ask("GET", "devices", location=location))

    async def change_device(self, device_id: int, **members: object) -> dict[str, Any]:
        """Change a device; ``members`` as in ``specs.DevicePatch``."""
        return dict(await self._ask("PATCH", f"devices/{device_id}", members))

    async def remove_device(self, device_id: int) -> None:
        """Remove a device."""
        await self._ask("DELETE", f"devices/{device_id}")

    async def sessions(self, *, location: str = "", live: bool = False) -> list[dict[str, Any]]:
        """Return sessions, oldest first."""
        return list(await self._ask("GET", "sessions", location=location, live="true" if live else ""))

    async def revoke(self, session_id: str) -> dict[str, Any]:
        """Revoke a session."""
        return dict(await self._ask("DELETE", f"sessions/{session_id}"))

    async def renew(self, session_id: str, lifetime: float, *, rotate: bool = False) -> dict[str, Any]:
        """Let a session run ``lifetime`` seconds from now."""
        body = {"lifetime": lifetime, "rotate": rotate}
        return dict(await self._ask("POST", f"sessions/{session_id}/renew", body))

    async def gateways(self) -> list[dict[str, Any]]:
        """Return each gateway with its presence and its last ``applied``."""
        return list(await self._ask("GET", "gateways"))

    async def stats(self) -> list[dict[str, Any]]:
        """Return the last reported counters of every peer at every gateway."""
        return list(await self._ask("GET", "stats"))

    async def traffic(self) -> list[dict[str, Any]]:
        """Return every peer's bytes over all gateways, and which of them it uses."""
        return list(await self._ask("GET", "traffic"))

    async def session_ends(self) -> list[dict[str, Any]]:
        """Return the ends that gateways reported, in order of arrival."""
        return list(await self._ask("GET", "session-ends"))


def refusal_in(response: httpx.Response) -> Refusal:
    """Return the refusal in an answer of the core."""
    retry_after = response.headers.get("retry-after", "")
    try:
        body = response.json()
        code, message = str(body["error"]), str(body["message"])
    except (ValueError, TypeError, KeyError):
        code, message = "unknown", f"The core answered {response.status_code}."
    return Refusal(
        response.status_code,
        code,
        message,
        retry_after=float(retry_after) if retry_after.isdecimal() else None,
    )
