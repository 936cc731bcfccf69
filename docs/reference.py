"""Writes docs/configuration.md and docs/man/wg-agent.toml.5: ``python -m docs.reference``, or ``make docs``.

What a key means stands once, in config.example.toml, and is read from there; its type, range, default and
whether SIGHUP reloads it come from the model (``agent.config``). tests/docs holds both files to it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import AfterValidator, BeforeValidator
from pydantic.fields import FieldInfo

from agent import __version__
from agent.config import ENV_PREFIX, LIVE_KEYS, SECTIONS, ZeroOrAtLeast

ROOT: Final = Path(__file__).parents[1]
EXAMPLE: Final = ROOT / "config.example.toml"
_YEAR: Final = 31_536_000
_WORDS: Final = {
    "_parse_listen": "`ADDRESS:PORT`",
    "_split_list": "list of addresses with their networks",
    "_parse_commands": "list of commands",
    "_check_path": "path",
    "_check_core_url": "URL",
    "check_interface_name": "name, 1 to 15 characters of `A-Z a-z 0-9 _ = + . -`",
}
"""What the model's own validators take, in words."""

_ENTRY: Final = re.compile(r"#?(?P<key>\w+) = (?P<value>.*?)\s+# (?P<why>\S.*)")
_HEADER: Final = re.compile(r"\[(\w+)\]")
_LIVE: Final = "; live"
_DOTTED: Final = rf"\b(?:{'|'.join(SECTIONS)})\.\w+\b"
_CODE: Final = re.compile(
    rf"`[^`]+`|\[+\".*?\"\]+|%i\b|\$[A-Z_]+|-i wg0|http\+unix:\S+|http://|[\w/]+\.(?:md|key)\b|{_DOTTED}"
)
"""What stands in the example's plain text as code."""

_ABOUT: Final = """\
The configuration of the agent of `wg0` is the file `/etc/wg-agent/wg0.toml` (`-i wg0`), or whichever
`-c FILE` names. `wg-agent check` says what is wrong with it, by line. A key that is not in this list is an
error.

Each key can be overridden in the environment by the variable given here; a list of addresses is separated by
commas there, a list of commands is JSON. Each `*_file` key can come as a systemd credential instead, under
the name given here (`LoadCredential=core.token:/etc/wg-agent/wg0.token` in a drop-in of the unit). The
environment wins over credentials, those over the file, the file over the defaults. Files with secrets must
be their owner's alone (mode 600). A relative path in the file counts from the file's folder. Times are in
seconds and may have a fraction.

`systemctl reload wg-agent@wg0` (SIGHUP) takes over the keys marked *reload* at once, and the log names the
changed ones that need a restart. A restart leaves every tunnel as it is. Credentials are read at the
start."""


class Key(NamedTuple):
    """One key as the reference shows it; ``default`` is empty where there is none, texts are Markdown."""

    section: str
    name: str
    takes: str
    default: str
    environment: str
    credential: str
    live: bool
    why: str


class Section(NamedTuple):
    """A section: its ``about`` in paragraphs, and its keys in the model's order."""

    name: str
    about: list[str]
    keys: list[Key]


def sections() -> list[Section]:
    """Return the whole configuration. ValueError names what the example or this module does not say."""
    said = _example()
    return [
        Section(name, said[name].about, [_key(name, key, said[name]) for key in model.model_fields])
        for name, model in SECTIONS.items()
    ]


class _Said(NamedTuple):
    about: list[str]
    lines: dict[str, tuple[str, str]]
    """Each key's value as TOML and its line of why; an example's value where it has no default."""


def _example() -> dict[str, _Said]:
    """Return what config.example.toml says, by section."""
    said: dict[str, _Said] = {}
    fresh = True
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if header := _HEADER.match(line):
            said[header[1]] = _Said([], {})
            fresh = True
        elif entry := _ENTRY.fullmatch(line):
            next(reversed(said.values())).lines[entry["key"]] = (entry["value"], entry["why"])
        elif said and line.startswith("#"):
            about, text = next(reversed(said.values())).about, line.removeprefix("#").strip()
            if fresh or not text:
                about.append(text)
            else:
                about[-1] = f"{about[-1]} {text}".strip()
            fresh = False
    return said


def _key(section: str, name: str, said: _Said) -> Key:
    dotted = f"{section}.{name}"
    if name not in said.lines:
        raise ValueError(f"{EXAMPLE.name} does not say in one line what {dotted} is for")
    value, why = said.lines[name]
    field = SECTIONS[section].model_fields[name]
    live = dotted in LIVE_KEYS
    if live != why.endswith(_LIVE):
        raise ValueError(f"{EXAMPLE.name}: {dotted} is {'' if live else 'not '}live")
    required = field.default is None or field.default == ""
    return Key(
        section,
        name,
        _takes(dotted, field),
        "" if required else f"`{value}`",
        f"{ENV_PREFIX}{section}__{name}".upper(),
        dotted.removesuffix("_file") if name.endswith("_file") else "",
        live,
        why.removesuffix(_LIVE),
    )


