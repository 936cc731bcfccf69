"""What ``wg-agent check`` finds out: one finding a question, with the remedy beside the fault."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from agent.errors import AgentError


class Mark(StrEnum):
    """How a question was answered; only a fault makes the check fail."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    FAULT = "fault"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer: what was looked at, what was found, and what to do about it."""

    check: str
    mark: Mark
    message: str
    remedy: str = ""

    def document(self) -> dict[str, Any]:
        """The finding for ``--json``."""
        return asdict(self)


def fault(check: str, error: AgentError, remedy: str = "") -> Finding:
    """A fault from an error; ``remedy`` stands in where the error has no hint."""
    return Finding(check, Mark.FAULT, error.message, error.hint or remedy)


def ok(check: str, message: str) -> Finding:
    """All is well."""
    return Finding(check, Mark.OK, message)


def skipped(check: str, message: str) -> Finding:
    """It could not be judged; the message says why."""
    return Finding(check, Mark.SKIPPED, message)
