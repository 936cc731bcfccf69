"""What the operator's socket tells of a reconciler at work."""

import asyncio
from typing import Any

from agent.encoding import format_key
from agent.errors import CoreUnavailable
from tests.reconciler.harness import Core, World, granted, revoked, run
from tests.support.builders import grant, key, peer


def told(document: dict[str, Any]) -> list[tuple[str, str | None, int | None, str | None]]:
    return [(one["event"], one["session_id"], one["revision"], one["reason"]) for one in document["events"]]


def test_a_sessions_life_is_in_the_trail_with_its_revisions(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1, name="alice")]))
            await agent.give([core.change(granted(1, grant("s1", 1)))])
            await agent.give([core.change(revoked(1, "s1"))])
            document = await agent.desk.events(None, 100, 0.0)
            assert told(document) == [
                ("started", None, None, None),
                ("core_found", None, None, None),
                ("location", None, 1, None),
                ("granted", "s1", 2, None),
                ("ended", "s1", 3, "revoked"),
            ]
            assert (document["missed"], document["last"]) == (0, 5)
            assert document["events"][3]["name"] == "alice"

    run(main())


def test_the_trail_is_read_on_from_a_number_and_waited_for(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1)]))
            last = (await agent.desk.events(None, 100, 0.0))["last"]
            waiting = asyncio.create_task(agent.desk.events(last, 100, 20.0))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            await agent.give([core.change(granted(1, grant("s1", 1)))])
            async with asyncio.timeout(5):
                assert told(await waiting) == [("granted", "s1", 2, None)]

    run(main())


def test_a_restart_is_told_as_such_and_not_as_new_sessions(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1, session=grant("s1", 1))]))
            process = (await agent.desk.events(None, 1, 0.0))["process"]
        async with world.agent() as agent:
            await agent.give(core.same([peer(1, session=grant("s1", 1))]))
            document = await agent.desk.events(None, 100, 0.0)
            assert [one[0] for one in told(document)] == ["started", "core_found"]
            assert document["events"][0]["detail"] == "1 peer found, 1 session adopted"
            assert document["process"] != process

    run(main())


def test_a_peer_is_explained_with_its_last_events(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1, name="alice"), peer(2)]))
            await agent.give([core.change(granted(1, grant("s1", 1)))])
            (on,) = agent.desk.explain("alice")["peers"]
            assert (on["on_interface"], on["reason"], on["session_id"]) == (True, "session", "s1")
            await agent.give([core.change(revoked(1, "s1"))])
            (off,) = agent.desk.explain(format_key(key(1)))["peers"]
            assert (off["on_interface"], off["reason"]) == (False, "no_session")
            assert "(revoked), core revoked it" in off["because"]
            assert told(off) == [("granted", "s1", 2, None), ("ended", "s1", 3, "revoked")]

    run(main())


def test_the_guard_is_part_of_the_explanation(world: World, guard: object) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1, name="alice", session=grant("s1", 1)), peer(2, name="bob")]))
            facts = {
                name: [one["fact"] for one in agent.desk.explain(name)["peers"][0]["facts"]]
                for name in ("alice", "bob")
            }
            assert "the kernel's guard lets its packets through" in facts["alice"]
            assert "the kernel's guard does not let its packets through" in facts["bob"]

    run(main())


def test_what_begins_and_ends_in_one_delivery_is_told_in_that_order(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1)]))
            await agent.give([core.change(granted(1, grant("s1", 1))), core.change(revoked(1, "s1"))])
            document = await agent.desk.events(None, 2, 0.0)
            assert [one[:2] for one in told(document)] == [("granted", "s1"), ("ended", "s1")]

    run(main())


def test_an_end_is_told_when_the_peer_is_off_the_interface_and_not_when_the_disk_works_again(
    world: World,
) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1, name="alice", session=grant("s1", 1))]))
            world.journal_fails = True
            await agent.give([core.change(revoked(1, "s1"))])
            assert world.on_interface() == {}
            document = await agent.desk.events(None, 1, 0.0)
            assert told(document) == [("ended", "s1", 2, "revoked")]
            world.journal_fails = False
            await agent.tick()
            await agent.tick()
            assert agent.ends() == {"s1": "revoked"}
            assert (await agent.desk.events(None, 1, 0.0))["last"] == document["last"]

    run(main())


def test_a_core_that_is_away_from_the_start_is_told_of_once(world: World) -> None:
    async def main() -> None:
        async with world.agent() as agent:
            for _ in range(3):
                agent.inbox.core_failed(CoreUnavailable("connection refused"))
            assert [one[0] for one in told(await agent.desk.events(None, 9, 0.0))] == [
                "started",
                "core_lost",
            ]

    run(main())