def _takes(dotted: str, field: FieldInfo) -> str:
    """Return what values a key takes, in words."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    kind = field.annotation
    metadata = list(field.metadata)
    if get_origin(kind) is Literal:
        return " \\| ".join(f"`{_toml(choice)}`" for choice in get_args(kind))
    if kinds and NoneType in get_args(kind):
        kind = kinds[0]
        metadata += getattr(kind, "__metadata__", ())
        kind = getattr(kind, "__origin__", kind)
    for item in metadata:
        if isinstance(item, AfterValidator) and isinstance(item.func, ZeroOrAtLeast):
            return f"seconds, 0 (off) or {item.func.least:g} to {_span(_bounds(metadata)[1])}"
        if isinstance(item, BeforeValidator | AfterValidator) and item.func.__name__ in _WORDS:
            return _WORDS[item.func.__name__]
    low, high = _bounds(metadata)
    if kind is bool:
        return "`true` \\| `false`"
    if kind is float:
        return f"seconds, {low:g} to {_span(high)}"
    if kind is int:
        return f"{low} to {_count(high)}"
    if kind is str:
        return "text"
    raise ValueError(f"docs/reference.py has no words for the type of {dotted}: {field.annotation}")


def _bounds(metadata: list[Any]) -> tuple[Any, Any]:
    """Return the least and the greatest value that a number may have."""
    low = next((item.ge for item in metadata if isinstance(item, Ge)), None)
    high = next((item.le for item in metadata if isinstance(item, Le)), None)
    for item in metadata:  # an Annotated alias within the field's own
        if isinstance(item, FieldInfo):
            inner_low, inner_high = _bounds(list(item.metadata))
            low, high = low if inner_low is None else inner_low, high if inner_high is None else inner_high
    return low, high


def _span(seconds: float) -> str:
    return f"{seconds // _YEAR:g} years" if seconds >= _YEAR else f"{seconds:g}"


def _count(number: int) -> str:
    if number >= 1 << 33 and number & (number - 1) == 0:
        return f"2^{number.bit_length() - 1}"
    return str(number)


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def configuration_md() -> str:
    """Return docs/configuration.md."""
    parts = [
        "# Configuration\n",
        "<!-- Written by `make docs` from agent/config.py and config.example.toml: edit those. -->\n",
        f"{_ABOUT}\n",
    ]
    for section in sections():
        parts.append(f"## [{section.name}]\n")
        parts += [f"{_marked(paragraph)}\n" for paragraph in section.about if paragraph]
        parts.append(
            "| key | takes | default | environment | credential | on SIGHUP | what it is for |\n"
            "| --- | --- | --- | --- | --- | --- | --- |"
        )
        parts += [_row(key) for key in section.keys]
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


def _row(key: Key) -> str:
    cells = [
        f"`{key.name}`",
        key.takes,
        key.default or "none",
        f"`{key.environment}`",
        f"`{key.credential}`" if key.credential else "",
        "reload" if key.live else "restart",
        _marked(key.why).replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


def _marked(text: str) -> str:
    """The example's plain text with keys and such as code."""
    return "".join(f"`{part}`" if is_code else part for part, is_code in _parts(text))


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    at = 0
    for found in _CODE.finditer(text):
        yield text[at : found.start()], False
        yield found[0].strip("`"), True
        at = found.end()
    yield text[at:], False


def man_page() -> str:
    """Return docs/man/wg-agent.toml.5."""
    lines = [
        '.\\" Written by make docs from agent/config.py and config.example.toml.',
        f'.TH WG-AGENT.TOML 5 "" "wg-agent {__version__}" "wg-agent"',
        ".ad l",
        ".SH NAME",
        "wg-agent.toml \\- configuration of wg-agent",
        ".SH SYNOPSIS",
        ".I /etc/wg-agent/INTERFACE.toml",
        ".SH DESCRIPTION",
    ]
    lines += _paragraphs(_ABOUT.split("\n\n"))
    for section in sections():
        lines.append(f".SH [{section.name.upper()}]")
        lines += _paragraphs([paragraph for paragraph in section.about if paragraph])
        for key in section.keys:
            takes = key.takes.replace("\\|", "|").replace("`", "")
            default = key.default.strip("`") or "none"
            also = [f"credential {key.credential}"] if key.credential else []
            also.append(f"on SIGHUP: {'reload' if key.live else 'restart'}")
            lines += [
                ".TP",
                f"\\fB{_roff(key.name)}\\fR",
                _start(_with_fonts(_sentence(key.why))),
                ".br",
                _start(_roff(f"{takes}. Default: {default}. {key.environment}; {'; '.join(also)}.")),
            ]
    lines += [
        *(".SH FILES", ".I /etc/wg-agent/INTERFACE.toml", ".br"),
        *(".I /lib/systemd/system/wg\\-agent@.service", ".SH SEE ALSO"),
        *(".BR wg\\-agent (1),", ".BR wg (8),", ".BR systemd.exec (5)"),
    ]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _paragraphs(texts: list[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield ".PP"
        yield _start(_with_fonts(" ".join(text.split()).replace("*reload*", "reload")))


def _with_fonts(text: str) -> str:
    return "".join(f"\\fI{_roff(part)}\\fR" if is_code else _roff(part) for part, is_code in _parts(text))


def _roff(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha").replace("…", "...")


def _start(line: str) -> str:
    """A line of text that is no request, whatever it begins with."""
    return f"\\&{line}" if line.startswith((".", "'")) else line


FILES: Final[Mapping[Path, Any]] = {
    ROOT / "docs/configuration.md": configuration_md,
    ROOT / "docs/man/wg-agent.toml.5": man_page,
}
"""Each written file with the function that returns its content."""


def main() -> int:
    """Write the files that are not current; name them."""
    for path, make in FILES.items():
        text = make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
