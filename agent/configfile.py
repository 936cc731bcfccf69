"""Reading the configuration from its sources, and saying where the fault is when there is one."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from agent.config import ENV_PREFIX, KEYS, SECTIONS, Config, check_interface_name
from agent.errors import ConfigError, ConfigUnreadable

FOLDER: Final = Path("/etc/wg-agent")
_DELIMITER: Final = "__"
_CONFIG_SIZE: Final = 1 << 20


def config_path(interface: str) -> Path:
    """Return the file that ``-i INTERFACE`` names; ConfigError for what is no interface's name."""
    try:
        return FOLDER / f"{check_interface_name(interface)}.toml"
    except ValueError as error:
        raise ConfigError(f"-i: {error}") from None


def load_config(path: Path, *, interface: str | None = None) -> Config:
    """Read and check the configuration in ``path`` and in the environment.

    ``interface`` is the one that the file was chosen by (``-i``): ``interface.name`` defaults to
    it, and another name is a fault. Relative paths in the file count from its folder. Secrets
    are not read. Raises ConfigUnreadable if the file can't be read or is not TOML, ConfigError for
    any other fault.
    """
    text = _read_config(path)
    try:
        from_file = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigUnreadable(f"{path}: not TOML: {error}", "correct the line named") from None
    from_env = _from_environment()
    layers = [_resolved(from_file, path.parent), _from_credentials(), from_env]
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            if isinstance(values, dict) and isinstance(merged.get(section, {}), dict):
                merged[section] = merged.get(section, {}) | values
            else:
                merged[section] = values
    _add_defaults(merged, interface)
    try:
        config = Config(**merged)
    except ValidationError as error:
        where = _Origin(path, text, from_file, from_env)
        faults = list(
            dict.fromkeys(_describe(item["loc"], item["type"], item["msg"], where) for item in _items(error))
        )
        raise ConfigError("; ".join(faults)) from None
    if interface is not None and config.interface.name != interface:
        raise ConfigError(
            f"{path}: interface.name is {config.interface.name}, but this file is for {interface}",
            "correct interface.name, or name the file with -c",
        )
    return config


def _read_config(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_CONFIG_SIZE + 1)
        if len(content) > _CONFIG_SIZE:
            raise ConfigUnreadable(f"{path} is larger than a configuration can be", "is this the right file?")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigUnreadable(
            f"{path} does not exist",
            "copy config.example.toml there and set core.url, or name another file with -c",
        ) from None
    except OSError as error:
        raise ConfigUnreadable(
            f"{path} can't be read: {error.strerror}", "it holds no secrets: chmod 644"
        ) from None
    except UnicodeDecodeError:
        raise ConfigUnreadable(f"{path}: not TOML: not UTF-8", "save it as UTF-8") from None


def _resolved(from_file: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The file's values with relative paths made absolute."""
    base = folder.absolute()
    return {
        section: {
            key: str(base / value) if isinstance(value, str) and value and _is_path(section, key) else value
            for key, value in values.items()
        }
        if isinstance(values, dict)
        else values
        for section, values in from_file.items()
    }


def _is_path(section: str, key: str) -> bool:
    return section == "paths" or key.endswith("_file")


def _from_environment() -> dict[str, Any]:
    known = {f"{ENV_PREFIX}{dotted.replace('.', _DELIMITER)}".upper(): dotted for dotted in KEYS}
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            near = get_close_matches(name.upper(), known, 1)
            raise ConfigError(
                f"the environment variable {name} names no key of the configuration",
                f"did you mean {near[0]}?" if near else f"write {ENV_PREFIX}SECTION__KEY",
            )
    source = EnvSettingsSource(
        Config,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=_DELIMITER,
        env_ignore_empty=True,
        case_sensitive=False,
    )
    return source()


def _from_credentials() -> dict[str, Any]:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return {}
    found: dict[str, Any] = {}
    for dotted in KEYS:
        path = Path(folder) / dotted.removesuffix("_file")
        if dotted.endswith("_file") and path.exists():
            section, _, key = dotted.partition(".")
            found.setdefault(section, {})[key] = str(path)
    return found


def _add_defaults(merged: dict[str, Any], interface: str | None) -> None:
    """Fill in the defaults that depend on the surroundings: ``-i`` and systemd's folders."""
    section = merged.setdefault("interface", {})
    if isinstance(section, dict) and interface is not None:
        section.setdefault("name", interface)
    name = section.get("name", "wg0") if isinstance(section, dict) else "wg0"
    paths = merged.setdefault("paths", {})
    if isinstance(paths, dict):
        for key, variable, base in (
            ("state", "STATE_DIRECTORY", "/var/lib/wg-agent"),
            ("runtime", "RUNTIME_DIRECTORY", "/run/wg-agent"),
        ):
            paths.setdefault(key, os.environ.get(variable, "").partition(":")[0] or f"{base}/{name}")


class _Origin(NamedTuple):
    """Where values came from, to name the place of a fault."""

    path: Path
    text: str
    from_file: dict[str, Any]
    from_env: dict[str, Any]


def _items(error: ValidationError) -> Iterator[dict[str, Any]]:
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        yield dict(item)


def _describe(loc: tuple[int | str, ...], kind: str, message: str, where: _Origin) -> str:
    """One fault as a sentence: the place, the key, what is wrong and what to do."""
    section = str(loc[0]) if loc else ""
    key = str(loc[1]) if len(loc) > 1 else ""
    dotted = f"{section}.{key}" if key else section
    if key and key in _part(where.from_env, section):
        place = f"{ENV_PREFIX}{section}{_DELIMITER}{key}".upper()
    else:
        line = _line_of(where.text, section, key)
        place = f"{where.path}, line {line}" if line else str(where.path)
    if kind == "extra_forbidden":
        is_section = not key and isinstance(where.from_file.get(section), dict)
        what = f"unknown section [{section}]" if is_section else f"unknown key {dotted}"
        return f"{place}: {what}{_nearest(section, key, is_section=is_section)}"
    if kind == "missing":
        return f"{place}: {'core.url' if dotted == 'core' else dotted} is missing; set it"
    return f"{place}: {dotted}: {message.removeprefix('Value error, ')}"


def _part(layer: dict[str, Any], section: str) -> dict[str, Any]:
    values = layer.get(section)
    return values if isinstance(values, dict) else {}


def _nearest(section: str, key: str, *, is_section: bool) -> str:
    if is_section:
        near = [f"[{name}]" for name in get_close_matches(section, SECTIONS, 1)]
    elif section in SECTIONS:
        if key in {"token", "secret", "private_key", "client_key", "tls_key"}:
            return f"; put the secret in a file of mode 600 and name that as {section}.{key}_file"
        near = [
            f"{section}.{match}" for match in get_close_matches(key, SECTIONS[section].model_fields, 1, 0.5)
        ]
        near = near or get_close_matches(f"{section}.{key}", KEYS, 1)
    else:
        near = [dotted for dotted in KEYS if dotted.partition(".")[2] == section]
        near = near or get_close_matches(section, KEYS, 1)
    return f"; did you mean {near[0]}?" if near else "; remove it"


def _line_of(text: str, section: str, key: str) -> int | None:
    """The line where the key (or the section's header) stands, None if it is written unusually."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            current = header[1]
            if current == section and not key:
                return number
        elif assigned := re.match(r"\s*([\w.-]+)\s*=", line):
            dotted = f"{current}.{assigned[1]}" if current else assigned[1]
            if dotted == (f"{section}.{key}" if key else section):
                return number
    return None
