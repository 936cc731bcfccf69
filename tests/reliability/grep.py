"""Looks for secrets in whatever the agent lets out, in every form that they may have taken there."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PIECES = 4
"""Parts of which none may be seen: a 16-byte piece of a 32-byte key holds at least one of them whole."""


class Secret(NamedTuple):
    """What must not be seen, and what to call it; ``raw`` is a key's bytes or a token's text."""

    name: str
    raw: bytes


class Finding(NamedTuple):
    place: str
    secret: str
    form: str


def forms(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Every form of the bytes, in pieces: a cut one is found, too."""
    written = {
        "raw": raw,
        "base64": base64.b64encode(raw),
        "URL-safe base64": base64.urlsafe_b64encode(raw),
        "hex": raw.hex().encode(),
        "HEX": raw.hex().upper().encode(),
    }
    for form, text in written.items():
        for piece in _pieces(text):
            yield form, piece
            if form == "raw":
                yield "repr", repr(piece)[2:-1].encode()


def _pieces(text: bytes) -> Iterator[bytes]:
    size = len(text) // PIECES
    for number in range(PIECES):
        yield text[number * size : (number + 1) * size]


@dataclass
class Hunt:
    """What was looked for, and where; ``found`` is empty if all is well."""

    secrets: list[Secret] = field(default_factory=list)
    found: list[Finding] = field(default_factory=list)
    looked_through: int = 0

    def look(self, place: str, content: bytes, *, allowed: str = "") -> list[Finding]:
        """Look for every secret but the one that is allowed there; what was found is kept, too."""
        self.looked_through += len(content)
        found = [
            Finding(place, secret.name, form)
            for secret in self.secrets
            if secret.name != allowed
            for form, piece in forms(secret.raw)
            if piece in content
        ]
        self.found += found
        return found

    def look_below(self, folder: Path, allowed: dict[Path, str]) -> int:
        """Look through every file below a folder; how many there were. ``allowed``: who may be where."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in files:
            self.look(str(path), path.read_bytes(), allowed=allowed.get(path, ""))
        return len(files)
