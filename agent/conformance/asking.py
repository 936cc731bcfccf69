"""What the walk and the play both do: ask, pull, have the stream come up to it, replay."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

from agent import clock
from agent.conformance.answers import Answer, StreamRecord, show
from agent.conformance.follower import Follower
from agent.conformance.reports import Reporter
from agent.conformance.stream import judge_events, judge_replay
from agent.conformance.verdicts import Ledger
from agent.conformance.wire import Wire
from agent.core.stream import Heartbeat, ServerEvent
from agent.errors import CoreUnavailable
from agent.fence import Position
from agent.model import PublicKey

_PROMPT: Final = 5.0
"""Seconds within which a stream says what it has to say at its beginning."""
_RETRY: Final = 0.3
_TRIES: Final = 3
_KNOWN: Final = 50
"""Listed peers that are reported on."""


class Asker:
    """A gateway's side of a walk; ``answers`` are all that were asked for but by ``follower``."""

    def __init__(self, wire: Wire, ledger: Ledger) -> None:
        self.wire = wire
        self.ledger = ledger
        self.follower = Follower(wire, ledger)
        self.answers: list[Answer] = []

    async def ask(self, method: str, path: str, content: bytes | None = None, **more: Any) -> Answer:
        """As ``Wire.ask``; a core that asks for a moment (429 or 503 with Retry-After) is given it.

        Raises CoreUnavailable where core, which was there before, answers neither this nor GET state.
        """
        tries = _TRIES
        while True:
            answer = await self.wire.ask(method, path, content, **more)
            if not answer.status and self.answers:
                await self._look_after(f"{method} {path}", answer)
            self.answers.append(answer)
            tries -= 1
            if not tries or answer.moment is None:
                return answer
            await asyncio.sleep(answer.moment)

    async def _look_after(self, what: str, unanswered: Answer) -> None:
        """Tell a request that core does not answer from a core that is gone: the rest would be waited for."""
        for _ in range(_TRIES):
            if (await self.wire.ask("GET", "state")).status:
                return
            await asyncio.sleep(1.0)
        seen = f"core answers no more, since {what}: {unanswered}"
        self.ledger.failed("connection.reachable", seen)
        raise CoreUnavailable(seen, "see why core ended or hangs, and run the check again")

    async def settle(self, *, has_stream: bool, after: str, seconds: float = 10.0) -> bool:
        """Pull the state, and have the stream come up to it; False if there is no state to be had."""
        deadline = clock.monotonic() + seconds
        while (position := await self.follower.pull()) is None:
            if clock.monotonic() > deadline:
                self.ledger.failed("connection.reachable", f"no state within {seconds:.0f} s after {after}")
                return False
            await asyncio.sleep(_RETRY)
        if has_stream:
            reached = await self.follower.reaches(position, seconds)
            seen = f"after {after} the state is {position}, the stream {show(self.follower.position)}"
            self.ledger.judged("stream.complete", reached, seen)
        else:
            self.follower.position = position
        return True

    async def replay(self, start: Position, known: list[ServerEvent]) -> None:
        """Ask for everything since ``start`` again; ``known`` is what was sent then, if it was seen."""
        current = self.follower.position or start
        record = StreamRecord(str(start), clock.monotonic())
        count = len(known) or current.revision - start.revision
        async with self.listening(record):
            await until(lambda: record.ended is not None or is_resync(record) or len(record.events) >= count)
        judge_replay(record, known, current, self.ledger)
        if record.is_open:
            judge_events(record, self.ledger)

    def reporter(self) -> Reporter:
        """Make reports of what is held now."""
        held = self.follower.snapshot
        peers = () if held is None else held.peers[:_KNOWN]
        known = tuple((p.public_key, None if p.session is None else p.session.id) for p in peers)
        position = self.follower.position or Position("unknown", 0)
        return Reporter(position, PublicKey(secrets.token_bytes(32)), known, clock.read().wall)

    @asynccontextmanager
    async def listening(self, record: StreamRecord) -> AsyncIterator[None]:
        """Have a stream open meanwhile, and what comes on it kept in the record."""
        async with background(self.wire.listen(record, _keep)):
            yield


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have something run meanwhile, and cancelled at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        # Not by awaiting the task: its cancellation could not be told from one of this side.
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


async def until(condition: Callable[[], object], seconds: float = _PROMPT) -> bool:
    """Wait for the condition; whether it came true."""
    deadline = clock.monotonic() + seconds
    while not (done := bool(condition())) and clock.monotonic() < deadline:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.02)
    return done


def is_resync(record: StreamRecord) -> bool:
    """Whether resync came first."""
    return bool(record.events) and record.events[0].type == "resync"


async def _keep(item: ServerEvent | Heartbeat) -> None:
    """The record has it already."""
