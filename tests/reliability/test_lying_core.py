"""Core lies, to a running agent under live traffic (rules 1 to 6 and 18, and core-api.md on errors)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.reliability.entries import ENTRIES, EVENTS, Entry, Refused, list_all, send_all, shown_key
from tests.reliability.lies import ANSWERS, Answer, rows
from tests.reliability.lies_on_stream import TOLD, Told
from tests.reliability.stage import EPOCH, HOLDS, HOUR, Stage, compact, moment, session
from tests.support.ledger import Seen
from tests.support.site import until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]

PATIENCE = 40.0
"""Seconds until the agent has tried again: it waits for up to 30 between two attempts."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("lying"), max_body=4 << 20) as stage:
        yield stage


@pytest.mark.reliability(
    "core answers with lists that are cut, numbers and times that are none, bombs, errors, no HTTP",
    f"the answer is refused whole and counted, core counts as lost, the last good state stays; {HOLDS}",
)
@pytest.mark.parametrize("lie", rows(ANSWERS))
def test_an_answer_that_is_a_lie_is_refused_whole(stage: Stage, lie: Answer, seen: Seen) -> None:
    with stage.nobody_notices():
        invalid, held = stage.invalid, stage.position()
        with stage.lying(lie.path, lie.handler(stage)):
            if lie.path == "changes" and lie.invalid:
                # Core is lost until the pull that follows at once: too short to be seen.
                until(lambda: lie.says in last_failure(stage), PATIENCE, lie.says)
            else:
                until(lambda: lie.says in stage.core_lost_by(), PATIENCE, lie.says)
                assert stage.pages.metric("wg_agent_core_connected") == 0
            assert (stage.invalid > invalid) is lie.invalid
            assert stage.position() == held
    seen(lost=0)


def last_failure(stage: Stage) -> str:
    """What the log says of the last attempt to follow core that failed."""
    lines = stage.site.logged("core can't be followed")
    return str(lines[-1]["error"]) if lines else ""


@pytest.fixture(scope="module")
def listed(stage: Stage) -> Iterator[Refused]:
    """All bad entries in one list."""
    with without_a_psk(stage):
        refused = list_all(stage)
    yield refused
    stage.tell()


@pytest.fixture(scope="module")
def told(stage: Stage) -> Iterator[Refused]:
    """All bad entries that can be one, as an event each."""
    with without_a_psk(stage):
        pulls = len(stage.core.asked("state"))
        refused = send_all(stage)
        assert len(stage.core.asked("state")) == pulls
    yield refused
    stage.tell()


@contextmanager
def without_a_psk(stage: Stage) -> Iterator[None]:
    """The intruder knocks without a PSK for a while, which an all-zero one would let in."""
    stage.knock()
    with stage.nobody_notices():
        yield
        time.sleep(0.5)
    stage.knock(stage.stolen)


def each_is_refused(listed: Refused, row: Entry, seen: Seen) -> None:
    for one in listed.made[row.name]:
        assert (shown_key(one), row.reason) in listed.refused
    seen(lost=0)


@pytest.mark.reliability(
    "core lists peers with PSKs, times, keys, prefixes and flags that are none, or claimed twice",
    f"each is refused alone, by name and reason, in the status and to core; {HOLDS}",
)
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ENTRIES])
def test_a_bad_entry_of_the_list_is_refused_alone(listed: Refused, row: Entry, seen: Seen) -> None:
    each_is_refused(listed, row, seen)


@pytest.mark.reliability(
    "core's events carry PSKs, times, keys, prefixes and flags that are none, or claimed twice",
    f"each peer is refused alone and the revision advances; {HOLDS}",
)
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in EVENTS])
def test_a_bad_entry_in_an_event_is_refused_alone(told: Refused, row: Entry, seen: Seen) -> None:
    each_is_refused(told, row, seen)


@pytest.mark.reliability(
    "core's stream has gaps, old and unreadable events, events and comments without an end",
    f"nothing is applied out of order, and what can't be read makes the agent pull; {HOLDS}",
)
@pytest.mark.parametrize("lie", rows(TOLD))
def test_what_the_stream_should_not_say_is_not_believed(stage: Stage, lie: Told, seen: Seen) -> None:
    with stage.nobody_notices():
        pulls = len(stage.core.asked("state"))
        data = lie.data(stage)
        match lie.effect:
            case "pull":
                stage.prepare()
                stage.core.send(data)
                until(stage.in_step, 15, "the pull")
                assert len(stage.core.asked("state")) > pulls
            case "heeded":
                stage.core.send(data)
                stage.revision += 1
                until(stage.in_step, 5, "the revision")
                assert len(stage.core.asked("state")) == pulls
            case "ignored":
                stage.core.send(data)
                stage.core.send(nothing(stage))
                until(stage.in_step, 15, "the next revision")
                assert len(stage.core.asked("state")) == pulls
    seen(lost=0)


def nothing(stage: Stage) -> bytes:
    """The next revision, which changes nothing."""
    stage.revision += 1
    data = {"public_key": stage.honest.public_key, "session_id": "s-0"}
    return f"event: session_revoked\nid: {EPOCH}:{stage.revision}\ndata: ".encode() + compact(data) + b"\n\n"


@pytest.mark.reliability(
    "core grants sessions that are over, that were ended before, and a list with clocks of 1970 and 8999",
    f"nobody is admitted by them, running sessions keep their deadlines; {HOLDS}",
)
def test_sessions_that_are_over_admit_nobody_and_cores_clock_moves_no_deadline(
    stage: Stage, seen: Seen
) -> None:
    def deadline() -> str:
        return str(stage.site.peer(stage.honest)["expires_at"])

    held = deadline()
    over = {"granted_at": moment(-HOUR), "expires_at": moment(-60)}
    intruder = stage.peer(stage.intruder, session=session("s-over", preshared_key=stage.stolen, **over))
    with stage.nobody_notices():
        stage.others = [intruder]
        stage.tell()
        assert stage.site.peer(stage.intruder)["session_id"] is None
        # Longer now, but its id is dead.
        intruder["session"] |= {"expires_at": moment(HOUR)}
        stage.tell()
        until(lambda: (stage.intruder.public_key, "session_ended") in stage.refused(), 5)
        for server_time in ("1970-01-01T00:00:00Z", "8999-12-31T23:59:59Z"):
            stage.prepare()
            stage.core.on("state", stage.telling(server_time=server_time))
            stage.resync()
            until(stage.in_step, 5)
            assert deadline() == held
    stage.others = []
    stage.tell()
    seen(tried=4, lost=0)
