import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ParamSpec, TypeVarTuple

import msgspec
import pytest

from agent.encoding import format_time
from agent.sandbox import config
from agent.sandbox.reports import MAX_STATS_PEERS
from agent.sandbox.sessions import EXPIRY_GRACE
from tests.sandbox.parts import START, Gateway, Scene, following, new_key, peer_stats, run, scene, silent

ONE: dict[str, object] = {"name": "gw1", "location": "hq", "token": "one"}
TWO: dict[str, object] = {"name": "gw2", "location": "hq", "token": "two"}
IDLE, NEVER = {"idle_timeout": 100}, {"connect_timeout": 50}
LONG = {"lifetime": 2000}
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")


@pytest.fixture(autouse=True)
def swept_by_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.sandbox.core.SWEEP_INTERVAL", 3600.0)


def second(s: Scene) -> Gateway:
    return Gateway(s.service, "two")


@asynccontextmanager
async def first_there(policy: dict[str, int], **members: Any) -> AsyncIterator[tuple[Scene]]:
    """Of two gateways the first follows the stream."""
    async with scene(gateways=[ONE, TWO], **members) as s:
        if policy:
            await s.service.admin.change_location("hq", **policy)
        async with following(s.gateway):
            yield (s,)


@asynccontextmanager
async def both_there() -> AsyncIterator[tuple[Scene, Gateway]]:
    """Idle after 100 s, never connected after 50 s; both gateways follow the stream."""
    async with first_there(IDLE | NEVER) as (s,), following(second(s)) as other:
        yield s, other


