"""What an option of Defguard's own gateway is in our configuration, and which have no counterpart.

Options go by their names in its configuration file. Values come from there with TOML's types, or from the
environment as text.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from pydantic import ValidationError

from agent.commands.tomltext import TomlValue, toml_value
from agent.config import SECTIONS, Listen
from agent.configfile import FOLDER

VARIABLES: Final = {
    "DEFGUARD_TOKEN": "token",
    "DEFGUARD_GRPC_URL": "grpc_url",
    "DEFGUARD_GRPC_CA": "grpc_ca",
    "DEFGUARD_USERSPACE": "userspace",
    "DEFGUARD_STATS_PERIOD": "stats_period",
    "DEFGUARD_IFNAME": "ifname",
    "PRE_UP": "pre_up",
    "POST_UP": "post_up",
    "PRE_DOWN": "pre_down",
    "POST_DOWN": "post_down",
    "HEALTH_PORT": "health_port",
    "DEFGUARD_HTTP_BIND_ADDRESS": "http_bind_address",
    "DEFGUARD_MASQUERADE": "masquerade",
    "DEFGUARD_FW_PRIORITY": "fw_priority",
    "DEFGUARD_DISABLE_FW_MGMT": "disable_firewall_management",
    "DEFGUARD_LOG_LEVEL": "log_level",
    "DEFGUARD_GRPC_PORT": "grpc_port",
    "DEFGUARD_GATEWAY_GRPC_CERT": "grpc_cert",
    "DEFGUARD_GATEWAY_GRPC_KEY": "grpc_key",
    "DEFGUARD_GATEWAY_CERT_DIR": "cert_dir",
    "DEFGUARD_ADOPTION_TIMEOUT": "adoption_timeout",
}
"""The option that an environment variable sets."""

_HOOKS: Final = ("pre_up", "post_up", "pre_down", "post_down")
_CERTS: Final = "/etc/defguard/certs"
_CERT_FILES: Final = {"grpc_cert": "gateway_grpc_cert.pem", "grpc_key": "gateway_grpc_key.pem"}
_LEVELS: Final = {"trace": "debug", "debug": "debug", "info": "info", "warn": "warning", "error": "error"}
_SYSLOG: Final = "the agent logs to stderr, and systemd's journal takes that"
_NO_COUNTERPART: Final = {
    "pidfile": "systemd knows the agent's process",
    "use_syslog": _SYSLOG,
    "syslog_facility": _SYSLOG,
    "syslog_socket": _SYSLOG,
}
_OTHER_GENERATION: Final = {
    1: ("grpc_port", "grpc_cert", "grpc_key", "cert_dir", "adoption_timeout"),
    2: ("grpc_ca",),
}
"""The options that have no use in a generation."""
_TRUE: Final = frozenset({"true", "yes", "y", "on", "t", "1"})
_FALSE: Final = frozenset({"false", "no", "n", "off", "f", "0"})
_SHELLS: Final = frozenset({"sh", "bash", "dash", "ash", "ksh", "zsh"})
_FOR_A_SHELL: Final = frozenset(";|&><$`*?()'\"")
_PLAIN_HTTP: Final = re.compile(r"http://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?/?", re.ASCII)
_LEAST_SECRET: Final = 8
"""Characters from which on a token is looked for in other options: a shorter one is none."""


@dataclass(frozen=True, slots=True)
class Line:
    """A key of ours with its value; behind a # unless ``used``. ``above`` are comments before it."""

    key: str
    value: TomlValue
    why: str = ""
    used: bool = True
    above: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{'' if self.used else '#'}{self.key} = {toml_value(self.value)}"
        return f"{text}  # {self.why}" if self.why else text


@dataclass(slots=True)
class Draft:
    """Our configuration in the making.

    ``token`` is to be stored in ``token_file``, and stands nowhere else in here.
    """

    generation: int
    token: str = field(default="", repr=False)
    token_file: str = ""
    sections: dict[str, list[Line]] = field(default_factory=dict)
    todo: list[str] = field(default_factory=list)
    """What could not be carried over and needs the operator."""
    left: dict[str, str] = field(default_factory=dict)
    """Why an option is not carried over, where nobody has to do anything about it."""
    remarks: list[str] = field(default_factory=list)
    """What is carried over and not quite the same."""

    @property
    def interface(self) -> str:
        """The interface's name."""
        return next(
            (str(line.value) for line in self.sections.get("interface", ()) if line.key == "name"), "wg0"
        )

    def put(
        self, option: str, dotted: str, value: TomlValue, why: str = "", above: tuple[str, ...] = ()
    ) -> None:
        """Set ``section.key`` to the option's value, if our configuration takes it."""
        section, _, key = dotted.partition(".")
        try:
            SECTIONS[section].model_validate({**_alone(section), key: value})
        except ValidationError as error:
            reason = error.errors(include_input=False)[0]["msg"].removeprefix("Value error, ")
            self.todo.append(f"{option}: not taken for {dotted}: {reason}")
        else:
            self.sections.setdefault(section, []).append(Line(key, value, why, above=above))

    def suggest(self, dotted: str, value: TomlValue, why: str) -> None:
        """Show ``section.key`` behind a #."""
        section, _, key = dotted.partition(".")
        self.sections.setdefault(section, []).append(Line(key, value, why, used=False))


