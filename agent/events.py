"""What the reconciler takes off its queue, and the step that it makes of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent import clock
from agent.encoding import format_key
from agent.errors import AgentError, DeviceError
from agent.fence import Position, Verdict
from agent.model import Change, PublicKey, RefusedPeer, Snapshot
from agent.ports import Outcome
from agent.sessions import Limits

_T = TypeVar("_T")


@dataclass(slots=True)
class Pulled:
    """A snapshot of core's; ``losses`` is how often core had been lost when it came."""

    snapshot: Snapshot
    answer: asyncio.Future[Outcome]
    verdict: Verdict = Verdict.HELD
    losses: int = 0


@dataclass(slots=True)
class Changes:
    """Changes of core's in their order; ``received_at`` is CLOCK_MONOTONIC."""

    changes: Sequence[Change]
    received_at: float
    answer: asyncio.Future[Outcome]
    verdict: Verdict = Verdict.HELD


@dataclass(slots=True)
class Tick:
    """Deadlines are to be checked; ``done`` is called after a whole step."""

    done: Callable[[], None]


@dataclass(slots=True)
class Observe:
    """A look at the interface is due."""


@dataclass(slots=True)
class LookAtGuard:
    """Somebody, perhaps the agent, changed the guard's table."""


@dataclass(slots=True)
class Reap:
    """Cut peers are left to be removed."""


@dataclass(slots=True)
class End:
    """The operator ends sessions: of these peers, or all (None)."""

    keys: Sequence[PublicKey] | None
    answer: asyncio.Future[dict[str, Any]]
    ended: Sequence[PublicKey] = ()


@dataclass(slots=True)
class Configure:
    """The configuration has other ceilings."""

    limits: Limits


@dataclass(slots=True)
class AskPlan:
    """What would a reconcile change now?"""

    answer: asyncio.Future[dict[str, Any]]


@dataclass(slots=True)
class Dismantle:
    """Core has deleted this gateway: the interface is to go."""

    answer: asyncio.Future[None]


Event = Pulled | Changes | Tick | Observe | LookAtGuard | Reap | End | Configure | AskPlan | Dismantle


@dataclass(slots=True)
class Step:
    """What one step answers for.

    ``pending`` is still to be taken in, ``waiting`` was and wants an answer; ``pulled`` and ``changed``
    tell what that brought.
    """

    pending: deque[Event] = field(default_factory=deque)
    ticks: list[Tick] = field(default_factory=list)
    waiting: list[Pulled | Changes | End] = field(default_factory=list)
    pulled: bool = False
    changed: bool = False

    def answer(
        self,
        position: Position | None,
        refused: tuple[RefusedPeer, ...],
        stuck: set[PublicKey],
        in_kernel_after: Callable[[float], None],
    ) -> None:
        """Tell everybody who waits what came of it, now that the interface has followed.

        ``stuck`` are the peers that the device did not remove; ``in_kernel_after`` is given the seconds that
        each delivery of changes took.
        """
        for item in self.waiting:
            if item.answer.done():
                continue
            match item:
                case Pulled(_, answer, verdict):
                    answer.set_result(Outcome(verdict, position, refused))
                case Changes(_, received_at, answer, verdict):
                    answer.set_result(Outcome(verdict, position, refused))
                    if verdict is Verdict.APPLIED:
                        in_kernel_after(clock.monotonic() - received_at)
                case End(_, answer, ended):
                    if left := stuck.intersection(ended):
                        answer.set_exception(
                            DeviceError(
                                f"the device did not remove {len(left)} of {len(ended)} peers",
                                "their sessions are over, and removing them is tried again at each tick",
                            )
                        )
                    else:
                        answer.set_result({"ended": [format_key(key) for key in ended]})

    def fail(self, error: AgentError) -> None:
        """Tell everybody who waits that what was taken in could not be put in force."""
        for item in self.waiting:
            if not item.answer.done():
                item.answer.set_exception(error)
                # Whoever follows a stream need not look at each answer.
                item.answer.exception()
        self.waiting.clear()

    def put_off(self, later: Step) -> None:
        """Leave to a later step what was taken in, and to answer those who still wait for that."""
        later.pulled |= self.pulled
        later.changed |= self.changed
        later.waiting[:0] = self.waiting
        self.waiting = []


async def answer_with(answer: asyncio.Future[_T], work: Awaitable[_T]) -> None:
    """Do this, and tell who waits for it what came of it: its result, or that the device failed."""
    try:
        result = await work
    except DeviceError as error:
        if not answer.done():
            answer.set_exception(error)
    else:
        if not answer.done():
            answer.set_result(result)
