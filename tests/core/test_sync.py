from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agent import clock
from agent.core import sync
from agent.core.backoff import Backoff
from agent.core.http import CoreClient
from agent.core.sync import CoreSync
from agent.errors import CoreRejected, CoreUnavailable, DeviceError, InvalidMessage
from agent.model import PeerRemoved, PeerUpserted
from agent.ports import Position
from tests.core.fakes import (
    TOKEN,
    Core,
    FakeInbox,
    Handler,
    Request,
    answer,
    body,
    core,
    event,
    key,
    peer,
    run,
    state,
    stream,
    until,
)


@asynccontextmanager
async def following(
    pulls: list[Handler], streams: list[Handler], *, silence: float = 40.0
) -> AsyncIterator[tuple[Core, FakeInbox]]:
    inbox = FakeInbox()
    async with core() as told:
        told.on("state", *pulls)
        told.on("changes", *streams)
        client = CoreClient(told.url, TOKEN, clock=clock.read, heard=inbox.heard, silence=silence)
        task = asyncio.create_task(CoreSync(client, inbox, poll_interval=0.05).run())
        try:
            yield told, inbox
            assert not task.done(), "no answer of core's may end the loop"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await client.close()


def at(revision: int, epoch: str = "b7e1", *peers: Any) -> Handler:
    return answer(200, body(state(*peers) | {"epoch": epoch, "revision": revision}))


def upsert(revision: int, epoch: str = "b7e1") -> bytes:
    return event("peer_upserted", f"{epoch}:{revision}", peer(revision))


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "PULL_SPACING", 0.01)


def test_a_process_begins_with_a_full_pull_and_follows_from_there() -> None:
    async def main() -> None:
        async with following([at(42)], [stream(upsert(43), upsert(44))]) as (told, inbox):
            await until(lambda: inbox.held == Position("b7e1", 44))
            assert [r.path.rpartition("/")[2] for r in told.requests] == ["state", "changes"]
            assert "if-none-match" not in told.requests[0].headers
            assert told.requests[1].headers["last-event-id"] == "b7e1:42"
            assert [change.revision for change in inbox.changes] == [43, 44]
            assert all(isinstance(change.body, PeerUpserted) for change in inbox.changes)
            assert inbox.connected is True
            assert inbox.failures == []
            assert inbox.bytes_heard > 0

    run(main())


def test_a_cut_stream_is_resumed_from_the_position_held_without_a_pull() -> None:
    async def main() -> None:
        streams = [stream(upsert(43), hold=0), stream(upsert(44))]
        async with following([at(42)], streams) as (told, inbox):
            await until(lambda: inbox.held == Position("b7e1", 44))
            assert len(told.asked("state")) == 1
            ids = [r.headers["last-event-id"] for r in told.asked("changes")]
            assert ids == ["b7e1:42", "b7e1:43"]
            assert isinstance(inbox.failures[0], CoreUnavailable)
            assert inbox.connected is True

    run(main())


