"""Where a core is: its URL as a client of ours is given it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

_UNIX = "http+unix://"


@dataclass(frozen=True, slots=True)
class CoreUrl:
    """A base URL without a final slash, the unix socket to ask it through if any, and its TLS.

    ``verify`` is False for plain HTTP, where there is nothing to verify.
    """

    base: str
    socket: str | None
    verify: ssl.SSLContext | bool


def core_url(url: str, ca_file: str | None = None) -> CoreUrl:
    """Read a URL; ``http+unix:///run/core.sock:/prefix/`` names a unix socket and a path.

    TLS is checked by ``ca_file`` if given, else by the system's roots.
    """
    if url.startswith(_UNIX):
        path, _, prefix = url.removeprefix(_UNIX).partition(":")
        return CoreUrl(f"http://localhost{prefix}".rstrip("/"), path, verify=False)
    verify = ssl.create_default_context(cafile=ca_file) if url.startswith("https:") else False
    return CoreUrl(url.rstrip("/"), None, verify)
