"""Core asks too much: long waits, cookies, the largest list that there may be (core-api.md on errors)."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Iterator

import pytest

from tests.core.fakes import Handler, Request, answer
from tests.reliability.inspect_agent import Watch, forget_peak, memory
from tests.reliability.lying_core import raw
from tests.reliability.stage import HOLDS, HOUR, Stage, compact, moment, new_key, session
from tests.support.ledger import FULL, Seen
from tests.support.scenarios import SLACK, monotonic_of, ping
from tests.support.site import until

MIB = 1 << 20
MAX_BODY = (64 if FULL else 4) * MIB
PEERS = 100_000 if FULL else 6_000
"""In the largest list that core.max_body allows."""
ROOM = 32.0
"""MiB by which the agent may grow whatever it is told."""
WAITS = [
    ("1", 1.0),
    (email.utils.formatdate(0, usegmt=True), 0.0),
    ("1e9", 0.0),
    ("-1000000000", 0.0),
    ("soon", 0.0),
    ("\u0663\u0666\u0660\u0660".encode().decode("latin-1"), 0.0),
    ("Mon, 31 Feb 99999 25:61:61 +9999", 0.0),
]
"""What Retry-After says, and how many seconds have to be waited for it."""

pytestmark = [pytest.mark.netns, pytest.mark.userspace]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("greedy"), max_body=MAX_BODY) as stage:
        yield stage


@pytest.mark.reliability(
    "core says 429 or 503 and when to come back: seconds, dates, nonsense",
    f"what can be meant is honoured, what can't is not; {HOLDS}",
)
@pytest.mark.parametrize(("said", "least"), WAITS if FULL else WAITS[:3])
def test_when_to_come_back_is_heeded_where_it_makes_sense(
    stage: Stage, said: str, least: float, seen: Seen
) -> None:
    with stage.nobody_notices():
        stage.revision += 1
        stage.core.on("state", answer(429 if least else 503, Retry_After=said), stage.telling())
        began = time.monotonic()
        stage.resync()
        until(stage.in_step, least + 3)
        took = time.monotonic() - began
    assert least <= took < least + 2
    seen(lost=0)


@pytest.mark.reliability(
    "core, asked for reports, says to come back in thirty years",
    f"an hour is the most that is waited, and only this kind of report waits; {HOLDS}",
)
def test_no_wait_is_longer_than_an_hour(stage: Stage, seen: Seen) -> None:
    with stage.nobody_notices():
        stage.core.on("stats", answer(503, Retry_After="1000000000"))

        def waits() -> list[float]:
            lines = stage.site.logged("a report is not delivered")
            return [line["retry_in"] for line in lines if line["report"] == "stats"]

        until(waits, 10, "a report that is not taken")
        stage.tell()
        until(lambda: stage.core.asked("applied")[-1].json()["revision"] == stage.revision, 2)
    assert waits() == [HOUR]
    stage.core.on("stats", answer(202))
    seen(lost=0)


@pytest.mark.reliability(
    "core, or a portal before it, sets 80 KB of cookies with every answer",
    f"none is kept and none is sent; {HOLDS}",
)
def test_no_cookies_are_kept(stage: Stage, seen: Seen) -> None:
    def setting(number: int) -> Handler:
        cookies = (f"Set-Cookie: c{number}-{i}={'x' * 1000}; Path=/; Max-Age=9999999\r\n" for i in range(80))
        body = compact(stage.truth())
        head = (
            f"HTTP/1.1 200 OK\r\n{''.join(cookies)}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return raw(head.encode() + body)

    with stage.nobody_notices():
        for number in range(3):
            stage.prepare()
            stage.core.on("state", setting(number))
            stage.resync()
            until(stage.in_step, 10)
        stage.tell()
    assert "cookie" not in stage.core.asked("state")[-1].headers
    seen(tried=3, lost=0)


def large_list(stage: Stage, size: int) -> Handler:
    """The truth and so many peers that need a session and have none, in exactly so many bytes."""
    note = "n" * (size // PEERS - 160)
    crowd = [
        {
            "public_key": new_key(),
            "allowed_ips": [f"10.{64 + (i >> 16)}.{i >> 8 & 255}.{i & 255}"],
            "note": note,
        }
        for i in range(PEERS)
    ]
    peers = [*stage.truth()["peers"], *crowd]
    stamp = moment()
    body = compact(stage.truth(server_time=stamp, peers=peers, peer_count=len(peers))).ljust(size)
    assert len(body) == size

    async def handler(request: Request, writer: asyncio.StreamWriter) -> None:
        await answer(200, body.replace(stamp.encode(), moment().encode(), 1))(request, writer)

    return handler


@pytest.mark.reliability(
    "core's list is as large as core.max_body allows, or a byte larger, while a session's deadline comes",
    f"that session ends on time, the agent stays healthy, the memory comes back; {HOLDS}",
)
def test_a_list_as_large_as_it_may_be_holds_up_no_deadline(stage: Stage, seen: Seen) -> None:
    before, _ = memory(stage.pid)
    ends_in = 6.0 if FULL else 1.0
    psk = new_key()
    with stage.nobody_notices():
        expires_at = time.time() + ends_in
        ending = session("s-ending", preshared_key=psk, expires_at=moment(ends_in))
        stage.others = [stage.peer(stage.ending, session=ending)]
        stage.tell()
        stage.site.connect(stage.ending, psk)
        with ping(stage.ending) as pings, Watch(stage.site.gateway) as watch:
            pings.wait_reply()
            stage.revision += 1
            stage.core.on("state", large_list(stage, MAX_BODY))
            forget_peak(stage.pid)
            # So that the deadline comes while the list is read and taken in.
            time.sleep(max(0.0, expires_at - time.time() - (3.0 if FULL else 0.2)))
            deadline = monotonic_of(expires_at)
            stage.resync()
            overrun = pings.wait_silence(1.0, 30) - deadline
            until(stage.in_step, 120)
            stage.others = []
            stage.tell(120)
            stage.core.on("state", large_list(stage, MAX_BODY + 1))
            stage.resync()
            until(lambda: "larger than" in stage.core_lost_by(), 60)
            stage.tell(60)
    after, peak = memory(stage.pid)
    assert -SLACK < overrun < SLACK
    assert set(watch.statuses) == {200}
    assert FULL or watch.slowest < 1.0
    assert peak < before + 8 * MAX_BODY / MIB + ROOM
    assert after < before + 4 * MAX_BODY / MIB + ROOM
    peers = f"{MAX_BODY // MIB} MiB with {PEERS} peers"
    seen(
        overrun=overrun, lost=0, note=f"{peers}: /healthz took {watch.slowest:.1f} s, {peak - before:.0f} MiB"
    )
