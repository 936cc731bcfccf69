"""Values as TOML, the few kinds that a configuration has.

A library would write whole documents, and have no place for the comments between the keys.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeAlias

TomlValue: TypeAlias = "str | bool | int | Sequence[TomlValue]"


def toml_value(value: TomlValue) -> str:
    """Return the value as it stands to the right of a key, on one line.

    JSON's strings are TOML's basic strings, but for its way with what lies beyond 16 bits, and for DEL. What
    is not printable is escaped: this may end up on a terminal. There are no lone surrogates in TOML.
    """
    match value:
        case str():
            text = json.dumps(value, ensure_ascii=False)
            return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case _:
            return f"[{', '.join(map(toml_value, value))}]"