def _alone(section: str) -> dict[str, object]:
    """What a section needs for one of its keys to be judged."""
    return {"url": "https://core.example.com/"} if section == "core" else {}


def carry_over(options: Mapping[str, object], token_file: str = "") -> Draft:
    """Return our configuration for these options of theirs.

    ``token_file`` is where core's token is going to be, by default beside the configuration. Options that
    are empty count as not set.
    """
    given = {name: value for name, value in options.items() if value not in (None, "")}
    draft = Draft(1 if given.keys() & {"token", "grpc_url"} else 2)
    theirs = _Reader(given, draft)
    _take_token(theirs, draft)
    draft.put("ifname", "interface.name", theirs.text("ifname") or "wg0")
    draft.token_file = token_file or f"{FOLDER}/{draft.interface}.token"
    if theirs.flag("userspace"):
        draft.put("userspace", "interface.backend", "userspace")
    if draft.generation == 1:
        _take_core_1(theirs, draft)
    else:
        _take_core_2(theirs, draft)
    draft.suggest(
        "defguard.mfa_required",
        value=True,
        why="if the location requires MFA: core does not tell its gateways",
    )
    if (period := theirs.number("stats_period")) is not None:
        draft.put("stats_period", "stats.interval", period)
    _take_health(theirs, draft)
    _take_firewall(theirs, draft)
    for name in _HOOKS:
        if (command := theirs.text(name)) is not None:
            _take_command(name, command, draft)
    if (level := theirs.text("log_level")) is not None:
        draft.put("log_level", "log.level", _LEVELS.get(level.lower(), level))
    rest = theirs.rest()
    if draft.generation == 1 and set(rest).intersection(_OTHER_GENERATION[1]):
        draft.remarks.append(
            "there are options of both generations. If core is of version 2, take token and grpc_url out, "
            "and import what is left"
        )
    for name in rest:
        if name in _OTHER_GENERATION[draft.generation]:
            draft.left[name] = f"it has no use in generation {draft.generation}"
        else:
            draft.left[name] = _NO_COUNTERPART.get(name, "no option of Defguard's gateway that is known here")
    return draft


class _Reader:
    """Takes options out of those that are given; one that can't be read is something to do."""

    def __init__(self, given: dict[str, object], draft: Draft) -> None:
        self._given = given
        self._draft = draft

    def text(self, name: str) -> str | None:
        value = self._given.pop(name, None)
        if value is None or isinstance(value, str):
            return value
        self._draft.todo.append(f"{name}: not carried over: it is no text")
        return None

    def number(self, name: str) -> int | None:
        value = self._given.pop(name, None)
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,9}", value.strip(), re.ASCII):
            value = int(value)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        self._draft.todo.append(f"{name}: not carried over: it is no whole number")
        return None

    def flag(self, name: str) -> bool | None:
        value = self._given.pop(name, None)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
            return value.strip().lower() in _TRUE
        self._draft.todo.append(f"{name}: not carried over: it is neither true nor false")
        return None

    def hide(self, secret: str) -> None:
        """Take out whatever holds the secret."""
        for name in [name for name, value in self._given.items() if secret in f"{name} {value}"]:
            del self._given[name]
            self._draft.todo.append("an option that holds the token was left out: only token may")

    def rest(self) -> list[str]:
        """What nobody has taken."""
        return list(self._given)


def _take_token(theirs: _Reader, draft: Draft) -> None:
    token = (theirs.text("token") or "").strip()
    if len(token) >= _LEAST_SECRET:
        theirs.hide(token)
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        draft.todo.append("token: it is no token of core's, which has no spaces; it was not carried over")
        return
    draft.token = token


def _take_core_1(theirs: _Reader, draft: Draft) -> None:
    draft.put("", "core.protocol", "defguard")
    draft.put("", "core.generation", 1)
    url = theirs.text("grpc_url")
    if url is None:
        draft.suggest("core.url", "https://core.example.com:50055/", why="required")
        draft.todo.append("grpc_url: it is not set: set core.url")
    else:
        _take_url(url.strip(), draft)
    draft.put("token", "core.token_file", draft.token_file, "only its owner may read it")
    if not draft.token:
        draft.todo.append(f"token: there is none: put the one that core shows into {draft.token_file}")
    if (ca := theirs.text("grpc_ca")) is not None:
        draft.put("grpc_ca", "core.ca_file", ca, "the agent's user has to be able to read it")
        if not PurePosixPath(ca).is_absolute():
            draft.todo.append(
                "grpc_ca: write the whole path: a relative one counts from the configuration's folder"
            )
    if theirs.text("name") is not None:
        draft.left["name"] = "core knows a gateway by the name of its host: see defguard.hostname"
    draft.suggest(
        "defguard.hostname",
        "gateway-1",
        why="if the old gateway's host, or container, had another name than this host",
    )


