"""What the core answers when it says no."""

from __future__ import annotations


class Refusal(Exception):
    """A request that the core refuses.

    Over HTTP it becomes ``{"error": code, "message": message}`` with ``status`` and, where a later
    try can succeed, ``Retry-After`` in whole seconds. ``message`` is a sentence for a human being
    that says what to do.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
