"""``wg-agent import-defguard``: prints our configuration for that of Defguard's own gateway."""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from dotenv.parser import parse_stream

from agent.commands.defguard_options import VARIABLES, Draft, carry_over
from agent.commands.output import shown
from agent.config import SECTIONS
from agent.configfile import FOLDER
from agent.errors import ConfigError
from agent.hardening import forbid_core_dumps
from agent.keys import write_secret_file

_SIZE: Final = 1 << 20
_WIDTH: Final = 110


class _Source(NamedTuple):
    """The options by their names in the configuration file, and what is to be said of where they are from."""

    options: Mapping[str, object]
    about: list[str]
    left: Mapping[str, str]


def execute(arguments: argparse.Namespace) -> int:
    """Print the configuration; 1 if something of it is left for the operator to do."""
    forbid_core_dumps()  # it reads the token
    source = _read(arguments.file, arguments.env)
    token_file: Path | None = arguments.token_file
    draft = carry_over(source.options, "" if token_file is None else str(token_file.absolute()))
    draft.left.update(source.left)
    if token_file is not None:
        if not draft.token:
            raise ConfigError("there is no token to be written", "leave --token-file out")
        write_secret_file(token_file, "--token-file", draft.token.encode() + b"\n")
    elif draft.token:
        draft.todo.append(
            f"token: it is a secret and not printed: run this again with --token-file {draft.token_file}, "
            "or write it there yourself (mode 600)"
        )
    sys.stdout.write("".join(f"{line}\n" for line in _lines(draft, source.about)))
    sys.stdout.flush()
    for text in draft.todo:
        sys.stderr.write(f"wg-agent: {shown(text)}\n")
    return 1 if draft.todo else 0


# Reading theirs.


def _read(file: Path | None, env: Path | None) -> _Source:
    """Read what is named; raises ConfigError."""
    variables = {} if env is None else _variables(env)
    if file is not None:
        about = [f"It is made from {file}."]
        if env is not None:
            about.append(
                f"{env} was not used: with a configuration file Defguard's gateway does not read the "
                f"environment, either. It sets: {', '.join(variables) or 'nothing'}."
            )
        return _Source(*_from_file(file, about))
    if env is None:
        raise ConfigError(
            "say what to import",
            "wg-agent import-defguard /etc/defguard/gateway.toml, or --env FILE where there is none",
        )
    known = {VARIABLES[name]: value for name, value in variables.items() if name in VARIABLES}
    unknown = dict.fromkeys(
        sorted(variables.keys() - VARIABLES), "no variable of Defguard's gateway that is known here"
    )
    return _Source(known, [f"It is made from the environment in {env}."], unknown)


def _from_file(file: Path, about: list[str]) -> tuple[dict[str, object], list[str], dict[str, str]]:
    try:
        found = tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}", "is this Defguard's gateway.toml?") from None
    options: dict[str, object] = {}
    for name, value in found.items():
        # Commands may have a hyphen in their names.
        spelled = name.replace("-", "_") if name.endswith(("-up", "-down")) else name
        if spelled in options:
            raise ConfigError(f"{file}: {spelled} is set twice, as {name} too", "remove one of them")
        options[spelled] = value
    return options, about, {}


def _variables(env: Path) -> dict[str, str]:
    """The variables of an environment file, as systemd reads it: without quotes, and nothing is expanded."""
    variables: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(_text(env))):
        if binding.error:
            raise ConfigError(
                f"{env}, line {binding.original.line}: no KEY=VALUE", "is this an environment file?"
            )
        if binding.key is not None and binding.value is not None:
            variables[binding.key] = binding.value
    return variables


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_SIZE + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read: {error.strerror}", "run this as root, or correct the path"
        ) from None
    if len(content) > _SIZE:
        raise ConfigError(f"{path} is larger than a configuration can be", "is this the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8", "is this the right file?") from None


# Printing ours.


def _lines(draft: Draft, about: Sequence[str]) -> Iterator[str]:
    name = draft.interface
    why = "there is a token or grpc_url" if draft.generation == 1 else "there is neither a token nor grpc_url"
    yield from _comment(f"wg-agent's configuration for {name}, instead of Defguard's own gateway.")
    for text in about:
        yield from _comment(text)
    yield from _comment(f"Generation {draft.generation} of its protocol, since {why}.")
    yield from _list("Left for you to do:", draft.todo)
    yield from _list("Not quite the same:", draft.remarks)
    yield from _list("Without a counterpart:", [f"{option}: {why}" for option, why in draft.left.items()])
    yield from _list("How to go on:", _steps(draft))
    for section in SECTIONS:
        if lines := draft.sections.get(section):
            yield ""
            yield f"[{section}]"
            for line in lines:
                for text in line.above:
                    yield from _comment(text)
                yield str(line)


def _steps(draft: Draft) -> Iterator[str]:
    name = draft.interface
    path = FOLDER / f"{name}.toml"
    yield f"save this as {path}; what it leaves out keeps its default (config.example.toml)"
    yield (
        "the agent needs its extra for Defguard: the Debian package has it; from a checkout: "
        "pipx install '.[defguard]'"
    )
    unit = f"a drop-in (systemctl edit wg-agent@{name})"
    if draft.generation == 1:
        yield (
            "in the systemd unit the agent is not root, and gets the token as a credential: enable "
            f"LoadCredential=core.token in {unit}"
        )
    else:
        yield (
            "in the systemd unit the agent is not root and can't read defguard.cert_dir: have systemd "
            "pass the four files there on as credentials (docs/defguard.md), and leave the key out; "
            "without them core has to adopt the gateway again"
        )
    yield f"stop and disable Defguard's gateway: two programs must not write to {name}"
    yield f"systemctl enable --now wg-agent@{name}, then wg-agent check -i {name}"


def _list(heading: str, items: Sequence[str] | Iterator[str]) -> Iterator[str]:
    for number, item in enumerate(items):
        if number == 0:
            yield "#"
            yield f"# {heading}"
        yield from _comment(item, "# - ")


def _comment(text: str, start: str = "# ") -> list[str]:
    """The text as comments: whatever came from elsewhere has no line of its own."""
    return textwrap.wrap(
        shown(text),
        _WIDTH,
        initial_indent=start,
        subsequent_indent="#" + " " * (len(start) - 1),
        break_long_words=False,
        break_on_hyphens=False,
    )
