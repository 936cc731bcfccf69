"""Plays the steps on the stage, says how they went, and takes everything down."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from enum import Enum
from typing import Final

from agent.errors import AgentError
from agent.sandbox.demo.faults import NotRun, StepFailed
from agent.sandbox.demo.stage import Stage
from agent.sandbox.demo.steps import Step, Steps, all_steps

BUDGET: Final = 50.0
"""Seconds for all steps; what is left of a minute is for taking down."""
_TITLE_WIDTH: Final = 54


class Mark(Enum):
    """How a step went: its sign and its colour (SGR)."""

    PASSED = "✔", "32"
    FAILED = "✘", "31"
    NOT_RUN = "-", "33"


class Screen:
    """Lines for people: in colour, and with the step under way, on a terminal only."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")

    def under_way(self, number: str, title: str) -> None:
        """Show what is being done."""
        if self._live:
            self._print(f"\r\x1b[K… {number} {title}", end="")

    def line(self, mark: Mark, number: str, title: str, took: float, measured: str) -> None:
        """Print how a step went."""
        sign, colour = mark.value
        if self._colour:
            sign = f"\x1b[{colour}m{sign}\x1b[0m"
        start = "\r\x1b[K" if self._live else ""
        self._print(f"{start}{sign} {number} {title:{_TITLE_WIDTH}} {took:6.2f} s  {measured}".rstrip())

    def text(self, text: str) -> None:
        """Print a line."""
        self._print(("\r\x1b[K" if self._live else "") + text)

    @staticmethod
    def _print(text: str, end: str = "\n") -> None:
        with contextlib.suppress(OSError):  # nobody reads any more: there is still much to take down
            print(text, end=end, flush=True)


async def run(wireguard: str, *, keep_files: bool) -> int:
    """Play all of it; return the exit code."""
    signals: list[int] = []
    interrupted = asyncio.Event()

    def interrupt(number: int) -> None:
        signals.append(number)
        interrupted.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt, number)
    began = time.monotonic()
    screen, stage = Screen(), Stage()
    passed: bool | None = None
    playing = asyncio.create_task(_play(screen, stage, wireguard))
    waiting = asyncio.create_task(interrupted.wait())
    try:
        await asyncio.wait({playing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        # A signal that came while the loop was busy has its turn: it may be why a step has failed.
        await asyncio.sleep(0.05)
        if signals:
            playing.cancel()
            await asyncio.wait({playing})
            screen.text(f"interrupted ({signal.Signals(signals[0]).name})")
        else:
            passed = playing.result()
    finally:
        waiting.cancel()
        clean = await _take_down(screen, stage, keep_files=keep_files)
    if signals:
        return 128 + signals[0]
    screen.text(
        f"{'all passed' if passed and clean else 'not all passed'}, {time.monotonic() - began:.1f} s in all"
    )
    return 0 if passed and clean else 1


async def _play(screen: Screen, stage: Stage, wireguard: str) -> bool:
    screen.text(f"WireGuard: {wireguard}. Namespaces: {stage.gateway.name}, {stage.client.name}.")
    ends_at = time.monotonic() + BUDGET
    screen.under_way(" ", "making namespaces, starting core")
    try:
        async with asyncio.timeout(20):
            await stage.open()
    except (StepFailed, AgentError, OSError, TimeoutError) as error:
        screen.line(Mark.FAILED, "0", "namespaces, core and mail server", 0.0, "")
        _explain(screen, stage, str(error) or "it took more than 20 s", ("core", "mail"))
        return False
    steps = Steps(stage)
    marks = []
    try:
        for number, step in enumerate(all_steps(steps), 1):
            marks.append(await _run(screen, stage, str(number), step, ends_at))
    finally:
        await steps.close()
    return all(mark is Mark.PASSED for mark in marks)


async def _run(screen: Screen, stage: Stage, number: str, step: Step, ends_at: float) -> Mark:
    screen.under_way(number, step.title)
    began = time.monotonic()
    limit = min(step.limit, ends_at - began)
    mark, measured, seen = Mark.PASSED, "", ""
    logs: Sequence[str] = ("agent", "core", "client")
    try:
        if limit <= 0:
            raise NotRun("the minute is over")
        async with asyncio.timeout(limit):
            measured = await step.run()
    except NotRun as error:
        mark, measured = Mark.NOT_RUN, f"not run: {error}"
    except StepFailed as error:
        mark, seen, logs = Mark.FAILED, str(error), error.logs
    except TimeoutError:
        mark, seen = Mark.FAILED, f"it did not end within {limit:.0f} s"
    except Exception as error:  # noqa: BLE001
        # Whatever it was: the other steps are played, and all of it is taken down.
        mark, seen = Mark.FAILED, f"{type(error).__name__}: {error}"
    screen.line(mark, number, step.title, time.monotonic() - began, measured)
    if mark is Mark.FAILED:
        _explain(screen, stage, seen, logs)
        await stage.end_clients()
    return mark


def _explain(screen: Screen, stage: Stage, seen: str, logs: Sequence[str]) -> None:
    screen.text(f"    seen: {seen}")
    for log in logs:
        tail = stage.tail(log)
        screen.text(f"    look: {log}'s log" + (", which ends with" if tail else " (empty)"))
        for line in tail:
            screen.text(f"      {line}")
    screen.text("    (`wg-agent demo --keep` keeps the logs)")


async def _take_down(screen: Screen, stage: Stage, *, keep_files: bool) -> bool:
    screen.under_way(" ", "taking everything down")
    began = time.monotonic()
    left = await stage.close(keep_files=keep_files)
    mark = Mark.FAILED if left else Mark.PASSED
    measured = f"still there: {'; '.join(left)}" if left else "nothing is left"
    screen.line(
        mark, " ", "namespaces, interfaces, programs, files removed", time.monotonic() - began, measured
    )
    if keep_files:
        screen.text(f"settings and logs are in {stage.folder}")
    return not left