def _take_url(url: str, draft: Draft) -> None:
    try:
        SECTIONS["core"].model_validate({"protocol": "defguard", "generation": 1, "url": url})
    except ValidationError as error:
        reason = error.errors(include_input=False)[0]["msg"].removeprefix("Value error, ")
    else:
        draft.put("grpc_url", "core.url", url)
        return
    if _PLAIN_HTTP.fullmatch(url):
        draft.suggest("core.url", url, why="refused: it would send every session's key in the clear")
        draft.todo.append(
            "grpc_url: it is plain http:// to another host, and core sends the pre-shared keys of all "
            "sessions there. Have core, or a proxy before it that speaks HTTP/2, serve TLS, or bring core's "
            "port to a loopback address here through a tunnel; then set core.url"
        )
    else:
        draft.suggest("core.url", "https://core.example.com:50055/", why="required")
        draft.todo.append(f"grpc_url: not taken for core.url: {reason}; set it by hand")


def _take_core_2(theirs: _Reader, draft: Draft) -> None:
    draft.put("", "core.protocol", "defguard")
    draft.put("", "core.generation", 2, "core calls the gateway, there is no URL")
    port = theirs.number("grpc_port")
    if port is not None:
        draft.put("grpc_port", "defguard.listen", f"0.0.0.0:{port}", "core calls here")
    folder = theirs.text("cert_dir") or _CERTS
    draft.put("cert_dir", "defguard.cert_dir", folder, "an adopted gateway's certificates")
    for name, fixed in _CERT_FILES.items():
        path = theirs.text(name)
        if path is None:
            continue
        draft.left[name] = f"it is always {fixed} in defguard.cert_dir"
        if path != str(PurePosixPath(folder, fixed)):
            draft.todo.append(
                f"{name}: copy {path} to {PurePosixPath(folder, fixed)}: files there have fixed names"
            )
    if (minutes := theirs.number("adoption_timeout")) is not None:
        draft.put("adoption_timeout", "defguard.adoption_timeout", 60 * minutes, "seconds")
    if theirs.text("name") is not None:
        draft.left["name"] = "there is no such thing in generation 2 of the protocol"


def _take_health(theirs: _Reader, draft: Draft) -> None:
    port, host = theirs.number("health_port"), theirs.text("http_bind_address")
    if port is None:
        if host is not None:
            draft.left["http_bind_address"] = "without health_port there is nothing that it is for"
        return
    host = (host or "0.0.0.0").strip().strip("[]")
    try:
        listen = str(Listen(str(ipaddress.ip_address(host)), port))
    except ValueError:
        draft.todo.append("http_bind_address: it is no IP address; set http.listen")
        return
    draft.put("health_port", "http.listen", listen, "/readyz: 200 while core is connected, else 503")
    draft.remarks.append(
        "health_port: ask for /readyz. Beside it are /healthz and /metrics, which shows the names and "
        "addresses of peers: let nobody else reach the port, or set metrics.per_peer = false"
    )


def _take_firewall(theirs: _Reader, draft: Draft) -> None:
    if (masquerade := theirs.flag("masquerade")) is not None:
        draft.put("masquerade", "firewall.masquerade", masquerade, "of what comes from peers")
    if (priority := theirs.number("fw_priority")) is not None:
        draft.put("fw_priority", "firewall.priority", priority)
    if (disabled := theirs.flag("disable_firewall_management")) is not None:
        draft.put("disable_firewall_management", "firewall.acl", not disabled)


def _take_command(name: str, command: str, draft: Draft) -> None:
    """A command is split where there is white space, as theirs is, and no shell reads it here either."""
    words = command.split()
    if not words:
        return
    above: list[str] = []
    shell = PurePosixPath(words[0]).name in _SHELLS and "-c" in words[1:]
    if shell or _FOR_A_SHELL & set(command):
        above.append(
            f"{name}: it looks as if written for a shell. Defguard's gateway starts it without one, with "
            "these very words; so does the agent. See whether it does what it should"
        )
        if shell and (meant := _as_a_shell_splits(command)) not in (None, words):
            above.append(f"perhaps it was meant as: {name} = {toml_value([_escaped(meant)])}")
        draft.remarks.append(f"{name}: it looks as if written for a shell, and there is none: see [hooks]")
    if name == "pre_up":
        above.append("pre_up: while it fails the interface stays down")
    draft.put(name, f"hooks.{name}", [_escaped(words)], above=tuple(above))


def _as_a_shell_splits(command: str) -> list[str] | None:
    try:
        return shlex.split(command)
    except ValueError:
        return None


def _escaped(words: list[str]) -> list[str]:
    """The words as [hooks] has them: %i would be replaced there, and %% is a percent sign."""
    return [re.sub(r"%(?=[%i])", "%%", word) for word in words]
