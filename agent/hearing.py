"""What is heard of others' changes of the guard's table, and when nothing is to be heard.

The kernel tells of each element, and each telling is read: a long change of our own is made unheard
(``cold_sync_10k``), and the table is looked at afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from agent.nftwatch import Watch

_LOUD: Final = 300
"""Elements from which on writing takes ten times as long while the kernel has to tell us of each."""


class Hearing:
    """A ``Watch`` over one table from the first ``disturbed`` on; until then nothing is heard.

    ``table`` gives its name, ``own_port`` is as for ``Watch``.
    """

    def __init__(self, table: Callable[[], str], own_port: Callable[[], int | None]) -> None:
        self._table = table
        self._own_port = own_port
        self._watch: Watch | None = None
        self._muted: contextlib.ExitStack | None = None

    @property
    def untouched(self) -> bool:
        """Whether nobody else has changed the table since ``forget``, as far as is known."""
        return self._watch is not None and self._watch.untouched

    def forget(self) -> None:
        """What was heard so far does not count: the table is about to be read."""
        if self._watch is not None:
            self._watch.listen()
            self._watch.touched = False

    def doubt(self) -> None:
        """The table may be otherwise than it was to be: the next look has to see."""
        if self._watch is not None:
            self._watch.touched = True

    async def disturbed(self) -> None:
        """Return once the table itself was changed since the last call; raises GuardError."""
        if self._watch is None:
            self._watch = Watch(self._table(), self._own_port)
        await self._watch.changed()

    def mute(self) -> None:
        """Hear nothing until ``unmute``."""
        if self._watch is not None and self._muted is None:
            self._muted = contextlib.ExitStack()
            self._muted.enter_context(self._watch.deaf())

    def unmute(self) -> bool:
        """Hear again; return whether nothing was heard."""
        muted, self._muted = self._muted, None
        if muted is not None:
            muted.close()
        return muted is not None

    @contextlib.contextmanager
    def quietly(self, elements: int, look: Callable[[], object]) -> Iterator[None]:
        """Hear nothing of so many elements in this block, if they are many; ``look`` afterwards, if so."""
        if self._watch is None or self._muted is not None or elements < _LOUD:
            yield
            return
        with self._watch.deaf():
            yield
        look()

    def close(self) -> None:
        """Hear nothing any more."""
        self.unmute()
        if self._watch is not None:
            self._watch.close()
