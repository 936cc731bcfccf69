"""Whether somebody else has changed what a guard in memory holds, as the kernel would tell."""

from collections.abc import Callable


class Heard:
    """``shape`` returns what is held; call ``before`` and ``after`` around each change of one's own."""

    def __init__(self, shape: Callable[[], object]) -> None:
        self.touched = True
        """Reset it, then read."""
        self._shape = shape
        self._last: object = None

    def before(self) -> None:
        """What is held is otherwise than it was left: somebody else did that."""
        self.touched |= self._shape() != self._last

    def after(self) -> None:
        """From here on it is as it was left."""
        self._last = self._shape()
