from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from agent.errors import DeviceError
from agent.model import AddPeer, CutPeer, Operation, PublicKey, RemovePeer, UpdatePeer
from agent.plan import CUT, FOUND, Plan
from agent.writer import FEW, HANDFUL, SLICE, TURN, Pace, Writer
from tests.support.builders import key, prefixes, psk
from tests.support.recording_device import Host


def adds(*numbers: int) -> Plan:
    return Plan(
        adds=tuple(AddPeer(key(n), psk(n), prefixes(f"10.8.{n >> 8}.{n & 255}")) for n in numbers),
        tenures={key(n): 1 for n in numbers},
    )


def removes(*numbers: int) -> Plan:
    return Plan(removes=tuple(RemovePeer(key(n)) for n in numbers))


async def go_on() -> bool:
    return True


class Stopwatch:
    """A clock that a slow kernel moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def removals_take(self, host: Host, seconds: Callable[[], float]) -> None:
        """Each removal takes the kernel so long."""

        def take(count: int) -> None:
            if isinstance(host.operations()[-1], RemovePeer):
                self.now += count * seconds()

        host.apply_takes = take


def new(monotonic: Callable[[], float] = lambda: 0.0) -> tuple[Writer, Host, list[PublicKey]]:
    host, told = Host(exists=True), []  # type: ignore[var-annotated]
    link = host.link()
    return Writer(lambda: link.device, told.append, monotonic), host, told


def carried_out(writer: Writer, *plans: Plan, between: Callable[[], Awaitable[bool]] = go_on) -> list[bool]:
    async def main() -> list[bool]:
        return [await writer.carry_out(plan, between) for plan in plans]

    return asyncio.run(main())


def reaped(writer: Writer) -> None:
    async def main() -> None:
        while await writer.reap():
            pass
        assert await writer.reap() is False

    asyncio.run(main())


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ETIMEDOUT])
@pytest.mark.parametrize("before", [0, SLICE + 3])
def test_an_interface_that_does_not_answer_is_not_asked_for_each_peer(code: int, before: int) -> None:
    writer, host, _ = new()
    numbers = range(1, 3 * SLICE + 1)
    carried_out(writer, adds(*numbers))
    asked: list[None] = []

    def at(where: str) -> None:
        if where == "kernel":
            asked.append(None)
            if len(asked) > before:
                raise DeviceError("it does not answer", errno=code)

    host.at = at
    refused = asyncio.run(writer.let_go([key(number) for number in numbers]))
    cut = {key for key, held in writer.mirror.peers.items() if held.tenure == CUT}
    assert refused.keys() == {key(number) for number in numbers} - cut
    assert len(cut) == before // SLICE * SLICE
    assert {error.errno for error in refused.values()} == {code}
    assert len(asked) == before + 1


def test_a_peer_that_is_refused_holds_back_no_other_of_its_batch() -> None:
    writer, host, _ = new()
    numbers = range(1, 2 * SLICE + 1)
    carried_out(writer, adds(*numbers))
    host.refuses = {key(7): frozenset({CutPeer})}
    refused = asyncio.run(writer.let_go([key(number) for number in numbers]))
    assert refused.keys() == {key(7)}
    assert {k for k, held in writer.mirror.peers.items() if held.tenure != CUT} == {key(7)}


def kinds(host: Host) -> list[type[Operation]]:
    return [type(operation) for operation in host.operations()]


def removals(host: Host) -> list[int]:
    """How many there were in each message that had any."""
    counts, operations = [], iter(host.operations())
    for batch in (what for kind, what in host.log if kind == "batch"):
        assert isinstance(batch, int)
        some = [next(operations) for _ in range(batch)]
        if isinstance(some[0], RemovePeer):
            counts.append(batch)
    return counts


def test_what_is_acknowledged_is_in_the_mirror_with_its_tenure() -> None:
    writer, _, told = new()
    assert carried_out(writer, adds(1, 2)) == [True]
    assert {k: held.tenure for k, held in writer.mirror.peers.items()} == {key(1): 1, key(2): 1}
    assert told == [key(1), key(2)]


def test_what_failed_is_not() -> None:
    writer, host, told = new()
    host.fails, host.before_failing = 1, 1
    with pytest.raises(DeviceError):
        carried_out(writer, adds(1, 2))
    assert set(host.kernel.peers) == {key(1)}
    assert writer.mirror.peers == {}
    assert told == []


@pytest.mark.parametrize(("count", "cut"), [(HANDFUL, 0), (HANDFUL + 1, HANDFUL + 1)])
def test_more_than_a_handful_is_cut_first(count: int, cut: int) -> None:
    writer, host, _ = new()
    numbers = range(1, count + 1)
    carried_out(writer, adds(*numbers), removes(*numbers))
    assert kinds(host).count(CutPeer) == cut
    assert len(writer.to_reap) == cut
    assert all(not peer.allowed_ips for peer in host.kernel.peers.values())
    assert {held.tenure for held in writer.mirror.peers.values()} <= {CUT}


@pytest.mark.parametrize("count", [HANDFUL, HANDFUL + 1])
def test_peers_that_return_are_removed_before_they_are_added_and_many_are_cut_first(count: int) -> None:
    writer, host, _ = new()
    again = adds(*range(1, count + 1))
    plan = Plan(removes=removes(*range(1, count + 1)).removes, adds=again.adds, tenures=again.tenures)
    carried_out(writer, again, plan)
    cuts = [CutPeer] * count if count > HANDFUL else []
    assert kinds(host) == [AddPeer] * count + cuts + [RemovePeer] * count + [AddPeer] * count
    assert all(peer.allowed_ips for peer in host.kernel.peers.values())
    assert not writer.to_reap


def test_one_that_waits_to_be_removed_is_not_cut_again_when_it_returns() -> None:
    writer, host, _ = new()
    numbers = range(1, 30)
    again = adds(*numbers)
    plan = Plan(removes=removes(*numbers).removes, adds=again.adds, tenures=again.tenures)
    carried_out(writer, again, removes(*numbers), plan)
    assert kinds(host).count(CutPeer) == kinds(host).count(RemovePeer) == len(numbers)
    assert len(host.kernel.peers) == len(numbers)
    assert not writer.to_reap


def test_what_is_cut_and_waits_is_not_cut_or_removed_by_another_plan() -> None:
    writer, host, _ = new()
    numbers = range(1, 30)
    carried_out(writer, adds(*numbers), removes(*numbers), removes(*numbers))
    assert kinds(host).count(CutPeer) == len(numbers)
    assert RemovePeer not in kinds(host)


def test_reaping_begins_with_one_and_goes_on_to_a_handful_oldest_first() -> None:
    writer, host, _ = new()
    numbers = range(1, 7 + 2 * HANDFUL + 2)
    carried_out(writer, adds(*numbers), removes(*numbers))

    async def main() -> None:
        for gone in (1, 3, 7, 7 + HANDFUL, 7 + 2 * HANDFUL):
            assert await writer.reap() is True
            assert set(host.kernel.peers) == {key(n) for n in numbers[gone:]}
        assert await writer.reap() is False
        assert await writer.reap() is False

    asyncio.run(main())
    assert host.kernel.peers == {}
    assert writer.mirror.peers == {}


def test_where_a_removal_takes_long_a_message_has_one() -> None:
    watch = Stopwatch()
    writer, host, _ = new(watch)
    watch.removals_take(host, lambda: 0.035)
    numbers = range(1, 40)
    carried_out(writer, adds(*numbers), removes(*numbers))
    reaped(writer)
    assert removals(host) == [1] * len(numbers)
    assert host.kernel.peers == {}


def test_the_pace_follows_what_a_removal_takes_and_is_not_remembered() -> None:
    watch = Stopwatch()
    writer, host, _ = new(watch)
    watch.removals_take(host, lambda: 0.001 if len(host.kernel.peers) > 20 else 0.4 * TURN)
    numbers = range(1, 41)
    for _ in range(2):
        carried_out(writer, adds(*numbers), removes(*numbers))
        reaped(writer)
    assert removals(host) == 2 * [1, 2, 4, 8, 8, *[2] * 8, 1]


def test_peers_that_are_removed_outright_keep_the_pace_too() -> None:
    watch = Stopwatch()
    writer, host, _ = new(watch)
    watch.removals_take(host, lambda: 0.035)
    numbers = range(1, HANDFUL + 1)
    again = adds(*numbers)
    plan = Plan(removes=removes(*numbers).removes, adds=again.adds, tenures=again.tenures)
    carried_out(writer, again, plan, removes(*numbers))
    assert removals(host) == [1] * (2 * HANDFUL)


@pytest.mark.parametrize(
    ("before", "count", "seconds", "after"),
    [
        (1, 1, 0.0, 2),
        (4, 4, 0.001, HANDFUL),
        (HANDFUL, HANDFUL, 0.001, HANDFUL),
        (HANDFUL, HANDFUL, 2 * TURN, HANDFUL // 2),
        (HANDFUL, HANDFUL, 8 * 0.035, 1),
        (HANDFUL, 1, 10.0, 1),
        (2, 2, TURN, 2),
        # The last ones of a line say as much about one removal.
        (HANDFUL, 2, TURN / 2, 4),
    ],
)
def test_the_pace(before: int, count: int, seconds: float, after: int) -> None:
    pace = Pace()
    pace.count = before
    pace.took(count, seconds)
    assert pace.count == after


def test_reaping_goes_on_past_a_peer_that_the_device_will_not_remove() -> None:
    writer, host, _ = new()
    numbers = range(1, 2 * HANDFUL + 1)
    carried_out(writer, adds(*numbers), removes(*numbers))
    host.refuses[key(1)] = frozenset({RemovePeer})

    async def main() -> None:
        assert await writer.reap() is False
        assert list(writer.to_reap)[-1] == key(1)
        for _ in range(10):
            await writer.reap()
        assert set(host.kernel.peers) == {key(1)}
        host.exists = False
        with pytest.raises(DeviceError) as caught:
            await writer.reap()
        assert caught.value.errno == errno.ENODEV

    asyncio.run(main())


def test_a_peer_that_was_added_again_is_not_reaped() -> None:
    writer, host, _ = new()
    numbers = range(1, 20)
    carried_out(writer, adds(*numbers), removes(*numbers))
    # Somebody removed it meanwhile, and so the plan has only an add.
    del host.kernel.peers[key(1)]
    writer.mirror.peers.pop(key(1))
    carried_out(writer, adds(1))

    async def main() -> None:
        while await writer.reap():
            pass

    asyncio.run(main())
    assert set(host.kernel.peers) == {key(1)}


def test_a_long_plan_is_left_where_something_is_due() -> None:
    writer, host, _ = new()
    turns = []

    async def between() -> bool:
        turns.append(len(host.operations()))
        return len(turns) < 2

    assert carried_out(writer, adds(*range(1, 4 * SLICE)), between=between) == [False]
    assert turns == [SLICE, 2 * SLICE]
    assert len(writer.mirror.peers) == 2 * SLICE


def test_many_removals_leave_room_for_deadlines_between_a_few() -> None:
    writer, host, _ = new()
    numbers = range(1, 5 * HANDFUL)
    again = adds(*numbers)
    plan = Plan(removes=removes(*numbers).removes, adds=again.adds, tenures=again.tenures)
    turns = []

    async def between() -> bool:
        turns.append(len(host.operations()))
        return True

    carried_out(writer, again, plan, between=between)
    batches = [what for kind, what in host.log if kind == "batch"]
    assert batches == [len(numbers), len(numbers), 1, 2, 4, *[HANDFUL] * 4, len(numbers)]
    assert len(turns) == len(batches)


def test_one_by_one_does_all_that_can_be_done() -> None:
    writer, host, _ = new()
    host.refuses[key(2)] = frozenset({AddPeer})

    async def main() -> None:
        failed, finished = await writer.one_by_one(adds(1, 2, 3), go_on)
        assert finished
        assert {k: type(operation) for k, (operation, _) in failed.items()} == {key(2): AddPeer}

    asyncio.run(main())
    assert set(writer.mirror.peers) == set(host.kernel.peers) == {key(1), key(3)}


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ETIMEDOUT])
def test_an_interface_that_does_not_answer_is_asked_once_one_by_one_and_by_the_reaping(code: int) -> None:
    writer, host, _ = new()
    numbers = range(1, 2 * HANDFUL + 1)
    carried_out(writer, adds(*numbers), removes(*numbers))
    asked: list[None] = []

    def at(where: str) -> None:
        if where == "kernel":
            asked.append(None)
            raise DeviceError("it does not answer", errno=code)

    host.at = at

    async def main() -> None:
        for call in (lambda: writer.one_by_one(adds(101, 102, 103), go_on), writer.reap):
            asked.clear()
            with pytest.raises(DeviceError) as caught:
                await call()
            assert caught.value.errno == code
            assert len(asked) == 1

    asyncio.run(main())
    assert list(writer.to_reap) == [key(number) for number in numbers]


def test_one_by_one_adds_nobody_over_what_could_not_be_removed() -> None:
    writer, host, _ = new()
    carried_out(writer, adds(1))
    host.refuses[key(1)] = frozenset({RemovePeer})
    again = adds(1)
    plan = Plan(removes=(RemovePeer(key(1)),), adds=again.adds, tenures={key(1): 2})

    async def main() -> None:
        failed, _ = await writer.one_by_one(plan, go_on)
        assert isinstance(failed[key(1)][0], RemovePeer)

    asyncio.run(main())
    assert kinds(host) == [AddPeer]
    assert writer.mirror.peers[key(1)].tenure == 1


def test_one_by_one_stops_where_something_is_due_or_the_interface_is_gone() -> None:
    writer, host, _ = new()

    async def due() -> bool:
        return False

    async def main() -> None:
        failed, finished = await writer.one_by_one(adds(*range(1, 3 * FEW)), due)
        assert (failed, finished) == ({}, False)
        assert len(host.operations()) == FEW
        host.exists = False
        with pytest.raises(DeviceError):
            await writer.one_by_one(adds(1), go_on)

    asyncio.run(main())


def test_after_another_look_only_what_is_cut_and_there_waits_to_be_removed() -> None:
    writer, host, _ = new()
    numbers = range(1, 20)
    carried_out(writer, adds(*numbers), removes(*numbers))
    del host.kernel.peers[key(3)]
    writer.mirror.observe(host.kernel.read())
    writer.reconsider()
    assert set(writer.to_reap) == {key(n) for n in numbers if n != 3}


def test_an_update_of_a_peer_that_is_not_there_changes_nothing() -> None:
    writer, host, _ = new()
    update = UpdatePeer(key(1), psk(1), prefixes("10.8.0.1"), True, 25)
    carried_out(writer, Plan(updates=(update,)))
    assert (host.kernel.peers, writer.mirror.peers) == ({}, {})
    assert FOUND < 0
