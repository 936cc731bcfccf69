"""What a desktop client does: authenticate, set its WireGuard interface up, connect.

    key         make the device's private key if there is none, print the public one
    connect     authenticate, make the interface with the session's PSK, wait for the handshake
    disconnect  take the interface down

The session's PSK goes from the core's answer to the device and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from agent.curve25519 import clamp, public_key
from agent.encoding import format_key, parse_key
from agent.errors import AgentError, ConfigError, CoreRejected, CoreUnavailable, InvalidMessage
from agent.keys import read_secret_file
from agent.sandbox import client_device, program
from agent.sandbox.admin import refusal_in
from agent.sandbox.client_device import DEFAULT_MTU, Tunnel
from agent.sandbox.urls import core_url


@dataclass(frozen=True, slots=True)
class Session:
    """A session as the client knows it. ``preshared_key`` is raw."""

    id: str
    expires_at: str
    preshared_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Profile:
    """What core says of a device's tunnel, and its session where one was granted."""

    location: str
    mfa_required: bool
    endpoint: str
    server_public_key: bytes
    addresses: list[str]
    allowed_ips: list[str]
    persistent_keepalive: int
    mtu: int
    session: Session | None

    def tunnel(self, private_key: bytes) -> Tunnel:
        """Return the tunnel to set up. Raises CoreUnavailable if the endpoint has no address."""
        host, _, port = self.endpoint.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        try:
            found = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)
        except OSError as error:
            raise CoreUnavailable(f"the gateway {self.endpoint} can't be resolved", str(error)) from None
        return Tunnel(
            private_key=private_key,
            server_public_key=self.server_public_key,
            preshared_key=None if self.session is None else self.session.preshared_key,
            endpoint=(str(found[0][4][0]), int(port)),
            addresses=self.addresses,
            allowed_ips=self.allowed_ips,
            persistent_keepalive=self.persistent_keepalive,
            mtu=self.mtu,
        )


