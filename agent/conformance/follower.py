"""Following core as an agent does: every state and event is kept, and applied revisions are confirmed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from agent import clock
from agent.conformance.answers import Answer, StreamRecord
from agent.conformance.history import Moment, Pulled
from agent.conformance.state import Reading, read_state
from agent.conformance.stream import has_no_stream
from agent.conformance.verdicts import Ledger
from agent.conformance.wire import Wire
from agent.core.documents import encode_applied
from agent.core.messages import parse_position
from agent.core.stream import Heartbeat, ServerEvent
from agent.errors import InvalidMessage
from agent.fence import Position
from agent.model import Snapshot

_PULLS: Final = 30
"""Times that a state is asked for after a resync."""
_RETRY: Final = 0.3
"""Seconds between two connections, and two pulls of a core that is coming back."""


class Follower:
    """Holds a position by pulls and events; ``history`` has both in the order of their arrival."""

    def __init__(self, wire: Wire, ledger: Ledger) -> None:
        self.history: list[Moment] = []
        self.records: list[StreamRecord] = []
        self.position: Position | None = None
        self.snapshot: Snapshot | None = None
        """The last state that could be read."""
        self.applied: list[Answer] = []
        """Core's answers to what was confirmed."""
        self._wire = wire
        self._ledger = ledger
        self._moved = asyncio.Condition()
        self._unconfirmed = asyncio.Event()

    async def pull(self) -> Position | None:
        """GET state; return its position, None if it could not be had or read."""
        asked = len(self.history)
        answer = await self._wire.ask("GET", "state")
        if answer.status != 200 or answer.error:
            return None
        reading = read_state(answer, self._ledger)
        if reading.snapshot is not None:
            self.history.append(Pulled(reading.snapshot, asked))
            self.snapshot = reading.snapshot
        return reading.position

    def take(self, reading: Reading) -> None:
        """Begin with a state that was pulled before."""
        if reading.snapshot is not None:
            self.history.append(Pulled(reading.snapshot))
            self.snapshot, self.position = reading.snapshot, reading.position

    async def catch_up(self) -> None:
        """Hold core's current position, for a stream that is opened next."""
        self.position = await self.pull() or self.position

    async def run(self, first: Position | None = None) -> None:
        """Follow the stream, again and again, until cancelled; a core without one is polled.

        It is opened from the held position on, or for once from ``first``.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._confirm())
            current = first is None
            while (asked := first or self.position) is not None:
                record = StreamRecord(str(asked), clock.monotonic(), current)
                self.records.append(record)
                first, current = None, False
                await self._wire.listen(record, self._take)
                while has_no_stream(record):
                    await self._poll()
                await asyncio.sleep(_RETRY)

    async def _poll(self) -> None:
        before = self.position
        self.position = await self.pull() or before
        if self.position != before:
            self._unconfirmed.set()
        await self._notify()
        await asyncio.sleep(_RETRY)

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition, looked at whenever something came, is true; False if it never was."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._moved:
                await self._moved.wait_for(condition)
        return condition()

    async def reaches(self, position: Position, seconds: float) -> bool:
        """Wait for the stream to have brought everything up to a position."""
        return await self.until(lambda: self._is_at(position), seconds)

    @property
    def is_open(self) -> bool:
        """Whether a stream is open right now."""
        return bool(self.records) and self.records[-1].is_open and self.records[-1].ended is None

    def _is_at(self, position: Position) -> bool:
        held = self.position
        return held is not None and held.epoch == position.epoch and held.revision >= position.revision

    async def _take(self, item: ServerEvent | Heartbeat) -> None:
        if isinstance(item, ServerEvent):
            self.history.append(item)
            if item.type == "resync":
                await self._start_over()
            else:
                with contextlib.suppress(InvalidMessage):
                    self.position = Position(*parse_position(item.id))
            self._unconfirmed.set()
        await self._notify()

    async def _start_over(self) -> None:
        """Pull the state as an agent does that has to: again, if core can't give it at once."""
        for _ in range(_PULLS):
            if (position := await self.pull()) is not None:
                self.position = position
                return
            await asyncio.sleep(_RETRY)

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def _confirm(self) -> None:
        """Say of each revision, or the last of several, that it is applied: a core may wait for that."""
        while True:
            await self._unconfirmed.wait()
            self._unconfirmed.clear()
            if self.position is not None:
                body = encode_applied(*self.position, clock.read().wall, ())
                answer = await self._wire.ask("POST", "applied", body)
                if answer.moment is None:
                    self.applied.append(answer)
                else:
                    await asyncio.sleep(max(answer.moment, _RETRY))
                    self._unconfirmed.set()
