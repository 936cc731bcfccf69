from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from agent import __version__, clock
from agent.core.http import CoreClient
from agent.core.reports import ENDS_LIMIT, STATS_LIMIT, Reporter
from agent.encoding import parse_public_key
from agent.errors import JournalError
from agent.model import Endpoint, EndReason, PeerStats, RefusedPeer, SessionEnd
from agent.ports import Applied, StatsReport
from tests.core.fakes import TIME, TOKEN, Core, Handler, answer, core, key, run, until

NOW = 1_795_489_200.0


@dataclass
class FakeReports:
    """What there is to send, in memory."""

    due: Applied | None = None
    due_stats: list[PeerStats] = field(default_factory=list)
    due_ends: list[SessionEnd] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    forget_fails: int = 0

    async def pending(self) -> None:
        await until(lambda: bool(self.due or self.due_stats or self.due_ends), 60)

    def applied(self) -> Applied | None:
        return self.due

    def applied_accepted(self, applied: Applied) -> None:
        if self.due == applied:
            self.due = None

    def stats(self, limit: int) -> StatsReport | None:
        self.limits.append(limit)
        peers = tuple(self.due_stats[:limit])
        return StatsReport("b7e1", 42, NOW, peers) if peers else None

    def stats_accepted(self, report: StatsReport) -> None:
        del self.due_stats[: len(report.peers)]

    def ends(self, limit: int) -> tuple[SessionEnd, ...]:
        return tuple(self.due_ends[:limit])

    async def ends_accepted(self, ends: Sequence[SessionEnd]) -> None:
        if self.forget_fails:
            self.forget_fails -= 1
            raise JournalError("the disk is full")
        del self.due_ends[: len(ends)]


def applied(revision: int = 42) -> Applied:
    return Applied("b7e1", revision, NOW, (RefusedPeer(key(9), "invalid_time"),))


def stats(number: int = 1) -> PeerStats:
    endpoint = Endpoint(bytes([203, 0, 113, 9]), 51000)
    return PeerStats(parse_public_key(key(number)), "s-19", endpoint, NOW, 1, 2)


def end(number: int = 1) -> SessionEnd:
    public_key = parse_public_key(key(number))
    return SessionEnd(f"s-{number}", public_key, EndReason.EXPIRED, NOW, 0, 3, 4)


@asynccontextmanager
async def reporting(reports: FakeReports, **handlers: list[Handler]) -> AsyncIterator[Core]:
    async with core() as told:
        for path, made in handlers.items():
            told.on(path.replace("_", "-"), *made)
        client = CoreClient(told.url, TOKEN, clock=clock.read, heard=lambda: None)
        task = asyncio.create_task(Reporter(client, reports, started_at=NOW).run())
        try:
            yield told
            assert not task.done(), "no answer of core's may end the loop"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await client.close()


ACCEPT = {"applied": [answer(202)], "session_ends": [answer(202)], "stats": [answer(202)]}


def test_applied_goes_first_then_ends_then_stats() -> None:
    async def main() -> None:
        reports = FakeReports(applied(), [stats()], [end()])
        async with reporting(reports, **ACCEPT) as told:
            await until(lambda: not (reports.due or reports.due_stats or reports.due_ends))
        sent = [request.path.rpartition("/")[2] for request in told.requests]
        assert sent == ["applied", "session-ends", "stats"]
        assert [request.json() for request in told.requests] == [
            {
                "epoch": "b7e1",
                "revision": 42,
                "applied_at": TIME,
                "refused": [{"public_key": key(9), "reason": "invalid_time"}],
            },
            {
                "ends": [
                    {
                        "session_id": "s-1",
                        "public_key": key(1),
                        "reason": "expired",
                        "ended_at": TIME,
                        "latest_handshake": None,
                        "rx_bytes": 3,
                        "tx_bytes": 4,
                    }
                ]
            },
            {
                "sent_at": TIME,
                "epoch": "b7e1",
                "revision": 42,
                "agent": {"version": __version__, "started_at": TIME},
                "peers": [
                    {
                        "public_key": key(1),
                        "session_id": "s-19",
                        "endpoint": "203.0.113.9:51000",
                        "latest_handshake": TIME,
                        "rx_bytes": 1,
                        "tx_bytes": 2,
                    }
                ],
            },
        ]

    run(main())


