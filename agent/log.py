"""The log: one JSON object a line on stderr, or a readable form on a terminal.

Everything goes through one chain, the libraries' records too, and at its end secrets are taken out
and control characters escaped, whoever logged them.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, Literal, TextIO

import structlog
from pydantic import SecretStr

from agent.encoding import format_key
from agent.model import KEY_SIZE, PresharedKey

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

REDACTED: Final = "(redacted)"
_TEXT_SIZE: Final = 2_000
_TRACEBACK_SIZE: Final = 20_000
_SECRET_NAME: Final = re.compile(
    r"(.*[._-])?(token|secret|psk|preshared_?key|private_?key|password|authorization|cookie)",
    re.IGNORECASE,
)
_SECRET_TEXT: Final = re.compile(r"whsec_[A-Za-z0-9+/=]+|(?<=\bBearer )[^\s'\",]+", re.IGNORECASE)
_PUBLIC_NAMES: Final = frozenset({"peer", "public_key", "own_key"})
_MULTILINE: Final = frozenset({"exception", "stack"})
# Their records at lower levels show headers, each run of a job, each garbage request.
_LIBRARIES: Final = {
    "apscheduler": logging.WARNING,
    "asyncio": logging.WARNING,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
    "pyroute2": logging.WARNING,
    "uvicorn": logging.ERROR,
}

_hidden: set[str] = set()


def configure(level: Level, format_: Format, stream: TextIO | None = None) -> None:
    """Send all logging of the process to ``stream`` (stderr) from now on; may be called again."""
    stream = sys.stderr if stream is None else stream
    console = format_ == "console" or (format_ == "auto" and stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        make_safe,
    ]
    renderer: structlog.typing.Processor
    if console:
        # The plain traceback: the pretty ones show local variables, and those hold keys.
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    # A record that can't be formatted must not be printed raw to stderr, with its arguments.
    logging.raiseExceptions = False
    for name, least in _LIBRARIES.items():
        logging.getLogger(name).setLevel(least)
    set_level(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def set_level(level: Level) -> None:
    """Change the least level that is logged; takes effect at once."""
    logging.getLogger().setLevel(level.upper())


def hide(*secrets: str) -> None:
    """Take these strings out of everything that is logged from now on."""
    _hidden.update(secret for secret in secrets if secret)


def make_safe(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take secrets out of a record and escape what could forge lines or drive a terminal."""
    return {
        _text(name): value if name.startswith("_") else _safe(name, value) for name, value in event.items()
    }


def _safe(name: str, value: Any) -> Any:
    match value:
        case None:
            return None
        case PresharedKey() | SecretStr():
            return REDACTED
        case _ if _SECRET_NAME.fullmatch(name):
            return REDACTED
        case bool() | int() | float():
            return value
        case str():
            return _text(value, multiline=name in _MULTILINE)
        case bytes() | bytearray() | memoryview():
            if name in _PUBLIC_NAMES and len(value) == KEY_SIZE:
                return format_key(bytes(value))
            return f"({len(value)} bytes)"
        case Mapping():
            return {_text(str(key)): _safe(str(key), item) for key, item in value.items()}
        # A named tuple with a text form of its own (a prefix, an endpoint) is shown by that.
        case list() | tuple() | set() | frozenset() if type(value).__str__ is object.__str__:
            return [_safe(name, item) for item in value]
        case _:
            return _text(str(value))


def _text(text: str, *, multiline: bool = False) -> str:
    size = _TRACEBACK_SIZE if multiline else _TEXT_SIZE
    for secret in _hidden:
        text = text.replace(secret, REDACTED)
    text = _SECRET_TEXT.sub(REDACTED, text)
    if len(text) > size:
        text = text[:size] + "…"
    if text.isprintable():
        return text
    keep = "\n" if multiline else ""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )
