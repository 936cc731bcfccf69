from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from agent import timers
from agent.timers import Timers


class Driven:
    """What the timers drive: one deadline, and when it was told to check."""

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.ticks: list[float] = []
        self.looks: list[float] = []
        self.stuck = False
        self.held_back: list[Callable[[], None]] = []
        self._moved = asyncio.Event()

    def tick(self, done: Callable[[], None] = lambda: None) -> None:
        self.ticks.append(time.monotonic())
        if self.stuck:
            self.held_back.append(done)
            return
        done()
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.deadline = None

    def observe(self) -> None:
        self.looks.append(time.monotonic())

    def next_wait(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    async def deadline_moved(self) -> None:
        await self._moved.wait()
        self._moved.clear()

    def due_in(self, seconds: float | None) -> float:
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self._moved.set()
        return self.deadline or 0.0


def run(
    scenario: Callable[[Driven, Timers, list[float]], Coroutine[Any, Any, None]], interval: float = 60
) -> None:
    async def main() -> None:
        driven, alive = Driven(), []
        clocks = Timers(driven, interval, lambda: alive.append(time.monotonic()))
        task = asyncio.create_task(clocks.run())
        await asyncio.sleep(0.05)
        try:
            await scenario(driven, clocks, alive)
        finally:
            task.cancel()
            await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(main())


def test_a_deadline_is_met_when_it_comes_and_not_a_tick_later() -> None:
    async def scenario(driven: Driven, _: Timers, __: list[float]) -> None:
        deadline = driven.due_in(0.3)
        await asyncio.sleep(0.5)
        assert [t for t in driven.ticks if deadline <= t < deadline + 0.1]

    run(scenario)


def test_a_deadline_that_comes_nearer_is_met_too() -> None:
    async def scenario(driven: Driven, _: Timers, __: list[float]) -> None:
        driven.due_in(5)
        await asyncio.sleep(0.05)
        deadline = driven.due_in(0.25)
        await asyncio.sleep(0.45)
        assert [t for t in driven.ticks if deadline <= t < deadline + 0.1]

    run(scenario)


def test_many_moves_of_the_deadline_leave_one_job() -> None:
    async def scenario(driven: Driven, _: Timers, __: list[float]) -> None:
        for _turn in range(50):
            driven.due_in(0.2)
            await asyncio.sleep(0)
        before = len(driven.ticks)
        await asyncio.sleep(0.5)
        assert 1 <= len(driven.ticks) - before <= 3

    run(scenario)


def test_there_is_a_tick_each_second_without_any_deadline(monkeypatch: Any) -> None:
    monkeypatch.setattr(timers, "TICK", 0.1)

    async def scenario(driven: Driven, _: Timers, alive: list[float]) -> None:
        await asyncio.sleep(0.55)
        assert 4 <= len(driven.ticks) <= 7
        assert len(alive) == len(driven.ticks)

    run(scenario)
    assert timers.TICK == 0.1


def test_the_tick_is_at_most_a_second() -> None:
    assert timers.TICK <= 1.0


def test_between_two_ticks_only_what_is_due_is_worth_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(timers, "TICK", 0.4)

    async def scenario(driven: Driven, _: Timers, alive: list[float]) -> None:
        before = len(driven.ticks)
        await asyncio.sleep(0.85)
        assert 1 <= len(driven.ticks) - before <= 3
        # A step of the clock, of which nobody tells.
        driven.deadline = time.monotonic() - 1
        await asyncio.sleep(0.25)
        assert driven.next_wait() is None

    run(scenario)


def test_life_is_shown_only_once_a_tick_has_passed_through(monkeypatch: Any) -> None:
    monkeypatch.setattr(timers, "TICK", 0.05)

    async def scenario(driven: Driven, _: Timers, alive: list[float]) -> None:
        driven.stuck = True
        await asyncio.sleep(0.15)
        shown = len(alive)
        ticks = len(driven.ticks)
        await asyncio.sleep(0.3)
        # Nothing piles up behind a tick that does not get through.
        assert (len(alive), len(driven.ticks)) == (shown, ticks)
        driven.stuck = False
        driven.held_back[-1]()
        await asyncio.sleep(0.15)
        assert len(alive) >= shown + 2

    run(scenario)


def test_the_interface_is_looked_at_each_interval_which_may_change() -> None:
    async def scenario(driven: Driven, clocks: Timers, _: list[float]) -> None:
        await asyncio.sleep(0.35)
        assert 2 <= len(driven.looks) <= 4
        clocks.interval = 10
        await asyncio.sleep(0.15)
        looks = len(driven.looks)
        await asyncio.sleep(0.3)
        assert len(driven.looks) == looks

    run(scenario, interval=0.1)
