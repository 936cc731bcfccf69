"""One change costs the same however many peers there are (rule 17)."""

import asyncio
import time
from pathlib import Path

from agent.model import Operation
from tests.reconciler.harness import Agent, Core, World, address, granted, live, revoked
from tests.support.builders import grant, key, peer
from tests.support.recording_device import Host

FEW, MANY, TIMES = 1_000, 50_000, 25


class OnlyRecording(Host):
    """Keeps no peers: the model's own bookkeeping grows with their number."""

    def write(self, operation: Operation) -> None:
        self.log.append(("operation", operation))


async def seconds_of_a_grant(folder: Path, peers: int) -> float:
    """Of a grant and its end, of the many that were measured the median."""
    world = World(folder, host=OnlyRecording())
    async with world.agent() as agent:
        core = Core(world.clock)
        listed = [live(n) for n in range(1, peers)] + [peer(peers, address(peers))]
        await agent.give(core.state(listed))
        before = len(world.host.log)
        taken = []
        for turn in range(TIMES):
            session = f"t{turn}"
            changes = [core.change(granted(peers, grant(session, 7))), core.change(revoked(peers, session))]
            began = time.perf_counter()
            for change in changes:
                await agent.give([change])
            taken.append(time.perf_counter() - began)
        operations = [what for kind, what in world.host.log[before:] if kind == "operation"]
        assert len(operations) == 2 * TIMES
        assert {operation.public_key for operation in operations} == {key(peers)}  # type: ignore[attr-defined]
        assert "read" not in {kind for kind, _ in world.host.log[before:]}
        return sorted(taken)[TIMES // 2]


def test_a_grant_among_50_000_peers_costs_what_it_costs_among_1_000(tmp_path: Path) -> None:
    async def main(name: str, peers: int) -> float:
        (tmp_path / name).mkdir()
        return await seconds_of_a_grant(tmp_path / name, peers)

    few = asyncio.run(main("few", FEW))
    many = asyncio.run(main("many", MANY))
    assert many / few < 3, f"{few * 1e3:.2f} ms among {FEW}, {many * 1e3:.2f} ms among {MANY}"


def test_a_tick_among_50_000_sessions_costs_next_to_nothing(tmp_path: Path) -> None:
    async def main() -> float:
        world = World(tmp_path, host=OnlyRecording())
        async with world.agent() as agent:
            await agent.give(Core(world.clock).state([live(n) for n in range(1, MANY)]))
            return await fastest_tick(agent)

    assert asyncio.run(main()) < 0.005


async def fastest_tick(agent: Agent) -> float:
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        await agent.tick()
        taken.append(time.perf_counter() - began)
    return min(taken)
