"""Makes the changes that ``wg-agent conformance --exercise`` asks for, in a core of ours.

The sessions are real ones: a user with TOTP authenticates for each. So the location needs an
``endpoint`` and a ``server_public_key``, as for any client. Restarts are left to whoever runs core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any, Final

import httpx
import pyotp

from agent.errors import AgentError
from agent.sandbox import program
from agent.sandbox.addresses import AddressPlan
from agent.sandbox.admin import AdminClient, refusal_in
from agent.sandbox.config import secret
from agent.sandbox.errors import Refusal
from agent.sandbox.urls import core_url

CANNOT: Final = 77
_USER: Final = "conformance"
_LIFETIME: Final = 36000.0
_MTU: Final = (1420, 1400)


class Exerciser:
    """Called with an action and public keys, as ``docs/core-api.md`` has them. Raises Refusal."""

    def __init__(self, url: str, admin_token: str, location: str, *, ca_file: str | None = None) -> None:
        """``url``: the core without a path."""
        self._admin = AdminClient(url, admin_token, ca_file=ca_file)
        self._location = location
        core = core_url(url, ca_file)
        self._client = httpx.AsyncClient(
            base_url=core.base + "/client/v1/",
            transport=httpx.AsyncHTTPTransport(
                uds=core.socket,
                verify=core.verify,
                trust_env=False,
                limits=httpx.Limits(max_keepalive_connections=0),
            ),
            timeout=30,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._admin.close()

    async def __call__(self, action: str, *keys: str) -> bool:
        """Make a change; False for one that there is no way to make."""
        match action, keys:
            case "upsert", (key,):
                with contextlib.suppress(Refusal):
                    await self._admin.add_user(_USER)
                await self._admin.add_device(self._location, f"{_USER} {key[:8]}", key, user=_USER)
            case (("grant" | "replace"), (key,)):
                await self._authenticate(key)
            case "renew", (key,):
                await self._admin.renew(await self._session(key), _LIFETIME)
            case "revoke", (key,):
                await self._admin.revoke(await self._session(key))
            case "move", (key, to):
                await self._move(await self._device(key), await self._device(to))
            case "remove", (key,):
                await self._admin.remove_device((await self._device(key))["id"])
            case "location", ():
                held = (await self._described())["interface"].get("mtu")
                await self._admin.change_location(self._location, mtu=_MTU[held == _MTU[0]])
            case _:
                return False
        return True

    async def _authenticate(self, key: str) -> None:
        totp = pyotp.TOTP(await self._admin.enable_totp(_USER))
        started = await self._post("mfa/start", user=_USER, device_public_key=key, method="totp")
        await self._post("mfa/finish", token=started["token"], code=totp.at(int(time.time())))

    async def _post(self, path: str, **body: str) -> dict[str, Any]:
        response = await self._client.post(path, json=body)
        if response.is_error:
            raise refusal_in(response)
        return dict(response.json())

    async def _move(self, device: dict[str, Any], to: dict[str, Any]) -> None:
        """Give one device's prefixes to another, and fresh ones to the first."""
        held = [p for other in await self._admin.devices(self._location) for p in other["allowed_ips"]]
        fresh = AddressPlan((await self._described())["interface"]["addresses"], held).allocate()
        await self._admin.change_device(device["id"], allowed_ips=fresh)
        await self._admin.change_device(to["id"], allowed_ips=device["allowed_ips"])

    async def _described(self) -> dict[str, Any]:
        return next(held for held in await self._admin.locations() if held["name"] == self._location)

    async def _device(self, key: str) -> dict[str, Any]:
        for device in await self._admin.devices(self._location):
            if device["public_key"] == key:
                return device
        raise Refusal(404, "unknown_device", f"There is no device {key}.")

    async def _session(self, key: str) -> str:
        for session in await self._admin.sessions(location=self._location, live=True):
            if session["public_key"] == key:
                return str(session["id"])
        raise Refusal(404, "unknown_session", f"{key} has no session.")


def main(argv: list[str]) -> int:
    """Run ``exercise --core URL --admin-token-file FILE --location NAME ACTION [KEY] [KEY]``."""
    return asyncio.run(_run(parser().parse_args(argv)))


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``exercise``'s arguments."""
    made = argparse.ArgumentParser(prog=program("exercise"))
    made.add_argument("--core", required=True, metavar="URL", help="the core without a path")
    made.add_argument("--admin-token-file", required=True, type=Path, metavar="FILE")
    made.add_argument("--location", required=True, metavar="NAME")
    made.add_argument("--ca-file", metavar="FILE", help="trust this CA instead of the system's")
    made.add_argument("action", metavar="ACTION")
    made.add_argument("keys", nargs="*", metavar="KEY")
    return made


async def _run(arguments: argparse.Namespace) -> int:
    token = secret(None, str(arguments.admin_token_file), "--admin-token") or ""
    exerciser = Exerciser(arguments.core, token, arguments.location, ca_file=arguments.ca_file)
    try:
        return 0 if await exerciser(arguments.action, *arguments.keys) else CANNOT
    except (Refusal, httpx.HTTPError) as error:
        raise AgentError(
            f"{arguments.action} failed: {error}", "is core there, and the token right?"
        ) from None
    finally:
        await exerciser.close()