def test_many_are_sent_in_requests_of_bounded_size() -> None:
    async def main() -> None:
        reports = FakeReports(
            None,
            [stats(number) for number in range(1, STATS_LIMIT + 2)],
            [end(number) for number in range(1, ENDS_LIMIT + 2)],
        )
        async with reporting(reports, **ACCEPT) as told:
            await until(lambda: not (reports.due_stats or reports.due_ends))
        assert [len(r.json()["ends"]) for r in told.asked("session-ends")] == [ENDS_LIMIT, 1]
        assert [len(r.json()["peers"]) for r in told.asked("stats")] == [STATS_LIMIT, 1]
        assert told.asked("stats")[0].headers["content-encoding"] == "gzip"

    run(main())


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_a_report_that_was_not_taken_is_sent_again_unchanged(status: int) -> None:
    async def main() -> None:
        reports = FakeReports(None, [], [end()])
        fails = {"session_ends": [answer(status), answer(202)]}
        async with reporting(reports, **fails) as told:
            await until(lambda: not reports.due_ends)
        first, second = told.asked("session-ends")
        assert first.body == second.body

    run(main())


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_kind_that_core_refuses_holds_up_no_other(status: int) -> None:
    async def main() -> None:
        reports = FakeReports(applied(), [stats()], [end()])
        handlers = ACCEPT | {"stats": [answer(status, Retry_After="60")]}
        async with reporting(reports, **handlers) as told:
            await until(lambda: len(told.asked("stats")) == 1)
            for revision in range(43, 46):
                reports.due = applied(revision)
                reports.due_ends = [end(revision)]
                await until(lambda: not (reports.due or reports.due_ends), 2)
            assert reports.due_stats == [stats()]

    run(main())


def test_a_failing_core_is_not_asked_in_a_hot_loop() -> None:
    async def main() -> None:
        reports = FakeReports(applied(), [stats()], [end()])
        async with reporting(reports) as told:  # everything is a 404
            await asyncio.sleep(2.0)
            for path in ("applied", "session-ends", "stats"):
                assert 1 <= len(told.asked(path)) <= 12

    run(main())


def test_a_new_revision_is_reported_without_waiting_for_the_last_ones_retry() -> None:
    async def main() -> None:
        reports = FakeReports(applied(42))
        failing = {"applied": [answer(503, Retry_After="60"), answer(202)]}
        async with reporting(reports, **failing) as told:
            await until(lambda: len(told.asked("applied")) == 1)
            await asyncio.sleep(0.3)
            assert len(told.asked("applied")) == 1
            reports.due = applied(43)
            await until(lambda: reports.due is None, 2)
            assert told.asked("applied")[1].json()["revision"] == 43

    run(main())


def test_a_request_that_is_too_large_for_core_is_halved() -> None:
    async def main() -> None:
        reports = FakeReports(None, [stats(1), stats(2)])
        async with reporting(reports, stats=[answer(413), answer(202)]):
            await until(lambda: not reports.due_stats)
        assert reports.limits[:2] == [STATS_LIMIT, STATS_LIMIT // 2]

    run(main())


def test_ends_that_the_journal_could_not_forget_are_sent_again() -> None:
    async def main() -> None:
        reports = FakeReports(None, [], [end()], forget_fails=1)
        async with reporting(reports, **ACCEPT) as told:
            await until(lambda: not reports.due_ends)
        assert len(told.asked("session-ends")) == 2

    run(main())


def test_whoever_wants_to_know_is_told_of_an_accepted_report_and_of_no_other() -> None:
    async def main() -> None:
        told_of: list[int] = []
        reports = FakeReports(applied(), [], [])
        async with core() as told:
            told.on("applied", answer(500), answer(202))
            client = CoreClient(told.url, TOKEN, clock=clock.read, heard=lambda: None)
            reporter = Reporter(
                client, reports, started_at=NOW, accepted=lambda: told_of.append(len(told.requests))
            )
            task = asyncio.create_task(reporter.run())
            await until(lambda: not reports.due)
            task.cancel()
            await asyncio.wait({task})
            await client.close()
        assert told_of == [2]

    run(main())
