"""Why a step of the demo was not passed."""

from __future__ import annotations


class StepFailed(Exception):
    """A step saw something else than it should have; its text says what.

    ``logs`` names the programs whose logs are worth a look.
    """

    def __init__(self, seen: str, *logs: str) -> None:
        super().__init__(seen)
        self.logs = logs


class NotRun(Exception):
    """A step needs what an earlier one did not come to; its text says what."""
