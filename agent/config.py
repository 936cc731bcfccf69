"""The configuration: environment over systemd credentials over one TOML file over defaults.

Every ``*_file`` key can also come as the systemd credential of the same name without ``_file``:
``$CREDENTIALS_DIRECTORY/core.token`` stands for ``core.token_file``. The configuration itself holds
no secret: ``agent.keys`` reads those that a command needs, ``agent.configfile`` the rest.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from agent.encoding import parse_interface_address
from agent.model import InterfaceAddress

ENV_PREFIX: Final = "WG_AGENT_"
_TEN_YEARS: Final = 315_360_000
# IFNAMSIZ - 1 characters, and of them those that wg-quick takes.
_INTERFACE_NAME: Final = re.compile(r"[A-Za-z0-9_=+.-]{1,15}", re.ASCII)

LIVE_KEYS: Final = frozenset(
    {
        "core.poll_interval",
        "log.level",
        "metrics.per_peer",
        "sessions.agent_lease",
        "sessions.connect_timeout",
        "sessions.core_lost_grace",
        "sessions.idle_timeout",
        "sessions.max_lifetime",
        "stats.interval",
    }
)
"""The keys that SIGHUP changes in a running agent; every other one needs a restart."""


class Listen(NamedTuple):
    """Where to listen: an IP address (or ``localhost``) and a TCP port, 0 for any free one."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this host can reach it."""
        return _is_loopback(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixUrl(NamedTuple):
    """``http+unix://SOCKET:PATH``: the socket's path and the path of the API on it."""

    socket: str
    path: str


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_listen(value: object) -> Listen:
    if isinstance(value, Listen):
        return value
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not port.isascii() or not port.isdigit() or int(port) > 0xFFFF or not host:
        raise ValueError('write ADDRESS:PORT, such as "127.0.0.1:9586" or "[::1]:9586"')
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError("the address must be an IP address or localhost") from None
    return Listen(host, int(port))


def split_unix_url(url: str) -> UnixUrl | None:
    """Return the parts of an ``http+unix`` URL, None for any other; ValueError if it lacks one."""
    scheme, _, rest = url.partition("://")
    if scheme.lower() != "http+unix":
        return None
    socket_path, colon, path = rest.rpartition(":")
    if not colon or not socket_path.startswith("/") or not path.startswith("/"):
        raise ValueError('write "http+unix:///run/core.sock:/gateway/v1/"')
    return UnixUrl(socket_path, path)


def _check_core_url(value: str) -> str:
    if any(c.isspace() or not c.isprintable() for c in value):
        raise ValueError("a URL has no spaces or control characters")
    url = value if value.endswith("/") else value + "/"
    if split_unix_url(url):
        return url
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("write https://HOST/PATH/")
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in url or "#" in url:
        raise ValueError(
            "core's URL has no user name, password, query or fragment; the token goes in core.token_file"
        )
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(
            "http:// would send the token in the clear; write https://, or http:// to a loopback address"
        )
    return url


def check_interface_name(value: str) -> str:
    if not _INTERFACE_NAME.fullmatch(value) or value in {".", ".."}:
        raise ValueError("an interface's name has 1 to 15 characters of A-Z a-z 0-9 _ = + . -")
    return value


def _split_list(value: object) -> object:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _parse_address(value: object) -> InterfaceAddress:
    return value if isinstance(value, InterfaceAddress) else parse_interface_address(value)


def _parse_commands(value: object) -> object:
    """Commands as lists of words; a text is JSON, as the environment gives it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list | tuple) or not all(map(_is_command, value)):
        raise ValueError(
            'write a list of commands, each a list of words: [["ip", "rule", "add", "fwmark", "1"]]; '
            "no shell reads them"
        )
    return tuple(map(tuple, value))


def _is_command(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and all(isinstance(word, str) and "\0" not in word for word in value)
        and bool(value and value[0])
    )


def _check_path(value: object) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("an empty path; leave the key out instead")
    return value


@dataclass(frozen=True, slots=True)
class ZeroOrAtLeast:
    """Takes 0, which turns a duration off, or at least so many seconds."""

    least: float

    def __call__(self, value: float) -> float:
        """Return the value, or raise ValueError."""
        if value and value < self.least:
            raise ValueError(f"write 0 to turn it off, or at least {self.least:g} seconds")
        return value


Seconds = Annotated[float, Field(ge=1, le=_TEN_YEARS, allow_inf_nan=False)]
SecondsOrOff = Annotated[float, Field(ge=0, le=_TEN_YEARS, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1, le=1 << 40)]
ListenAddress = Annotated[Listen, NoDecode, BeforeValidator(_parse_listen)]
File = Annotated[Path, BeforeValidator(_check_path)]
Address = Annotated[InterfaceAddress, BeforeValidator(_parse_address)]
Command = tuple[str, ...]
Commands = Annotated[tuple[Command, ...], NoDecode, BeforeValidator(_parse_commands)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Interface(_Section):
    """The WireGuard interface; port, MTU, fwmark and addresses hold where core sends none."""

    name: Annotated[str, AfterValidator(check_interface_name)] = "wg0"
    backend: Literal["auto", "kernel", "userspace"] = "auto"
    userspace_program: Annotated[str, Field(min_length=1)] = "wireguard-go"
    private_key_file: File | None = None
    listen_port: Annotated[int, Field(ge=0, le=0xFFFF)] = 51820
    mtu: Annotated[int, Field(ge=576, le=65_535)] | None = None
    fwmark: Annotated[int, Field(ge=0, le=0xFFFF_FFFF)] | None = None
    addresses: Annotated[tuple[Address, ...], NoDecode, BeforeValidator(_split_list)] = ()


class Core(_Section):
    """Where core is and how to prove who we are. ``timeout``: one request, in seconds.

    A Defguard core of generation 1 is called at ``url``; one of generation 2 calls the agent, and has none.
    """

    protocol: Literal["http", "defguard"] = "http"
    generation: Literal[1, 2] = 2
    url: Annotated[str, AfterValidator(_check_core_url)] = ""
    token_file: File | None = None
    ca_file: File | None = None
    client_cert_file: File | None = None
    client_key_file: File | None = None
    max_body: Bytes = 64 << 20
    poll_interval: Seconds = 30.0
    timeout: Seconds = 10.0

    @property
    def calls(self) -> bool:
        """Whether core is the one that connects, and so proves who it is by a certificate of its own."""
        return self.protocol == "defguard" and self.generation == 2

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if not self.url and not self.calls:
            raise PydanticCustomError("missing", "core.url is missing")
        return self

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise ValueError("client_cert_file and client_key_file belong together: set both or neither")
        return self


class Defguard(_Section):
    """What a Defguard core does not tell, or leaves to the gateway.

    ``listen``, ``cert_dir`` and ``adoption_timeout`` (seconds) are of generation 2, ``hostname`` of 1.
    ``resync_interval``: seconds without an update after which the whole is asked for again.
    """

    hostname: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,253}$")] = ""
    mfa_required: bool = False
    liveness: Literal["gateway", "core"] = "gateway"
    listen: ListenAddress = Listen("0.0.0.0", 50066)
    cert_dir: File | None = None
    adoption_timeout: Seconds = 600.0
    resync_interval: Seconds | None = None


class Sessions(_Section):
    """Ceilings on sessions, in seconds; of core's and these the stricter wins."""

    idle_timeout: Seconds = 300.0
    connect_timeout: Seconds = 180.0
    max_lifetime: Seconds = 86_400.0
    core_lost_grace: Annotated[SecondsOrOff, AfterValidator(ZeroOrAtLeast(1))] = 0.0
    agent_lease: Annotated[SecondsOrOff, AfterValidator(ZeroOrAtLeast(30))] = 300.0


class Stats(_Section):
    """How often the interface is observed and core told, in seconds."""

    interval: Seconds = 30.0


class Http(_Section):
    """The agent's own HTTP: /metrics, /healthz, /readyz."""

    listen: ListenAddress = Listen("127.0.0.1", 9586)


class Metrics(_Section):
    """What /metrics holds."""

    per_peer: bool = True


class Push(_Section):
    """The listener for pushed changes; off without a secret. ``max_body`` in bytes."""

    listen: ListenAddress = Listen("0.0.0.0", 9587)
    tls_cert_file: File | None = None
    tls_key_file: File | None = None
    client_ca_file: File | None = None
    secret_file: File | None = None
    max_body: Bytes = 1 << 20

    @property
    def enabled(self) -> bool:
        """Whether there is a secret, and so a listener."""
        return self.secret_file is not None

    @model_validator(mode="after")
    def _judge(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file belong together: set both or neither")
        if self.client_ca_file and not self.tls_cert_file:
            raise ValueError("client_ca_file needs TLS: set tls_cert_file and tls_key_file")
        if self.enabled and not self.tls_cert_file and not self.listen.loopback:
            raise ValueError(
                "without TLS the push endpoint may listen on loopback only: "
                'set tls_cert_file and tls_key_file, or listen = "127.0.0.1:9587"'
            )
        return self


class Firewall(_Section):
    """Whether peers that must do MFA need the kernel's own guard in place, and what else passes.

    ``acl``: core's access rules are put in force, in a chain of this ``priority`` at the forward hook.
    ``masquerade``: what peers send to other networks leaves by the host's own address.
    """

    required: bool = True
    acl: bool = True
    masquerade: bool = False
    priority: Annotated[int, Field(ge=-400, le=400)] = 0


class Hooks(_Section):
    """Commands around the interface's life, each a program with its arguments; no shell reads them.

    ``timeout``: one command, in seconds.
    """

    pre_up: Commands = ()
    post_up: Commands = ()
    pre_down: Commands = ()
    post_down: Commands = ()
    timeout: Seconds = 30.0


class Paths(_Section):
    """The agent's folders: what survives a reboot, and what does not."""

    state: File = Path("/var/lib/wg-agent/wg0")
    runtime: File = Path("/run/wg-agent/wg0")


class Log(_Section):
    """What is logged to stderr, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Config(BaseSettings):
    """A whole configuration, checked; made by ``load_config``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    interface: Interface = Interface()
    core: Core
    sessions: Sessions = Sessions()
    stats: Stats = Stats()
    http: Http = Http()
    metrics: Metrics = Metrics()
    push: Push = Push()
    firewall: Firewall = Firewall()
    hooks: Hooks = Hooks()
    paths: Paths = Paths()
    log: Log = Log()
    defguard: Defguard = Defguard()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what it is given: ``load_config`` reads the sources, to name the one at fault."""
        return (init_settings,)

    @property
    def private_key_file(self) -> Path:
        """Where the interface's private key is, or will be made on first start."""
        return self.interface.private_key_file or self.paths.state / "private.key"

    @property
    def cert_dir(self) -> Path:
        """Where the certificates of an adopted gateway are."""
        return self.defguard.cert_dir or self.paths.state / "certs"

    @property
    def acl_file(self) -> Path:
        """Where core's access rules are kept for the next start."""
        return self.paths.state / "acl.json"

    @property
    def control_socket(self) -> Path:
        """The operator's socket."""
        return self.paths.runtime / f"{self.interface.name}.sock"


SECTIONS: Final[Mapping[str, type[BaseModel]]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
KEYS: Final = tuple(f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields)
"""Every key, as ``section.key``."""


def reload_differences(old: Config, new: Config) -> tuple[dict[str, Any], list[str]]:
    """Return what changed: keys that can change live with their new values, and the other keys.

    Keys are ``section.key``.
    """
    live: dict[str, Any] = {}
    needs_restart: list[str] = []
    for dotted in KEYS:
        section, _, key = dotted.partition(".")
        value = getattr(getattr(new, section), key)
        if value == getattr(getattr(old, section), key):
            continue
        if dotted in LIVE_KEYS:
            live[dotted] = value
        else:
            needs_restart.append(dotted)
    return live, needs_restart
