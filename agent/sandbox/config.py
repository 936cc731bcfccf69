"""The core's configuration: one TOML file, unknown keys refused.

A secret stands in the file itself or, better, in a file of its own named by ``*_file``. Enough for
a core on loopback with one gateway (location hq is then made through the admin API):

    database = "/var/lib/wg-agent-core/core.db"
    listen = ["127.0.0.1:8480", "unix:/run/wg-agent-core.sock"]
    [admin]
    token_file = "/etc/wg-agent-core/admin.token"
    [smtp]
    host = "127.0.0.1"
    port = 25
    from = "vpn@example.com"
    [sessions]
    lifetime = 28800
    [[gateways]]
    name = "gw1"
    location = "hq"
    token_file = "/etc/wg-agent-core/gw1.token"
"""

from __future__ import annotations

import base64
import binascii
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from agent.errors import ConfigError

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
WholeSeconds = Annotated[int, Meta(ge=1)]


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"  # sections hold tokens


class Admin(_Section, frozen=True, kw_only=True):
    """The administrator's bearer token; without one there is no admin API."""

    token: str | None = None
    token_file: str | None = None


class Smtp(_Section, frozen=True, kw_only=True):
    """The server that e-mailed codes are handed to. ``security``: how the connection is protected."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 25
    sender: str = field(default="vpn@localhost", name="from")
    username: str | None = None
    password: str | None = None
    password_file: str | None = None
    security: Literal["none", "starttls", "tls"] = "none"
    timeout: Seconds = 10.0


class Mfa(_Section, frozen=True, kw_only=True):
    """Limits of the second factor. Rates are per user within ``window`` seconds."""

    code_lifetime: Seconds = 300.0
    max_failures: Count = 5
    max_mails: Count = 5
    window: Seconds = 300.0
    issuer: str = "wg-agent sandbox"


class Sessions(_Section, frozen=True, kw_only=True):
    """Seconds. ``lifetime`` is a grant's length; the others are a new location's defaults."""

    lifetime: Seconds = 28800.0
    idle_timeout: WholeSeconds = 300
    connect_timeout: WholeSeconds = 180
    max_lifetime: WholeSeconds = 43200


class Gateway(_Section, frozen=True, kw_only=True):
    """A gateway: its bearer token and the location that the token names.

    With ``push_url`` (the agent's ``https://HOST:9587/v1/changes``) changes are also pushed there,
    signed with ``push_secret``.
    """

    name: str
    location: str
    token: str | None = None
    token_file: str | None = None
    enabled: bool = True
    push_url: str | None = None
    push_secret: str | None = None
    push_secret_file: str | None = None
    push_ca_file: str | None = None


class Config(_Section, frozen=True, kw_only=True):
    """Everything the core is told. ``listen`` entries are ``HOST:PORT`` or ``unix:PATH``.

    ``heartbeat`` and ``applied_timeout`` are in seconds; where gateways only poll, the latter has
    to be longer than their interval. ``changelog`` is the number of events that can be replayed.
    """

    database: str
    listen: list[str] = field(default_factory=lambda: ["127.0.0.1:8480"])
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    stream: bool = True
    heartbeat: Seconds = 10.0
    applied_timeout: Seconds = 10.0
    changelog: Count = 10_000
    admin: Admin = field(default_factory=Admin)
    smtp: Smtp = field(default_factory=Smtp)
    mfa: Mfa = field(default_factory=Mfa)
    sessions: Sessions = field(default_factory=Sessions)
    gateways: list[Gateway] = field(default_factory=list)


def secret(value: str | None, file: str | None, what: str) -> str | None:
    """Return a secret given directly or in a file; None if neither is given. Raises ConfigError."""
    if value is not None and file is not None:
        raise ConfigError(f"{what} is given twice", f"keep {what} or {what}_file")
    if file is not None:
        try:
            value = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what}_file {file} can't be read", str(error)) from None
    if value is not None and not value:
        raise ConfigError(f"{what} is empty", "give it a value or leave it out")
    return value


def load(path: Path) -> Config:
    """Read and check a configuration file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read", str(error)) from None
    try:
        config = msgspec.convert(tomllib.loads(text), Config)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML", str(error)) from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} is not a core's configuration", str(error)) from None
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse what would only fail, or be unsafe, later. Raises ConfigError."""
    if (config.tls_cert_file is None) != (config.tls_key_file is None):
        raise ConfigError("TLS needs a certificate and a key", "set tls_cert_file and tls_key_file")
    if not config.listen:
        raise ConfigError("listen is empty", "name an address such as 127.0.0.1:8480")
    for address in config.listen:
        if address.startswith("unix:"):
            continue
        host, _ = split_address(address)
        if config.tls_cert_file is None and not _is_loopback(host):
            raise ConfigError(
                f"{address} would serve pre-shared keys in clear",
                "set tls_cert_file and tls_key_file, or listen on loopback",
            )
    names = [gateway.name for gateway in config.gateways]
    if len(set(names)) != len(names):
        raise ConfigError("two gateways have one name", "name each gateway differently")
    for gateway in config.gateways:
        if (gateway.token is None) == (gateway.token_file is None):
            raise ConfigError(f"gateway {gateway.name} has no token, or two", "set token_file")
        key = secret(gateway.push_secret, gateway.push_secret_file, "push_secret")
        if gateway.push_url is not None and (key is None or not _is_webhook_secret(key)):
            raise ConfigError(
                f"gateway {gateway.name} has a push_url without a usable secret",
                "set push_secret_file to a file with whsec_ and base64",
            )


def split_address(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` (an IPv6 host in brackets). Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"listen {address!r} is no address", "write HOST:PORT or unix:PATH")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_webhook_secret(text: str) -> bool:
    if not text.startswith("whsec_"):
        return False
    try:
        return bool(base64.b64decode(text.removeprefix("whsec_"), validate=True))
    except (binascii.Error, ValueError):
        return False
