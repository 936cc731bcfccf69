"""What systemd and the probes are told, without a process."""

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest

from agent import clock
from agent.errors import CoreUnavailable
from agent.health import STALLED, Health
from agent.model import CutPeer, RemovePeer
from tests.reconciler.harness import Agent, Core, World, live, revoked, run, upserted
from tests.support.builders import key
from tests.support.recording_device import Host

UP = "core connected, 1 peers up, 1 sessions"
AWAY = "core unreachable, 1 peers up, 1 sessions"


class Manager:
    """What systemd hears, and the time that the agent's health goes by."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.now = 1000.0

    def told(self) -> list[str]:
        """All since the last call."""
        messages: list[str] = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        manager = Manager(sock)
        monkeypatch.setattr(clock, "monotonic", lambda: manager.now)
        yield manager


Scenario = Callable[[World, Agent, Core, Health], Coroutine[None, None, None]]


def with_health(folder: Path, scenario: Scenario, *, comes_up_later: bool = False) -> None:
    """Run it with an agent that has been started, and its health."""
    world = World(folder)
    world.host.comes_up_later = comes_up_later

    async def main() -> None:
        async with world.agent() as agent:
            health = Health(agent.reconciler)
            try:
                await scenario(world, agent, Core(world.clock), health)
            finally:
                health.close()

    run(main())


def test_it_is_ready_once_the_first_state_is_in_the_kernel(tmp_path: Path, manager: Manager) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        waiting = asyncio.create_task(health.become_ready())
        health.ticked()
        await asyncio.sleep(0)
        assert health.is_ready() == (False, "starting")
        assert manager.told() == ["WATCHDOG=1"]
        await agent.give(core.state([live(1)]))
        await waiting
        assert health.is_ready() == (True, "")
        assert manager.told() == [f"READY=1\nSTATUS={UP}"]

    with_health(tmp_path, scenario)


def test_a_core_that_can_not_be_had_keeps_nobody_waiting_for_the_start(
    tmp_path: Path, manager: Manager
) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        agent.inbox.core_failed(CoreUnavailable("connection refused"))
        await health.become_ready()
        assert manager.told() == ["READY=1\nSTATUS=core unreachable, 0 peers up, 0 sessions"]
        assert health.is_ready() == (False, "core is unreachable: connection refused")

    with_health(tmp_path, scenario)


def test_it_is_not_ready_while_somebody_stays_past_his_deadline(tmp_path: Path, manager: Manager) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        await agent.give(core.state([live(1)]))
        await health.become_ready()
        world.host.refuses[key(1)] = frozenset({RemovePeer})
        world.clock.advance(3602)
        await agent.tick()
        assert health.is_ready() == (False, "sessions past their deadline are still on the interface")
        world.host.refuses.clear()
        await agent.tick()
        assert health.is_ready() == (True, "")

    with_health(tmp_path, scenario)


def _keeps_one(host: Host) -> None:
    host.refuses[key(1)] = frozenset({RemovePeer, CutPeer})


def _is_silent(host: Host) -> None:
    host.fails, host.reads_fail, host.error = 1000, 1000, errno.ETIMEDOUT


@pytest.mark.parametrize("device", [_keeps_one, _is_silent])
def test_it_is_not_ready_while_somebody_who_was_revoked_stays(
    tmp_path: Path, manager: Manager, device: Callable[[Host], None]
) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        await agent.give(core.state([live(1), live(2)]))
        await health.become_ready()
        device(world.host)
        agent.inbox.submit([core.change(revoked(1, "s1"))], 0.0)
        await agent.tick()
        assert health.is_ready() == (False, "peers that have to go are still on the interface: 1")
        assert (await agent.desk.status())["overstaying"] == 1
        world.host.refuses.clear()
        world.host.fails = world.host.reads_fail = 0
        await agent.tick()
        assert health.is_ready() == (True, "")
        assert (await agent.desk.status())["overstaying"] == 0

    with_health(tmp_path, scenario)


def test_a_device_that_fails_amid_other_work_is_told_of_and_keeps_it_ready(
    tmp_path: Path, manager: Manager
) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        await agent.give(core.state([live(1)]))
        await health.become_ready()
        _is_silent(world.host)
        agent.inbox.submit([core.change(upserted(2, mfa_exempt=True))], 0.0)
        await agent.tick()
        health.ticked()
        assert health.is_ready() == (True, "")
        assert "can't be read" in agent.reconciler.fault
        assert manager.told()[-1] == f"STATUS={UP}; {agent.reconciler.fault}"

    with_health(tmp_path, scenario)


def test_it_is_not_ready_while_the_interface_is_down(tmp_path: Path, manager: Manager) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        await agent.give(core.state([]))
        await health.become_ready()
        assert health.is_ready() == (False, "the interface is down")
        world.host.comes_up_later = False
        await agent.tick()
        assert health.is_ready() == (True, "")

    with_health(tmp_path, scenario, comes_up_later=True)


def test_the_status_line_is_told_when_it_changes_and_not_once_the_agent_stops(
    tmp_path: Path, manager: Manager
) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        await agent.give(core.state([live(1)]))
        await health.become_ready()
        health.ticked()
        manager.told()
        health.ticked()
        assert manager.told() == []
        agent.inbox.core_failed(CoreUnavailable("gone"))
        health.ticked()
        assert manager.told() == [f"STATUS={AWAY}"]
        health.stopping("stopping")
        agent.inbox.core_answered()
        health.ticked()
        assert manager.told() == ["STOPPING=1\nSTATUS=stopping"]

    with_health(tmp_path, scenario)


def test_a_reload_is_told_of_after_the_start_only(tmp_path: Path, manager: Manager) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        health.reloading()
        health.reloaded()
        assert manager.told() == [], "READY would be the end of the start"
        await agent.give(core.state([live(1)]))
        await health.become_ready()
        manager.told()
        health.reloading()
        health.reloaded()
        begun, ended = manager.told()
        assert begun.startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert ended == f"READY=1\nSTATUS={UP}"

    with_health(tmp_path, scenario)


def test_the_watchdog_hears_of_work_every_other_second(tmp_path: Path, manager: Manager) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        for _ in range(100):
            health.alive()
            manager.now += 0.1
        assert manager.told() == ["WATCHDOG=1"] * 5

    with_health(tmp_path, scenario)


def test_without_a_tick_it_counts_as_stalled(tmp_path: Path, manager: Manager) -> None:
    async def scenario(world: World, agent: Agent, core: Core, health: Health) -> None:
        health.ticked()
        manager.now += STALLED - 0.1
        assert health.is_healthy()
        manager.now += 0.2
        assert not health.is_healthy()
        health.alive()
        assert health.is_healthy()

    with_health(tmp_path, scenario)
