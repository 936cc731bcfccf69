"""Waiting for what may be slow, while somebody sees to what can't wait."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import structlog

from agent import patience
from agent.patience import Patience, note


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LOOK_UP", 0.01)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


class Meanwhile:
    def __init__(self) -> None:
        self.times = 0
        self.thrice = asyncio.Event()

    async def __call__(self) -> None:
        self.times += 1
        if self.times == 3:
            self.thrice.set()


async def answer(value: int) -> int:
    return value


def test_what_answers_at_once_is_not_interrupted() -> None:
    async def scenario() -> None:
        meanwhile = Meanwhile()
        assert await Patience(meanwhile).wait_for("a disk", answer(7)) == 7
        assert meanwhile.times == 0

    run(scenario)


def test_while_something_takes_its_time_others_are_seen_to_again_and_again() -> None:
    async def scenario() -> None:
        meanwhile = Meanwhile()
        await Patience(meanwhile).wait_for("a disk", meanwhile.thrice.wait())
        assert meanwhile.times == 3

    run(scenario)


def test_what_fails_fails_where_it_is_waited_for() -> None:
    async def fails() -> None:
        raise OSError("no")

    async def scenario() -> None:
        with pytest.raises(OSError, match="no"):
            await Patience().wait_for("a disk", fails())

    run(scenario)


def test_what_takes_longer_than_it_may_goes_on_and_is_not_waited_for() -> None:
    async def scenario() -> None:
        hangs = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError, match="a disk"):
            await Patience().wait_for("a disk", hangs, 0.05)
        assert not hangs.done()

    run(scenario)


def test_whoever_is_cancelled_while_waiting_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        hangs = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(Patience().wait_for("a disk", hangs))
        await asyncio.sleep(0.03)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert hangs.cancelled()

    run(scenario)


def test_the_log_tells_what_took_long() -> None:
    with structlog.testing.capture_logs() as logs:
        note("nftables", 0.9)
        note("nftables", 1.234)
    assert logs == [{"event": "slow", "what": "nftables", "seconds": 1.23, "log_level": "warning"}]
