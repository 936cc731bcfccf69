"""What both generations say of themselves in every call's metadata, and how a call's failure is told."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import grpc

from agent.errors import AgentError, CoreRejected, CoreUnavailable

VERSION: Final = "defguard-component-version"
SYSTEM: Final = "defguard-component-system"
# Of the gateways that this one stands in for: core turns away older ones, and is told nothing else by it.
_SPOKEN: Final = {1: "1.6.6", 2: "2.0.4"}
_SEMVER: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)(-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?", re.ASCII)
_REFUSALS: Final = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.UNIMPLEMENTED: 501,
}
_HINTS: Final = {
    grpc.StatusCode.UNAUTHENTICATED: "give the token that core shows for this location (core.token_file)",
    grpc.StatusCode.FAILED_PRECONDITION: "core wants a gateway of another version: see core.generation",
    grpc.StatusCode.UNIMPLEMENTED: "is it a Defguard core, and of the generation in core.generation?",
}


def versions(generation: int) -> tuple[tuple[str, str], ...]:
    """Return the metadata by which a gateway tells core what it is."""
    system = f"{platform.system()};{platform.release()};{platform.machine()}"
    return (VERSION, _SPOKEN[generation]), (SYSTEM, system)


def semver(text: str) -> tuple[int, int, int, bool] | None:
    """Return major, minor, patch and whether it is a release; None for what is no version."""
    match = _SEMVER.fullmatch(text)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]), match[4] is None)


def value(metadata: Iterable[Sequence[Any]] | None, name: str) -> str:
    """Return a call's metadata of this name, empty if it is not there or no text."""
    for key, text in metadata or ():
        if key == name:
            return text if isinstance(text, str) else ""
    return ""


def failure(code: grpc.StatusCode, details: str | None) -> AgentError:
    """Return what a call's failure is: core can't be had, or said no."""
    # Core's own words, bounded and on one line; they never hold what was sent to it.
    details = " ".join((details or "").split())[:200]
    message = f"core answered {code.name}" + (f": {details}" if details else "")
    if code in _REFUSALS:
        return CoreRejected(message, _HINTS.get(code, ""), status=_REFUSALS[code])
    return CoreUnavailable(message)