def test_silence_is_a_lost_connection_and_a_heartbeat_is_life() -> None:
    async def beating(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(5):
            writer.write(b":\n")
            await writer.drain()
            await asyncio.sleep(0.2)
        await asyncio.sleep(30)

    async def main() -> None:
        async with following([at(42)], [beating, stream()], silence=0.5) as (told, inbox):
            await asyncio.sleep(0.9)
            assert (inbox.connected, inbox.failures) == (True, [])
            await until(lambda: len(told.asked("changes")) > 1)
            assert "silent" in str(inbox.failures[0])

    run(main())


@pytest.mark.parametrize(
    "sent",
    [
        event("resync", "b7e1:50", {}),
        event("peer_renamed", "b7e1:43", peer()),
        event("peer_upserted", "b7e1:43", {"public_key": "x"}),
        event("peer_upserted", "", peer()),
        b"event: peer_upserted\nid: b7e1:43\ndata: {\n\n",
        upsert(44),
        upsert(43, "c0de"),
    ],
    ids=["resync", "unknown", "no key", "no id", "not JSON", "gap", "other epoch"],
)
def test_what_only_a_pull_can_help_is_pulled_in_full_while_the_stream_goes_on(sent: bytes) -> None:
    async def main() -> None:
        async def told_more(_request: Request, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + sent)
            await until(lambda: len(inbox.snapshots) == 2)
            writer.write(upsert(51))
            await asyncio.sleep(30)

        async with following([at(42), at(50)], [told_more]) as (told, inbox):
            await until(lambda: inbox.held == Position("b7e1", 51))
            assert len(told.asked("changes")) == 1
            assert ["if-none-match" in r.headers for r in told.asked("state")] == [False, False]
            assert inbox.failures == []

    run(main())


def test_an_unreadable_event_is_counted_and_the_good_ones_around_it_are_not_lost() -> None:
    async def main() -> None:
        sent = upsert(43) + b"event: peer_removed\nid: b7e1:44\ndata: 7\n\n" + upsert(45)
        async with following([at(42), at(45)], [stream(sent)]) as (_, inbox):
            await until(lambda: inbox.held == Position("b7e1", 45))
            assert [change.revision for change in inbox.changes] == [43]
            assert len(inbox.rubbish) == 1
            assert isinstance(inbox.rubbish[0], InvalidMessage)

    run(main())


def test_an_event_over_the_limit_is_pulled_over_instead_of_read_again_and_again() -> None:
    async def main() -> None:
        huge = stream(b"event: peer_upserted\ndata: " + b"x" * 2_000_000)
        async with following([at(42), at(43)], [huge, stream(upsert(44))]) as (told, inbox):
            await until(lambda: inbox.held == Position("b7e1", 44))
            assert told.asked("changes")[-1].headers["last-event-id"] == "b7e1:43"
            assert len(inbox.rubbish) == 1

    run(main())


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_core_without_a_stream_is_polled_conditionally(status: int) -> None:
    async def main() -> None:
        pulls = [at(42), answer(304), answer(304), at(43), answer(304)]
        async with following(pulls, [answer(status)]) as (told, inbox):
            await until(lambda: len(told.asked("state")) > 6)
            tags = [r.headers.get("if-none-match") for r in told.asked("state")]
            assert tags[:5] == [None, '"b7e1:42"', '"b7e1:42"', '"b7e1:42"', '"b7e1:43"']
            assert inbox.failures == []
            assert inbox.connected is True

    run(main())


def test_a_poller_tries_the_stream_again_now_and_then() -> None:
    async def main() -> None:
        streams = [answer(404), stream(upsert(43))]
        async with following([at(42), answer(304)], streams) as (told, inbox):
            await until(lambda: inbox.held == Position("b7e1", 43))
            assert len(told.asked("state")) == 1 + sync.POLLS_PER_STREAM_ATTEMPT

    run(main())


def test_a_pull_that_is_wanted_is_full_also_when_it_is_made_by_a_poll() -> None:
    async def main() -> None:
        async with following([at(42), answer(304), at(42)], [answer(404)]) as (told, inbox):
            await until(lambda: len(told.asked("state")) == 2)
            inbox.pull_wanted.set()
            await until(lambda: len(inbox.snapshots) == 2)
            assert "if-none-match" not in told.asked("state")[2].headers
            assert not inbox.pull_wanted.is_set()

    run(main())


@pytest.mark.parametrize(
    ("fault", "error", "rubbish"),
    [
        (answer(500), CoreUnavailable, 0),
        (answer(429), CoreUnavailable, 0),
        (answer(401), CoreRejected, 0),
        (answer(403), CoreRejected, 0),
        (answer(404), CoreRejected, 0),
        (answer(200, b"<html>"), InvalidMessage, 1),
        (answer(200, body(state() | {"peer_count": 3})), InvalidMessage, 1),
        (answer(200, body(state())[:60]), InvalidMessage, 1),
    ],
)
def test_each_of_cores_errors_keeps_what_is_held_and_is_tried_again(
    fault: Handler, error: type[Exception], rubbish: int
) -> None:
    async def main() -> None:
        seen: list[bool | None] = []

        async def failing(request: Request, writer: asyncio.StreamWriter) -> None:
            seen.append(inbox.connected)
            await fault(request, writer)

        async with following([at(42), failing, at(43)], [stream()]) as (told, inbox):
            await until(lambda: len(told.asked("changes")) == 1)
            inbox.pull_wanted.set()
            await until(lambda: inbox.failures != [])
            assert (inbox.connected, inbox.held) == (False, Position("b7e1", 42))
            await until(lambda: inbox.held == Position("b7e1", 43))
            assert inbox.connected is True
            assert [type(failure) for failure in inbox.failures] == [error]
            assert len(inbox.rubbish) == rubbish
            assert seen == [True]

    run(main())


def test_a_refused_token_makes_no_hot_loop() -> None:
    async def main() -> None:
        async with following([answer(401)], [answer(401)]) as (told, inbox):
            await asyncio.sleep(2.0)
            # Full jitter may give short waits, but their ceiling doubles: 0.5, 1, 2, 4 s.
            assert 1 <= len(told.asked("state")) <= 12
            assert told.asked("changes") == []
            assert inbox.connected is False

    run(main())


def test_retry_after_is_waited_for() -> None:
    async def main() -> None:
        async with following([answer(503, Retry_After="1"), at(42)], [stream()]) as (told, inbox):
            await until(lambda: inbox.failures != [])
            await asyncio.sleep(0.8)
            assert len(told.requests) == 1
            await until(lambda: inbox.held == Position("b7e1", 42))

    run(main())


class _LongWaits(Backoff):
    def next(self, retry_after: float | None = None) -> float:
        return max(30.0, retry_after or 0.0)


def test_an_accepted_report_ends_the_wait_for_an_unreachable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "Backoff", _LongWaits)

    async def main() -> None:
        inbox = FakeInbox()
        async with core() as told:
            told.on("state", answer(500), at(42))
            told.on("changes", stream(b": hi\n\n"))
            client = CoreClient(told.url, TOKEN, clock=clock.read, heard=inbox.heard)
            following = CoreSync(client, inbox, poll_interval=1)
            task = asyncio.create_task(following.run())
            await until(lambda: inbox.failures != [])
            following.core_found()
            await until(lambda: inbox.held == Position("b7e1", 42))
            task.cancel()
            await asyncio.wait({task})
            await client.close()

    run(main())


