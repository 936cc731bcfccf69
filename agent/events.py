"""What the reconciler takes off its queue, and the step that it makes of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.fence import Verdict
from agent.model import Change, PublicKey, Snapshot
from agent.ports import Outcome
from agent.sessions import Limits


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
