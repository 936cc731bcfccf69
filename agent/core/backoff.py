"""How long to wait before core is asked again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

FIRST: Final = 0.5
LONGEST: Final = 30.0


class Backoff:
    """Waits that double from 0.5 s to 30 s, each a random part of that (full jitter).

    The jitter keeps the gateways of a core that was down from coming back all at once.
    """

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._ceiling = FIRST

    def next(self, retry_after: float | None = None) -> float:
        """Return the seconds to wait after one more failure, at least what core asked for."""
        delay = self._uniform(0.0, self._ceiling)
        self._ceiling = min(2 * self._ceiling, LONGEST)
        return max(delay, retry_after or 0.0)

    def reset(self) -> None:
        """Begin again: core was heard."""
        self._ceiling = FIRST