@pytest.mark.parametrize("refusal", [answer(401), answer(503, Retry_After="30")])
def test_an_accepted_report_cuts_no_wait_that_core_asked_for_or_an_operator_must_end(
    monkeypatch: pytest.MonkeyPatch, refusal: Handler
) -> None:
    monkeypatch.setattr(sync, "Backoff", _LongWaits)

    async def main() -> None:
        inbox = FakeInbox()
        async with core() as told:
            told.on("state", refusal)
            client = CoreClient(told.url, TOKEN, clock=clock.read, heard=inbox.heard)
            following = CoreSync(client, inbox, poll_interval=1)
            task = asyncio.create_task(following.run())
            await until(lambda: inbox.failures != [])
            following.core_found()
            await asyncio.sleep(0.2)
            assert len(told.requests) == 1
            task.cancel()
            await asyncio.wait({task})
            await client.close()

    run(main())


def test_a_revision_that_goes_back_counts_as_unreachable() -> None:
    async def main() -> None:
        async with following([at(42)], [stream()]) as (told, inbox):
            await until(lambda: len(told.asked("changes")) == 1)
            inbox.raises = CoreRejected("the revision goes back")
            inbox.pull_wanted.set()
            await until(lambda: inbox.failures != [])
            assert (inbox.failures[0], inbox.connected) == (inbox.raises, False)
            assert inbox.rubbish == []
            inbox.raises = None
            await until(lambda: inbox.connected is True)

    run(main())


def test_a_fault_of_the_device_is_not_cores() -> None:
    async def main() -> None:
        async with following([at(42)], [stream(upsert(43))]) as (_, inbox):
            await until(lambda: inbox.held == Position("b7e1", 43))
            inbox.raises = DeviceError("the interface is gone")
            answers = inbox.answers
            inbox.pull_wanted.set()
            await until(lambda: inbox.answers > answers)
            assert inbox.failures == []

    run(main())


def test_pulls_do_not_follow_each_other_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "PULL_SPACING", 0.2)

    async def main() -> None:
        async with following([at(42)], [stream()]) as (told, inbox):
            until_then = asyncio.get_running_loop().time() + 1.0
            while asyncio.get_running_loop().time() < until_then:
                inbox.pull_wanted.set()
                await asyncio.sleep(0.01)
            assert 3 <= len(told.asked("state")) <= 7

    run(main())


def test_changes_that_are_not_in_the_kernel_yet_do_not_hold_up_the_stream() -> None:
    class Slow(FakeInbox):
        def submit(self, message: Any, received_at: float) -> Any:
            super().submit(message, received_at)
            return asyncio.get_running_loop().create_future() if self.changes else _done(message)

    def _done(message: Any) -> Any:
        return FakeInbox().submit(message, 0.0)

    async def main() -> None:
        inbox = Slow()
        async with core() as told:
            told.on("state", at(42))
            told.on(
                "changes",
                stream(upsert(43), upsert(44), event("peer_removed", "b7e1:45", {"public_key": key(1)})),
            )
            client = CoreClient(told.url, TOKEN, clock=clock.read, heard=inbox.heard)
            task = asyncio.create_task(CoreSync(client, inbox, poll_interval=1).run())
            await until(lambda: inbox.held == Position("b7e1", 45))
            assert isinstance(inbox.changes[-1].body, PeerRemoved)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.close()

    run(main())


def test_waits_double_from_half_a_second_to_thirty_with_full_jitter() -> None:
    ceilings: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ceilings.append((low, high))
        return high

    backoff = Backoff(uniform)
    waits = [backoff.next() for _ in range(9)]
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(low == 0 for low, _ in ceilings)
    assert backoff.next(retry_after=90.0) == 90.0
    backoff.reset()
    assert backoff.next(retry_after=0.1) == 0.5
    assert len({Backoff().next() for _ in itertools.repeat(None, 5)}) == 5
