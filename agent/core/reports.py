"""Tells core what happened: revisions that are in force, session ends, handshakes and traffic.

The three kinds back off apart from each other and from the rest of what is said to core: a client
waits for ``applied``, so nothing that another kind runs into may hold it up. Nothing is dropped; a
kind is given again by the port until core has accepted it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

import structlog

from agent import __version__, clock
from agent.core.backoff import Backoff
from agent.core.documents import encode_applied, encode_ends, encode_stats
from agent.errors import AgentError, CoreRejected, CoreUnavailable, InvalidMessage
from agent.ports import Reports

STATS_LIMIT: Final = 5_000
ENDS_LIMIT: Final = 1_000
RECHECK: Final = 0.1
"""Seconds between looks at the other kinds while one of them is waiting for its next attempt."""

log = structlog.get_logger()


class ReportSink(Protocol):
    """Core, as far as it takes reports; each raises CoreUnavailable, CoreRejected, InvalidMessage."""

    async def post_applied(self, body: bytes) -> None:
        """POST applied."""

    async def post_stats(self, body: bytes) -> None:
        """POST stats."""

    async def post_ends(self, body: bytes) -> None:
        """POST session-ends."""


@dataclass(slots=True)
class _Kind:
    """One kind of report: how many at most in a request, and when it may be tried again."""

    name: str
    limit: int = 1
    not_before: float = 0.0
    failure: str | None = None
    backoff: Backoff = field(default_factory=Backoff)


class Reporter:
    """Sends what the port has until it is cancelled; no answer of core's ends it."""

    def __init__(
        self,
        sink: ReportSink,
        reports: Reports,
        *,
        started_at: float,
        accepted: Callable[[], None] = lambda: None,
    ) -> None:
        """``started_at`` is when the agent started, in Unix seconds.

        ``accepted`` is called whenever core has accepted a report.
        """
        self._sink = sink
        self._reports = reports
        self._started_at = started_at
        self._applied = _Kind("applied")
        self._ends = _Kind("session-ends", ENDS_LIMIT)
        self._stats = _Kind("stats", STATS_LIMIT)
        self._accepted = accepted
        self._refused: tuple[str, int] | None = None

    async def run(self) -> NoReturn:
        """Run the loop."""
        async with asyncio.TaskGroup() as tasks:
            others: asyncio.Task[bool] | None = None
            while True:
                await self._reports.pending()
                sent = await self._send_applied()
                if others is None:
                    others = tasks.create_task(self._send_others(), name="core: other reports")
                if not sent:
                    await asyncio.wait({others}, timeout=RECHECK)
                if others.done():
                    sent |= others.result()
                    others = None
                    if not sent:
                        # What is pending is waiting for its next attempt; anything else is to go out now.
                        await asyncio.sleep(RECHECK)
        raise AssertionError("the loop runs until it is cancelled")

    async def _send_others(self) -> bool:
        """What no client waits for; an answer of core's that is slow to come does not hold up ``applied``."""
        sent = await self._send_ends()
        return await self._send_stats() or sent

    async def _send_applied(self) -> bool:
        applied = self._reports.applied()
        if applied is None:
            return False
        # A revision that core sent after the failure shows that it is there again.
        revision = (applied.epoch, applied.revision)
        if revision == self._refused and not _due(self._applied):
            return False
        body = encode_applied(applied.epoch, applied.revision, applied.applied_at, applied.refused)
        self._refused = revision
        if await self._attempt(self._applied, self._sink.post_applied, body):
            self._refused = None
            self._reports.applied_accepted(applied)
        return True

    async def _send_ends(self) -> bool:
        if not _due(self._ends) or not (ends := self._reports.ends(self._ends.limit)):
            return False
        if await self._attempt(self._ends, self._sink.post_ends, encode_ends(ends)):
            self._ends.limit = ENDS_LIMIT
            try:
                await self._reports.ends_accepted(ends)
            except AgentError as error:
                # They are sent again, which is harmless: core knows them by their session ids.
                self._failed(self._ends, error)
        return True

    async def _send_stats(self) -> bool:
        if not _due(self._stats) or (report := self._reports.stats(self._stats.limit)) is None:
            return False
        body = encode_stats(
            report.epoch,
            report.revision,
            report.sent_at,
            report.peers,
            version=__version__,
            started_at=self._started_at,
        )
        if await self._attempt(self._stats, self._sink.post_stats, body):
            self._stats.limit = STATS_LIMIT
            self._reports.stats_accepted(report)
        return True

    async def _attempt(self, kind: _Kind, post: Callable[[bytes], Awaitable[None]], body: bytes) -> bool:
        """Send one request; True if core took it, else the kind has its next attempt set."""
        try:
            await post(body)
        except (CoreUnavailable, CoreRejected, InvalidMessage) as error:
            if isinstance(error, CoreRejected) and error.status == 413:
                kind.limit = max(1, kind.limit // 2)
            self._failed(kind, error)
            return False
        if kind.failure is not None:
            log.info("core takes reports again", report=kind.name)
        kind.failure = None
        kind.not_before = 0.0
        kind.backoff.reset()
        self._accepted()
        return True

    def _failed(self, kind: _Kind, error: AgentError) -> None:
        asked_for = error.retry_after if isinstance(error, CoreUnavailable) else None
        delay = kind.backoff.next(asked_for)
        kind.not_before = clock.monotonic() + delay
        level = log.debug if kind.failure == str(error) else log.warning
        kind.failure = str(error)
        level(
            "a report is not delivered",
            report=kind.name,
            error=str(error),
            retry_in=round(delay, 3),
        )


def _due(kind: _Kind) -> bool:
    return clock.monotonic() >= kind.not_before
