"""SIGKILL at every point where something has just been, or is about to be, written (rules 6, 14 and 15)."""

import asyncio
from pathlib import Path

import pytest

from agent.model import Now, PresharedKey, PublicKey
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked
from tests.support.builders import NOW, grant, key, peer, psk
from tests.support.recording_device import Killed

pytestmark = pytest.mark.reliability(
    "SIGKILL at each point between two writes of a grant and of an end, also with a reboot (injected)",
    "nobody is let in, no live session is touched, what was ended stays dead",
)

UNTOUCHED = key(6)


class Killer:
    """Raises at the n-th of the points it is told of."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, _: str) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


class Story:
    """What core said and what the agent has answered to.

    ``may`` holds the PSKs of each peer by which somebody may still be let in; ``over`` the sessions
    whose end the agent has confirmed.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.core = Core(world.clock)
        self.may: dict[PublicKey, set[PresharedKey]] = {}
        self.over: set[str] = set()

    async def tell(self, agent: Agent) -> None:
        world, core = self.world, self.core
        first = [live(1), live(2), live(3), peer(4), peer(5, mfa_exempt=True), live(6)]
        self.may = {key(n): {psk(n)} for n in (1, 2, 3, 6)}
        await agent.give(core.state(first))
        world.host.kernel.handshake(UNTOUCHED, psk(6), "client", world.clock())
        self.may[key(4)] = {psk(4)}
        await agent.give([core.change(granted(4, grant("s4", 4, lasts=20)))])
        self.may[key(2)].add(psk(22))
        await agent.give([core.change(granted(2, grant("s2", 22, lasts=7200)))])
        self.may[key(2)].remove(psk(2))
        await agent.give([core.change(revoked(1, "s1"))])
        self.may[key(1)].clear()
        self.over.add("s1")
        self.may[key(3)].add(psk(33))
        await agent.give([core.change(granted(3, grant("s3b", 33)))])
        self.may[key(3)].remove(psk(3))
        self.over.add("s3")
        await agent.look()
        self.may[key(1)].add(psk(11))
        await agent.give([core.change(granted(1, grant("s1b", 11)))])
        await agent.end(2)
        self.may[key(2)].clear()
        self.over.add("s2")
        world.clock.advance(20)
        self.may[key(4)].clear()
        await agent.tick()
        self.over.add("s4")
        await agent.tick()

    @property
    def listed(self) -> list[object]:
        """What core lists in the end; it has not heard that the operator ended s2."""
        return [
            live(1, session="s1b", psk=11),
            live(2, psk=22, lasts=7200),
            live(3, session="s3b", psk=33),
            peer(4, session=grant("s4", 4, lasts=20)),
            peer(5, mfa_exempt=True),
            live(6),
        ]

    def check_nobody_else_is_in(self) -> None:
        for number, preshared_key in self.world.on_interface().items():
            if number != key(5):
                assert preshared_key in self.may.get(number, set()), "somebody is in without a session"


async def tell_until_killed(story: Story, after: int) -> bool:
    world = story.world
    world.host.at = Killer(after)
    agent = world.agent()
    try:
        async with agent:
            await story.tell(agent)
    except Killed:
        agent.kill()
        return True
    finally:
        world.host.at = lambda _: None
    return False


async def go_on(story: Story) -> None:
    world, core = story.world, story.core
    had = world.host.kernel.peers.get(UNTOUCHED)
    stay = None if had is None else had.incarnation
    async with world.agent() as agent:
        story.check_nobody_else_is_in()
        assert (had is None) == (UNTOUCHED not in world.host.kernel.peers)
        await agent.give(core.state(story.listed))
        world.clock.advance(20)
        await agent.tick()
        inside = world.on_interface()
        assert inside.pop(key(5)) is None
        expected = {key(1): psk(11), key(3): psk(33), key(6): psk(6)}
        if "s2" not in story.over and inside.get(key(2)) is not None:
            expected[key(2)] = psk(22)
        assert inside == expected
        if stay is not None:
            assert world.host.kernel.peers[UNTOUCHED].incarnation == stay
        assert story.over <= set(agent.ends())


