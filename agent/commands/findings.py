"""What ``wg-agent check`` finds out: one finding a question, with the remedy beside the fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, Literal

from agent.errors import AgentError


class Mark(StrEnum):
    """How a question was answered; only a fault makes the check fail."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    FAULT = "fault"
    SKIPPED = "skipped"


Question = Literal[
    "configuration",
    "credentials",
    "private key",
    "push certificate",
    "folders",
    "everything else",
    "core",
    "adoption",
    "clock",
    "peers",
    "permission",
    "wireguard",
    "guard",
    "hooks",
    "forwarding",
    "routes",
    "agent",
    "listen port",
    "listeners",
]
"""What can be looked at."""

HEADINGS: Final[Mapping[str, tuple[Question, ...]]] = {
    "files": (
        "configuration",
        "credentials",
        "private key",
        "push certificate",
        "folders",
        "everything else",
    ),
    "core": ("core", "adoption", "clock", "peers"),
    "host": ("permission", "wireguard", "guard", "hooks", "forwarding", "routes"),
    "ports": ("agent", "listen port", "listeners"),
}
"""Under which heading people find the answer to each question."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer: what was looked at, what was found, and what to do about it."""

    check: Question
    mark: Mark
    message: str
    remedy: str = ""

    def document(self) -> dict[str, Any]:
        """The finding for ``--json``."""
        return asdict(self)


def fault(check: Question, error: AgentError, remedy: str = "") -> Finding:
    """A fault from an error; ``remedy`` stands in where the error has no hint."""
    return Finding(check, Mark.FAULT, error.message, error.hint or remedy)


def ok(check: Question, message: str) -> Finding:
    """All is well."""
    return Finding(check, Mark.OK, message)


def skipped(check: Question, message: str) -> Finding:
    """It could not be judged; the message says why."""
    return Finding(check, Mark.SKIPPED, message)
