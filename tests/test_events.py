"""Whoever brought an event is answered once, by the step that has passed over it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from agent.encoding import format_key
from agent.errors import DeviceError
from agent.events import Changes, End, Pulled, Step, answer_with
from agent.fence import Position, Verdict
from agent.ports import Outcome
from tests.support.builders import key, snapshot

HERE = Position("e1", 7)


def on_a_loop(scenario: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Futures want a loop."""
    return lambda: asyncio.run(scenario())


def future() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


def answer(step: Step, *stuck: int) -> list[float]:
    """Answer it; the seconds that deliveries of changes took."""
    took: list[float] = []
    step.answer(HERE, (), {key(n) for n in stuck}, took.append)
    return took


@on_a_loop
async def test_each_gets_its_own_verdict_and_only_what_was_applied_counts_as_having_taken_time() -> None:
    applied = Changes([], 0.0, future(), Verdict.APPLIED)
    held = Changes([], 0.0, future(), Verdict.HELD)
    pulled = Pulled(snapshot([]), future(), Verdict.APPLIED)
    gone = Changes([], 0.0, future(), Verdict.APPLIED)
    gone.answer.cancel()

    took = answer(Step(waiting=[applied, held, pulled, gone]))

    assert len(took) == 1
    assert applied.answer.result() == pulled.answer.result() == Outcome(Verdict.APPLIED, HERE)
    assert held.answer.result() == Outcome(Verdict.HELD, HERE)


@on_a_loop
async def test_an_end_is_not_confirmed_while_one_of_its_peers_is_on_the_interface() -> None:
    done, stays = End(None, future(), [key(1), key(2)]), End(None, future(), [key(2), key(3)])

    answer(Step(waiting=[done, stays]), 3, 4)

    assert done.answer.result() == {"ended": [format_key(key(1)), format_key(key(2))]}
    with pytest.raises(DeviceError, match="did not remove 1 of 2 peers"):
        stays.answer.result()


@on_a_loop
async def test_after_a_failure_the_next_step_answers_for_what_was_taken_in_and_to_nobody() -> None:
    given, later = Changes([], 0.0, future(), Verdict.APPLIED), Step()
    step = Step(waiting=[given], pulled=True, changed=True)

    step.fail(DeviceError("the device is gone"))
    step.put_off(later)

    assert (later.pulled, later.changed, later.waiting) == (True, True, [])
    with pytest.raises(DeviceError, match="the device is gone"):
        given.answer.result()


@on_a_loop
async def test_who_is_put_off_comes_before_whoever_waits_for_the_next_step() -> None:
    first, second = (Changes([], 0.0, future(), Verdict.APPLIED) for _ in range(2))
    step, later = Step(waiting=[first], changed=True), Step(waiting=[second])

    step.put_off(later)

    assert (later.waiting, step.waiting) == ([first, second], [])
    assert (later.changed, later.pulled) == (True, False)
    assert not first.answer.done()


@on_a_loop
async def test_who_asks_for_something_gets_its_result_or_the_devices_fault() -> None:
    async def works() -> str:
        return "a plan"

    async def fails() -> str:
        raise DeviceError("no such device")

    plan, fault, gone = future(), future(), future()
    gone.cancel()

    await answer_with(plan, works())
    await answer_with(fault, fails())
    await answer_with(gone, works())
    await answer_with(gone, fails())

    assert plan.result() == "a plan"
    with pytest.raises(DeviceError, match="no such device"):
        fault.result()
    assert gone.cancelled()