class CoreClient:
    """Talks to ``/client/v1``, blocking.

    Raises CoreRejected for a refused request (its ``message`` is the core's sentence), CoreUnavailable
    when the core can't be reached, InvalidMessage for an answer that makes no sense.
    """

    def __init__(self, url: str, *, ca_file: str | None = None, timeout: float = 30) -> None:
        """``url``: the core without a path; ``http+unix:///run/core.sock:`` is a unix socket."""
        core = core_url(url, ca_file)
        self._http = httpx.Client(
            base_url=core.base + "/client/v1/",
            transport=httpx.HTTPTransport(uds=core.socket, verify=core.verify, trust_env=False),
            timeout=timeout,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def profile(self, user: str, device: bytes) -> Profile:
        """Return the tunnel of a user's device (raw public key), without a session."""
        return _profile(self._post("config", {"user": user, "device_public_key": format_key(device)}))

    def start(self, user: str, device: bytes, method: str) -> str:
        """Start an authentication; return the token that ``finish`` takes."""
        body = {"user": user, "device_public_key": format_key(device), "method": method}
        return str(self._post("mfa/start", body).get("token"))

    def finish(self, token: str, code: str) -> Profile:
        """Finish with the code; return the tunnel with its session, live on the gateway."""
        return _profile(self._post("mfa/finish", {"token": token, "code": code}))

    def _post(self, path: str, body: dict[str, str]) -> dict[str, Any]:
        try:
            response = self._http.post(path, json=body)
        except (httpx.HTTPError, OSError) as error:
            raise CoreUnavailable(f"core can't be reached ({type(error).__name__})", "check --core") from None
        if response.is_error:
            refusal = refusal_in(response)
            raise CoreRejected(refusal.message, refusal.code, status=refusal.status)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise InvalidMessage("core's answer is not of this protocol", "check --core")
        return answer


def _profile(answer: dict[str, Any]) -> Profile:
    try:
        session = answer.get("session")
        return Profile(
            location=str(answer["location"]["name"]),
            mfa_required=bool(answer["location"]["mfa_required"]),
            endpoint=str(answer["endpoint"]),
            server_public_key=parse_key(answer["server_public_key"]),
            addresses=[str(address) for address in answer["addresses"]],
            allowed_ips=[str(prefix) for prefix in answer["allowed_ips"]],
            persistent_keepalive=int(answer["persistent_keepalive"]),
            mtu=int(answer.get("mtu") or DEFAULT_MTU),
            session=None
            if session is None
            else Session(
                str(session["id"]),
                str(session["expires_at"]),
                parse_key(session["preshared_key"]),
            ),
        )
    except (KeyError, TypeError, ValueError):
        raise InvalidMessage("core's answer is not of this protocol", "check --core") from None


def device_key(path: Path) -> bytes:
    """Return the device's raw private key, made on first use (0600). Raises ConfigError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"--device-key {path} can't be made", str(error.strerror)) from None
    else:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(format_key(clamp(secrets.token_bytes(32))) + "\n")
    try:
        return parse_key(read_secret_file(path, "--device-key").decode("ascii", "replace").strip())
    except ValueError:
        raise ConfigError(f"--device-key {path} holds no key", "delete it to have one made") from None


def connect(arguments: argparse.Namespace) -> int:
    """Run ``client connect``; 0 once there was a handshake."""
    began = time.monotonic()
    private_key = device_key(arguments.device_key)
    device = public_key(private_key)
    with CoreClient(arguments.core, ca_file=arguments.ca_file) as core:
        if arguments.method == "none":
            profile = core.profile(arguments.user, device)
        else:
            token = core.start(arguments.user, device, arguments.method)
            profile = core.finish(token, _code(arguments))
    granted = time.monotonic()
    backend = client_device.up(arguments.interface, profile.tunnel(private_key))
    # Without a keepalive nothing is sent, so no handshake is begun before there is traffic.
    shaken = not profile.persistent_keepalive or client_device.wait_for_handshake(
        arguments.interface, arguments.wait
    )
    result = {
        "interface": arguments.interface,
        "backend": backend,
        "location": profile.location,
        "addresses": profile.addresses,
        "session_id": None if profile.session is None else profile.session.id,
        "expires_at": None if profile.session is None else profile.session.expires_at,
        "connected": shaken,
        "granted_after": round(granted - began, 3),
        "connected_after": round(time.monotonic() - began, 3),
    }
    if arguments.json:
        print(json.dumps(result), flush=True)
    elif shaken:
        until = f" until {profile.session.expires_at}" if profile.session else ""
        print(f"connected to {profile.location} on {arguments.interface}{until}", flush=True)
    if not shaken and not arguments.json:
        hint = " (this location requires MFA)" if profile.mfa_required and not profile.session else ""
        print(f"the gateway did not answer within {arguments.wait:g} s{hint}", file=sys.stderr)
    return 0 if shaken else 1


def _code(arguments: argparse.Namespace) -> str:
    if arguments.code is not None:
        return str(arguments.code)
    if not arguments.code_from_stdin:
        where = "your authenticator" if arguments.method == "totp" else "the message just sent"
        print(f"Code from {where}: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def disconnect(arguments: argparse.Namespace) -> int:
    """Run ``client disconnect``; core ends the session when the client has been gone for a while."""
    if not client_device.down(arguments.interface):
        print(f"there is no interface {arguments.interface}", file=sys.stderr)
        return 1
    return 0


def show_key(arguments: argparse.Namespace) -> int:
    """Run ``client key``."""
    print(format_key(public_key(device_key(arguments.device_key))))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``client``'s arguments."""
    root = argparse.ArgumentParser(
        prog=program("client"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True)

    key = commands.add_parser("key", help="print the device's public key")
    key.add_argument("--device-key", required=True, type=Path, metavar="FILE")
    key.set_defaults(run=show_key)

    to = commands.add_parser("connect", help="authenticate and bring the tunnel up")
    to.add_argument("--core", required=True, metavar="URL", help="such as https://core.example.com")
    to.add_argument("--ca-file", metavar="FILE", help="trust this CA instead of the system's")
    to.add_argument("--user", required=True)
    to.add_argument("--device-key", required=True, type=Path, metavar="FILE")
    to.add_argument("--method", choices=("totp", "email", "none"), default="totp")
    to.add_argument("--interface", default="wgc0")
    to.add_argument("--wait", type=float, default=10.0, metavar="S", help="for the first handshake")
    to.add_argument("--json", action="store_true", help="print the result as JSON")
    code = to.add_mutually_exclusive_group()
    code.add_argument("--code", help="the code; asked for when absent")
    code.add_argument("--code-from-stdin", action="store_true", help="read it without a prompt")
    to.set_defaults(run=connect)

    off = commands.add_parser("disconnect", help="take the interface down")
    off.add_argument("--interface", default="wgc0")
    off.set_defaults(run=disconnect)
    return root


def main(argv: list[str]) -> int:
    """Run ``client``. Exit codes: 0 connected, 1 refused or no answer, 2 usage."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError:
        raise
    except AgentError as error:
        print(error, file=sys.stderr)
        return 1
