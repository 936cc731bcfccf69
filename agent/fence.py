"""Fencing: what of core's messages fits on what is held (rule 18).

Every change carries an epoch and a revision and applies only on top of the revision before it. What
does not fit is not applied, late or out of order, but answered by a pull.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from agent.errors import InvalidMessage
from agent.model import Change, Now, Snapshot


class Position(NamedTuple):
    """Where the held state stands in core's history."""

    epoch: str
    revision: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.revision}"


class Verdict(StrEnum):
    """What becomes of a message."""

    APPLIED = "applied"
    HELD = "held"
    """Nothing in it is new."""
    PULL = "pull"
    """It does not fit on what is held (gap, other epoch, unknown peer): a pull is under way."""
    NO_STATE = "no_state"
    """There is no state of core's yet for a change to apply to."""


class Fence:
    """Guards the held position; whoever applies a message tells it by ``advance``."""

    def __init__(self) -> None:
        self.position: Position | None = None
        """None before the first state of this process."""
        self._advanced_at = 0.0

    def judge_snapshot(self, snapshot: Snapshot) -> Verdict:
        """Whether to load a snapshot: any but an older one of the held epoch.

        One that was requested before the held revision arrived was merely overtaken. Raises
        InvalidMessage for one that shows core going back.
        """
        held = self.position
        if held is None or held.epoch != snapshot.epoch or snapshot.revision >= held.revision:
            return Verdict.APPLIED
        if snapshot.requested_at <= self._advanced_at:
            return Verdict.HELD
        raise InvalidMessage(
            f"core went back from revision {held.revision} to {snapshot.revision}",
            "core must change its epoch when revisions start over",
        )

    def judge(self, change: Change) -> Verdict:
        """Whether to apply a change: only the next revision of the held epoch."""
        held = self.position
        if held is None:
            return Verdict.NO_STATE
        if change.epoch != held.epoch or change.revision > held.revision + 1:
            return Verdict.PULL
        return Verdict.HELD if change.revision <= held.revision else Verdict.APPLIED

    def advance(self, epoch: str, revision: int, now: Now) -> None:
        """A message was applied, and this is what is held."""
        self.position = Position(epoch, revision)
        self._advanced_at = now.boot
