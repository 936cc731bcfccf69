"""The agent's alarm clocks: the job at the next deadline, the clock tick, the look at the interface.

The job is APScheduler's, armed again whenever the next deadline moves. It turns a wall time into a
delay once, so a stepped clock or a resume does not wake it; the tick, a plain loop on the monotonic
clock, finds every deadline within a second all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn, Protocol

from apscheduler.schedulers.asyncio import AsyncIOScheduler

TICK: Final = 0.9
"""Seconds between two ticks, each of which passes through the reconciler."""
_GLANCES: Final = 2
"""How often within a tick it is looked whether a deadline is due, which may be by a step of a clock; that
costs next to nothing (``idle_cpu_10k``)."""
_JOB: Final = "next deadline"


class Timed(Protocol):
    """What the timers drive: the reconciler."""

    def tick(self, done: Callable[[], None] = ...) -> None:
        """Check every deadline; ``done`` once it has passed through a whole step."""

    def observe(self) -> None:
        """Look at the interface."""

    def next_wait(self) -> float | None:
        """Seconds until the next deadline, None if there is none."""

    async def deadline_moved(self) -> None:
        """Return when the next deadline may have moved."""


class Timers:
    """Drives the reconciler until cancelled; ``interval`` (seconds) may be changed while it runs.

    ``alive`` is called whenever a tick has passed through the reconciler.
    """

    def __init__(self, timed: Timed, interval: float, alive: Callable[[], None]) -> None:
        self._interval = interval
        self._changed = asyncio.Event()
        self._timed = timed
        self._alive = alive
        self._ticking = False

    @property
    def interval(self) -> float:
        """Seconds between two looks at the interface; another value counts from now on."""
        return self._interval

    @interval.setter
    def interval(self, seconds: float) -> None:
        if seconds != self._interval:
            self._interval = seconds
            self._changed.set()

    async def run(self) -> NoReturn:
        """Run the scheduler and both loops."""
        scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        scheduler.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tick(), name="timers: tick")
                tasks.create_task(self._observe(), name="timers: observe")
                tasks.create_task(self._arm(scheduler), name="timers: deadline")
        finally:
            scheduler.shutdown(wait=False)
        raise AssertionError("the loops run until they are cancelled")

    async def _tick(self) -> NoReturn:
        for glance in itertools.count():
            wait = self._timed.next_wait() if glance % _GLANCES else 0.0
            if wait is not None and wait <= 0 and not self._ticking:
                self._ticking = True
                self._timed.tick(self._ticked)
            await asyncio.sleep(TICK / _GLANCES)
        raise AssertionError("it does not end")

    def _ticked(self) -> None:
        self._ticking = False
        self._alive()

    async def _observe(self) -> NoReturn:
        while True:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._changed.wait()
                    continue
            self._timed.observe()

    async def _arm(self, scheduler: AsyncIOScheduler) -> NoReturn:
        while True:
            wait = self._timed.next_wait()
            # What is further off than the tick is the tick's to find: no need to arm for it yet.
            if wait is not None and wait < 10 * TICK:
                at = datetime.now(UTC) + timedelta(seconds=wait)  # noqa: TID251 what APScheduler takes
                scheduler.add_job(self._due, "date", run_date=at, id=_JOB, replace_existing=True)
            await self._timed.deadline_moved()

    async def _due(self) -> None:
        self._timed.tick()
