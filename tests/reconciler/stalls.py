"""What a step waits for and does not get: the journal's disk, nftables or rtnetlink do not answer."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agent.model import PublicKey
from tests.reconciler.harness import World

SOON = 1.0
"""Seconds in which somebody has to be off the interface."""


def disk(world: World, takes: Callable[[], None] | None) -> None:
    world.disk_takes = takes or (lambda: None)


def nftables(world: World, takes: Callable[[], None] | None) -> None:
    assert world.guard is not None
    world.guard.takes = takes


def rtnetlink(world: World, takes: Callable[[], None] | None) -> None:
    world.host.link_takes = takes


What = Callable[[World, Callable[[], None] | None], None]


@contextmanager
def stalled(world: World, what: What = disk) -> Iterator[threading.Event]:
    """It does not answer within the block; the event tells that somebody waits for it."""
    asked, answers = threading.Event(), threading.Event()

    def takes() -> None:
        asked.set()
        assert answers.wait(60)

    what(world, takes)
    try:
        yield asked
    finally:
        what(world, None)
        answers.set()


async def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not come about while something did not answer"
        await asyncio.sleep(0.01)


def on_interface(world: World) -> set[PublicKey]:
    return set(world.on_interface())