def points(tmp_path: Path) -> int:
    """How many points a whole story has."""
    killer = Killer(1_000_000)

    async def main() -> None:
        story = Story(World(tmp_path))
        story.world.host.at = killer
        async with story.world.agent() as agent:
            await story.tell(agent)

    asyncio.run(main())
    return 1_000_000 - killer.left


def test_a_kill_at_any_point_lets_nobody_in_and_touches_no_live_session(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    count = points(tmp_path / "whole")
    assert count > 30
    for after in range(count):
        folder = tmp_path / str(after)
        folder.mkdir()
        story = Story(World(folder))

        async def main(story: Story = story, after: int = after) -> None:
            assert await tell_until_killed(story, after)
            await go_on(story)

        asyncio.run(main())


@pytest.mark.parametrize("step", [-86_400.0, 0.0])
def test_a_kill_and_a_reboot_at_any_point_let_nobody_in_before_core_answers(
    tmp_path: Path, step: float
) -> None:
    for after in range(0, 44, 3):
        folder = tmp_path / str(after)
        folder.mkdir()
        story = Story(World(folder))

        async def main(story: Story = story, after: int = after) -> None:
            await tell_until_killed(story, after)
            story.world.reboot(step=step)
            async with story.world.agent() as agent:
                assert story.world.on_interface().keys() <= {key(5)}
                core = Core(story.world.clock, revision=100)
                later = NOW.wall + 30
                await agent.give(core.state(story.listed, server_time=later))
                assert key(4) not in story.world.on_interface()
                assert story.world.on_interface()[UNTOUCHED] == psk(6)
                assert story.over <= set(agent.ends())

        asyncio.run(main())


def test_a_kill_between_journal_and_kernel_of_a_grant_leaves_it_to_core(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([peer(1)]))
            world.host.at = lambda where: (_ for _ in ()).throw(Killed()) if where == "kernel" else None
            with pytest.raises(Killed):
                await agent.give([core.change(granted(1, grant("s1", 1)))])
            agent.kill()
        world.host.at = lambda _: None
        async with world.agent() as agent:
            assert world.on_interface() == {}
            await agent.give(core.same([live(1)]))
            assert world.on_interface() == {key(1): psk(1)}

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["journal", "kernel"])
def test_a_kill_in_the_middle_of_a_renewal_does_not_touch_the_tunnel(world: World, kind: str) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([live(1)]))
            stay = world.host.kernel.peers[key(1)].incarnation
            world.host.at = lambda where: (_ for _ in ()).throw(Killed()) if where == kind else None
            with pytest.raises(Killed):
                await agent.give([core.change(granted(1, grant("s1", 2)))])
            agent.kill()
        world.host.at = lambda _: None
        async with world.agent() as agent:
            # Its transport keys go on; which PSK is the wanted one, only core can say.
            assert world.on_interface() == {key(1): psk(1)}
            await agent.give(core.same([live(1, psk=2)]))
            assert world.on_interface() == {key(1): psk(2)}
            assert world.host.kernel.peers[key(1)].incarnation == stay
        async with world.agent():
            assert world.host.kernel.peers[key(1)].incarnation == stay

    asyncio.run(main())


def test_an_end_that_was_not_journalled_is_made_good_at_the_restart(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([live(1, lasts=30), live(2)]))
            agent.kill()
        world.clock.advance(30)
        async with world.agent() as agent:
            assert world.on_interface() == {key(2): psk(2)}
            assert agent.ends() == {"s1": "expired"}
            assert agent.unreported()[0].ended_at == NOW.wall + 30

    asyncio.run(main())


def test_boot_time_of_another_boot_is_void(world: World) -> None:
    async def main() -> None:
        core = Core(world.clock)
        async with world.agent() as agent:
            await agent.give(core.state([live(1, lasts=300)]))
        # Boot time starts over far below the deadline's; the wall clock knows that it has passed.
        world.reboot()
        world.clock.now = Now(10.0, NOW.wall + 301)
        async with world.agent() as agent:
            assert agent.ends() == {"s1": "expired"}

    asyncio.run(main())