def where(
    there: Callable[P, AbstractAsyncContextManager[tuple[*Ts]]], *args: P.args, **members: P.kwargs
) -> Callable[[Callable[[*Ts], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Have a test run on what ``there`` sets up from these arguments."""

    def decorate(test: Callable[[*Ts], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def main() -> None:
            async with there(*args, **members) as parts:
                await test(*parts)

        @functools.wraps(test)
        def runs() -> None:
            run(main())

        # Else pytest takes the coroutine's parameters for fixtures.
        vars(runs)["__signature__"] = inspect.Signature()
        return runs

    return decorate


async def alive(s: Scene, at: Gateway, session: dict[str, Any], **members: Any) -> None:
    """A report of this gateway with a handshake of now."""
    shown = {"latest_handshake": format_time(s.clock.now)} | members
    answer = await at.stats(peer_stats(s.laptop, session["id"], **shown), now=s.clock.now)
    assert answer.status_code == 202


def sweep(s: Scene) -> list[str]:
    return [reason for _, reason in s.service.core.sweep(s.clock.now)]


async def liveness(gateway: Gateway) -> str:
    return str((await gateway.state())["session_policy"]["liveness"])


async def restart_with(s: Scene, *gateways: dict[str, object]) -> None:
    await s.service.stop()
    wanted = msgspec.convert(list(gateways), list[config.Gateway])
    s.service.config = msgspec.structs.replace(s.service.config, gateways=wanted)
    await s.service.start()


@pytest.mark.parametrize(
    ("other", "judge"),
    [(TWO, "core"), (TWO | {"enabled": False}, "gateway"), (TWO | {"location": "branch"}, "gateway")],
    ids=["of the same location", "disabled", "of another location"],
)
def test_core_judges_liveness_where_more_than_one_gateway_serves(
    other: dict[str, object], judge: str
) -> None:
    async def main() -> None:
        async with scene(gateways=[ONE, other]) as s:
            assert await liveness(s.gateway) == judge
            [held] = await s.service.admin.locations()
            assert held["policy"]["liveness"] == judge

    run(main())


def test_the_first_gateway_hears_that_a_second_was_configured_and_that_it_has_gone_again() -> None:
    async def main() -> None:
        async with scene(gateways=[ONE]) as s:
            for gateways, judge in (([ONE, TWO], "core"), ([ONE], "gateway")):
                held = await s.gateway.position()
                await restart_with(s, *gateways)
                [event] = await s.gateway.replay(held, 1)
                assert event.name == "location_changed"
                assert event.data["session_policy"]["liveness"] == judge
                await restart_with(s, *gateways)
                assert await s.gateway.position() == event.id

    run(main())


def test_a_change_of_the_policy_under_two_gateways_does_not_outlast_them() -> None:
    async def main() -> None:
        async with scene(gateways=[ONE, TWO]) as s:
            await s.service.admin.change_location("hq", idle_timeout=60, liveness="gateway")
            assert await liveness(s.gateway) == "core"
            await restart_with(s, ONE)
            assert await liveness(s.gateway) == "gateway"
            await s.service.admin.change_location("hq", liveness="core")
            await restart_with(s, ONE)
            assert await liveness(s.gateway) == "core"

    run(main())


@where(both_there)
async def test_both_get_the_same_session_and_its_revocation(s: Scene, other: Gateway) -> None:
    session = await s.connect()
    await s.service.admin.revoke(session["id"])
    await asyncio.sleep(0.2)
    for gateway in (s.gateway, other):
        granted, revoked = (e.data for e in gateway.events if e.name != "location_changed")
        assert granted == {"public_key": s.laptop, "session": session}
        assert revoked == {"public_key": s.laptop, "session_id": session["id"]}


@where(both_there)
async def test_a_sign_of_life_at_either_gateway_keeps_the_session(s: Scene, other: Gateway) -> None:
    session = await s.connect()
    for gateway in (s.gateway, other, other, s.gateway):
        s.clock.advance(49)
        await alive(s, gateway, session)
        assert sweep(s) == []
    await silent(s, 100, s.gateway, other)
    assert sweep(s) == []
    await silent(s, 1, s.gateway, other)
    assert sweep(s) == ["idle"]


@where(both_there)
async def test_a_gateway_that_is_there_and_does_not_report_is_no_witness_of_silence(
    s: Scene, other: Gateway
) -> None:
    session = await s.connect()
    await alive(s, s.gateway, session)
    await silent(s, 500, s.gateway)
    assert sweep(s) == []
    await silent(s, 2, other)
    assert sweep(s) == ["idle"]


@where(both_there)
async def test_a_full_report_says_nothing_of_those_who_are_still_to_come(s: Scene, other: Gateway) -> None:
    session = await s.connect()
    await alive(s, s.gateway, session)
    await silent(s, 500, s.gateway)
    page = [peer_stats(new_key(), None) for _ in range(MAX_STATS_PEERS)]
    for _ in range(3):
        s.clock.advance(1)
        assert (await other.stats(*page, now=s.clock.now)).status_code == 202
        assert sweep(s) == []


@where(first_there, IDLE, sessions=LONG)
async def test_a_gateway_that_comes_and_goes_does_not_keep_the_silent(s: Scene) -> None:
    session = await s.connect()
    ended: list[str] = []
    for turn in range(4):
        async with following(second(s)) as other:
            if turn == 0:
                await alive(s, other, session)
            await silent(s, 20, s.gateway, other)
            ended += sweep(s)
        s.clock.advance(20)
        ended += sweep(s)
    assert ended == ["idle"]


@where(first_there, IDLE, sessions=LONG)
async def test_who_has_been_active_at_a_gateway_that_was_away_is_not_idle_when_it_is_back(s: Scene) -> None:
    async with following(second(s)) as other:
        session = await s.connect()
        await alive(s, other, session)
    await silent(s, 500, s.gateway)
    async with following(second(s)) as other:
        # Shaken hands 110 s ago, and sent something every second since.
        handshake = format_time(s.clock.now - 110)
        for rx in (5000, 6000, 7000):
            await alive(s, other, session, latest_handshake=handshake, rx_bytes=rx)
            assert sweep(s) == []
            s.clock.advance(20)


@where(both_there)
async def test_a_handshake_of_long_ago_is_no_new_sign_of_life(s: Scene, other: Gateway) -> None:
    session = await s.connect()
    s.clock.advance(5)
    handshake = format_time(s.clock.now)
    await silent(s, 99, s.gateway, other)
    await alive(s, other, session, latest_handshake=handshake)
    [held] = await s.service.admin.sessions()
    assert held["alive_at"] == handshake
    await silent(s, 2, s.gateway, other)
    assert sweep(s) == ["idle"]


@where(both_there)
async def test_what_has_grown_is_a_sign_of_the_time_since_the_gateways_last_report(
    s: Scene, other: Gateway
) -> None:
    session = await s.connect()
    await alive(s, other, session, latest_handshake=format_time(START))
    s.clock.advance(40)
    await silent(s, 10, other)
    s.clock.advance(30)
    await alive(s, other, session, latest_handshake=format_time(START), rx_bytes=99)
    [held] = await s.service.admin.sessions()
    assert held["alive_at"] == format_time(START + 50)


@where(both_there)
async def test_a_session_that_no_gateway_has_seen_was_never_connected(s: Scene, other: Gateway) -> None:
    session = await s.connect()
    await silent(s, 50, s.gateway, other)
    # Whoever knocks without the PSK makes rx grow, at one gateway or both.
    await alive(s, other, session, latest_handshake=None, rx_bytes=148)
    assert sweep(s) == []
    await silent(s, 2, s.gateway, other)
    assert sweep(s) == ["never_connected"]


@where(first_there, IDLE, sessions=LONG)
async def test_silence_is_no_evidence_while_a_gateway_that_may_hold_the_client_is_away(s: Scene) -> None:
    async with following(second(s)) as other:
        session = await s.connect()
        await alive(s, other, session)
        s.clock.advance(1)
    await silent(s, 1500, s.gateway)
    assert sweep(s) == []
    async with following(second(s)) as other:
        assert sweep(s) == []
        await silent(s, 2, other)
        assert sweep(s) == ["idle"]


@where(first_there, {}, sessions={"lifetime": 200})
async def test_the_deadline_waits_for_no_gateway(s: Scene) -> None:
    async with following(second(s)) as other:
        await alive(s, other, await s.connect())
    s.clock.advance(200 + EXPIRY_GRACE)
    assert sweep(s) == ["expired"]


@where(first_there, IDLE)
async def test_who_was_seen_elsewhere_since_a_gateway_left_is_judged_without_it(s: Scene) -> None:
    async with following(second(s)) as other:
        session = await s.connect()
        await alive(s, other, session)
        s.clock.advance(1)
    s.clock.advance(30)
    await alive(s, s.gateway, session)
    await silent(s, 100, s.gateway)
    assert sweep(s) == []
    await silent(s, 1, s.gateway)
    assert sweep(s) == ["idle"]


@where(first_there, NEVER)
async def test_who_was_granted_since_a_gateway_left_is_judged_without_it(s: Scene) -> None:
    async with following(second(s)):
        pass
    s.clock.advance(10)
    await s.connect()
    await silent(s, 50, s.gateway)
    assert sweep(s) == []
    await silent(s, 1, s.gateway)
    assert sweep(s) == ["never_connected"]


def test_after_a_restart_of_core_nobody_is_judged_before_all_gateways_are_back() -> None:
    async def main() -> None:
        async with scene(gateways=[ONE, TWO]) as s:
            await s.service.admin.change_location("hq", idle_timeout=100)
            async with following(s.gateway), following(second(s)) as other:
                await alive(s, other, await s.connect())
            await s.service.kill()
            s.clock.advance(500)
            await s.service.start()
            async with following(Gateway(s.service, "one")) as first:
                await silent(s, 500, first)
                assert sweep(s) == []
                async with following(second(s)) as other:
                    assert sweep(s) == []
                    await silent(s, 100, first, other)
                    assert sweep(s) == ["idle"]

    run(main())


@where(first_there, {}, applied_timeout=30)
async def test_a_gateway_that_leaves_is_not_waited_for_any_longer(s: Scene) -> None:
    async with following(Gateway(s.service, "two", confirms=False)):
        waiting = asyncio.create_task(s.finish(await s.token(), s.code()))
        await asyncio.sleep(0.5)
        assert not waiting.done()
    await asyncio.sleep(0.5)
    assert not waiting.done(), "it may come back within seconds"
    s.clock.advance(6)
    assert (await asyncio.wait_for(waiting, 3)).status_code == 200


def test_if_those_that_are_left_have_not_confirmed_they_are_still_waited_for() -> None:
    async def main() -> None:
        async with scene(gateways=[ONE, TWO], applied_timeout=30) as s:
            s.gateway.confirms = False
            async with following(s.gateway):
                async with following(Gateway(s.service, "two", confirms=False)):
                    waiting = asyncio.create_task(s.finish(await s.token(), s.code()))
                    await asyncio.sleep(0.3)
                s.clock.advance(6)
                await asyncio.sleep(0.6)
                assert not waiting.done()
                await s.gateway.apply(s.gateway.events[-1].id)
                assert (await asyncio.wait_for(waiting, 3)).status_code == 200

    run(main())


@where(both_there)
async def test_an_end_that_both_report_happens_once_and_is_kept_with_the_counters_of_each(
    s: Scene, other: Gateway
) -> None:
    session = await s.connect()
    end = {
        "session_id": session["id"],
        "public_key": s.laptop,
        "reason": "operator",
        "ended_at": format_time(START + 5),
        "latest_handshake": None,
        "rx_bytes": 10,
        "tx_bytes": 20,
    }
    before = await s.gateway.position()
    late = end | {"reason": "revoked", "rx_bytes": 3, "tx_bytes": 4}
    for gateway, body in ((s.gateway, end), (other, late), (other, late), (s.gateway, end)):
        answer = await gateway.http.post("session-ends", json={"ends": [body]})
        assert answer.status_code == 202
    [held] = await s.service.admin.sessions()
    assert held["reason"] == "operator"
    [event] = await s.gateway.replay(before, 1)
    assert (event.name, event.id) == ("session_revoked", await s.gateway.position())
    kept = await s.service.admin.session_ends()
    assert [(e["gateway"], e["reason"], e["rx_bytes"], e["tx_bytes"]) for e in kept] == [
        ("gw1", "operator", 10, 20),
        ("gw2", "revoked", 3, 4),
    ]


@where(both_there)
async def test_traffic_is_the_sum_of_the_gateways_last_counters(s: Scene, other: Gateway) -> None:
    session = await s.connect()
    for gateway, rx, tx in ((s.gateway, 5, 7), (s.gateway, 50, 70), (other, 3, 4), (other, 3, 4)):
        s.clock.advance(1)
        await alive(s, gateway, session, rx_bytes=rx, tx_bytes=tx, endpoint="203.0.113.9:1")
    # More bytes at the first gateway, but no newer handshake: the client uses the second.
    late = {"latest_handshake": format_time(START + 2), "rx_bytes": 51, "tx_bytes": 70}
    await alive(s, s.gateway, session, **late)
    assert await s.service.admin.traffic() == [
        {
            "public_key": s.laptop,
            "gateway": "gw2",
            "endpoint": "203.0.113.9:1",
            "latest_handshake": format_time(START + 4),
            "rx_bytes": 54,
            "tx_bytes": 74,
        }
    ]
