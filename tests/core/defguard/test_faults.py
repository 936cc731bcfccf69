"""What Defguard's own gateway gets wrong, each by its number; 13 is in tests/firewall/test_acl.py."""

import asyncio
import io
import logging
import time
from typing import Any

import grpc
import pytest
import structlog

from agent import log
from agent.encoding import format_key
from agent.model import AddPeer
from tests.core.defguard.harness import (
    Core,
    adopted,
    device,
    eventually,
    following,
    holds,
    make_core,
    peers,
    run_following,
)
from tests.reconciler.harness import Agent, World
from tests.support.builders import key, psk
from tests.support.defguard_core import FirstGeneration, SecondGeneration
from tests.support.stalling_proxy import StallingProxy

both = pytest.mark.parametrize("generation", [1, 2])


async def away(core: Core) -> None:
    """Core is no longer there."""
    await core.stop()


async def back(core: Core) -> None:
    """Core is there again."""
    if isinstance(core, FirstGeneration):
        await core.start(core.port)
    else:
        core.start()


@both
def test_fault_1_a_psk_made_while_core_was_away_replaces_the_old_one(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        await holds(world, peers((1, 11), (2, 12)))
        await away(core)
        await eventually(lambda: not agent.inbox.core_connected)
        core.modify(device(core, 1, 21))
        await back(core)
        await holds(world, peers((1, 21), (2, 12)))

    def prepare(core: Any) -> None:
        core.configuration.peers.extend([device(core, 1, 11), device(core, 2, 12)])

    run_following(world, generation, scenario, prepare)


@both
def test_fault_2_modify_keeps_a_peer_and_delete_takes_it_away(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        core.create(device(core, 2, 12))
        await holds(world, peers((1, 11), (2, 12)))
        core.modify(device(core, 1, 11, allowed_ips=["10.8.0.1", "10.8.1.0/24"]))
        await eventually(lambda: len(world.host.kernel.peers[key(1)].allowed_ips) == 2, "another prefix")
        core.delete(format_key(key(2)))
        await eventually(lambda: key(2) not in world.host.kernel.peers, "the peer removed")
        assert key(1) in world.host.kernel.peers

    run_following(world, generation, scenario)


@both
@pytest.mark.parametrize("text", ["", "A" * 43 + "=", "not a key", format_key(bytes(31)) + "A"])
def test_fault_3_a_psk_that_is_none_refuses_the_peer(world: World, generation: int, text: str) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        broken = device(core, 1)
        broken.preshared_key = text
        core.create(broken)
        core.create(device(core, 2, 12))
        await holds(world, peers((2, 12)))
        assert agent.state.roster.refused[key(1)] == "invalid_preshared_key"

    run_following(world, generation, scenario)


@both
@pytest.mark.parametrize("text", ["", "A" * 43 + "=", "not a key"])
def test_fault_3_a_public_key_that_is_none_adds_nobody(world: World, generation: int, text: str) -> None:
    def prepare(core: Any) -> None:
        core.configuration.peers.extend([device(core, 1, 11), device(core, 2, 12, pubkey=text)])

    async def scenario(agent: Agent, core: Any) -> None:
        await holds(world, peers((1, 11)))
        told = [refused.reason for refused in agent.reconciler.reports.refused()]
        assert told == ["invalid_public_key"]

    run_following(world, generation, scenario, prepare)


@both
def test_fault_4_a_peer_told_without_a_psk_has_none_afterwards(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        core.modify(device(core, 1))
        await holds(world, peers((1, None)))

    run_following(world, generation, scenario)


@both
def test_fault_4_where_mfa_is_required_a_peer_told_without_a_psk_is_let_in_no_more(
    world: World, generation: int
) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        core.modify(device(core, 1))
        await holds(world, {})

    run_following(world, generation, scenario, more="mfa_required = true")


@both
def test_fault_5_with_core_away_each_session_ends_by_its_own_rule_and_nobody_else(
    world: World, generation: int
) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        for number in (1, 2):
            core.create(device(core, number, 10 + number))
        core.create(device(core, 3))
        await holds(world, peers((1, 11), (2, 12), (3, None)))
        await away(core)
        await eventually(lambda: not agent.inbox.core_connected)
        # One is used all the time, the other never shakes hands.
        for minute in range(4):
            world.clock.advance(60.0)
            world.host.kernel.handshake(key(1), psk(11), f"minute {minute}", world.clock.now)
            await agent.look()
        await holds(world, peers((1, 11), (3, None)))
        assert agent.metric("wg_agent_session_ends_total", reason="never_connected") == 1

    run_following(world, generation, scenario)


@both
def test_fault_6_counters_never_go_back_and_everybody_alive_is_told_of_again(
    world: World, generation: int
) -> None:
    async def main() -> None:
        core = make_core(generation)
        core.configuration.peers.extend([device(core, 1, 11), device(core, 2, 12)])
        if isinstance(core, FirstGeneration):
            await core.start()
        for life in range(2):
            async with following(world, core) as agent:
                if isinstance(core, SecondGeneration):
                    if not life:
                        await adopted(core)
                    core.start()
                await holds(world, peers((1, 11), (2, 12)))
                if not life:
                    for number in (1, 2):
                        assert world.host.kernel.handshake(key(number), psk(10 + number), "", world.clock.now)
                        kernel = world.host.kernel.peers[key(number)]
                        kernel.rx_bytes, kernel.tx_bytes = 1000 * number, 500
                await agent.look()
                await eventually(lambda life=life: len(core.told) >= 2 * (life + 1), "the reports")  # type: ignore[misc]
                if isinstance(core, SecondGeneration):
                    await core.stop()
            # Traffic goes on while no agent looks.
            world.host.kernel.peers[key(1)].rx_bytes += 500
        if isinstance(core, FirstGeneration):
            await core.stop()
        by_key: dict[str, list[int]] = {}
        for told in core.told:
            by_key.setdefault(told.public_key, []).append(told.download)
            assert told.upload == 500
        assert by_key[format_key(key(1))][0] == 1000
        assert by_key[format_key(key(1))][-1] == 1500
        assert by_key[format_key(key(2))][-1] == 2000
        assert all(counts == sorted(counts) for counts in by_key.values())

    asyncio.run(main())


def test_fault_7_a_change_between_the_configuration_and_the_subscription_is_not_lost(world: World) -> None:
    async def main() -> None:
        core = FirstGeneration()

        def in_between() -> None:
            core.at_updates = lambda: None
            core.create(device(core, 1, 11))

        core.at_updates = in_between
        async with core.running(), following(world, core):
            await holds(world, peers((1, 11)))

    asyncio.run(main())


def test_fault_7_a_configuration_that_an_update_overtook_is_asked_for_again(world: World) -> None:
    async def main() -> None:
        core = FirstGeneration()
        core.configuration.peers.append(device(core, 1, 11))

        async def overtaken() -> None:
            # After the subscription, while a configuration is on its way.
            if core.configs == 2:
                core.delete(format_key(key(1)))
                await asyncio.sleep(0.3)

        core.at_config = overtaken
        async with core.running(), following(world, core) as agent:
            await eventually(lambda: agent.inbox.position is not None, "the first state")
            await holds(world, {})
            assert core.configs >= 3

    asyncio.run(main())


@both
def test_fault_7_a_core_that_has_gone_silent_is_asked_for_the_whole(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        await holds(world, peers((1, 11)))
        operations = len(world.host.operations())
        # Told to nobody: the queue of updates has overflowed.
        core.configuration.peers.append(device(core, 2, 12))
        await holds(world, peers((1, 11), (2, 12)))
        touched = {operation.public_key for operation in world.host.operations()[operations:]}
        assert touched == {key(2)}

    def prepare(core: Any) -> None:
        core.configuration.peers.append(device(core, 1, 11))

    run_following(world, generation, scenario, prepare, quiet=1.0)


@both
def test_fault_8_a_changed_public_key_takes_the_old_one_away(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        core.create(device(core, 2, 12))
        await holds(world, peers((1, 11), (2, 12)))
        core.modify(device(core, 5, 15, allowed_ips=["10.8.0.1"]), formerly=format_key(key(1)))
        await holds(world, peers((5, 15), (2, 12)))

    run_following(world, generation, scenario)


@both
def test_fault_9_a_deleted_network_takes_every_peer_away(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        core.create(device(core, 2))
        await holds(world, peers((1, 11), (2, None)))
        kind = core.wire.DELETE if generation == 1 else core.wire.UPDATE_TYPE_DELETE
        core.push(core.wire.Update(update_type=kind, network=core.wire.Configuration(name="hq")))
        await holds(world, {})

    run_following(world, generation, scenario)


@both
def test_fault_10_one_peer_more_after_a_reconnect_touches_nobody_else(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        await holds(world, peers(*((number, 100 + number) for number in range(1, 51))))
        await away(core)
        await eventually(lambda: not agent.inbox.core_connected)
        before = len(world.host.operations())
        core.configuration.peers.append(device(core, 60, 160))
        await back(core)
        await eventually(lambda: key(60) in world.host.kernel.peers, "the new peer")
        [added] = world.host.operations()[before:]
        assert isinstance(added, AddPeer)
        assert added.public_key == key(60)

    def prepare(core: Any) -> None:
        core.configuration.peers.extend([device(core, number, 100 + number) for number in range(1, 51)])

    run_following(world, generation, scenario, prepare)


def test_fault_11_a_new_connection_of_cores_is_taken_once_the_old_one_is_dead(world: World) -> None:
    async def main() -> None:
        core = make_core(2)
        assert isinstance(core, SecondGeneration)
        direct = core.port
        async with following(world, core) as agent:
            await adopted(core)
            proxy = StallingProxy(direct)
            await proxy.start()
            core.port = proxy.port
            core.start()
            await eventually(lambda: agent.inbox.core_connected, "the first connection")
            proxy.stall()
            await core.stop()
            core.port, core.redial = direct, 1.0
            began = time.monotonic()
            core.start()
            async with asyncio.timeout(30):
                await core.connected.wait()
            # It was refused while the old one might have been alive.
            assert grpc.StatusCode.INTERNAL in core.failures
            assert time.monotonic() - began < 25
            await core.stop()
            await proxy.close()

    asyncio.run(main())


def test_fault_11_a_core_of_the_first_generation_that_is_cut_off_is_found_out(world: World) -> None:
    async def main() -> None:
        core = FirstGeneration()
        async with core.running():
            proxy = StallingProxy(core.port)
            await proxy.start()
            direct, core.port = core.port, proxy.port
            async with following(world, core) as agent:
                await eventually(lambda: agent.inbox.core_connected, "the connection")
                began = time.monotonic()
                proxy.stall()
                await proxy.stop_listening()
                while agent.inbox.core_connected:
                    await asyncio.sleep(0.1)
                    assert time.monotonic() - began < 30
            await proxy.close()
            core.port = direct

    asyncio.run(main())


@both
def test_fault_12_no_psk_and_no_private_key_is_logged_at_any_level(world: World, generation: int) -> None:
    stream, records = io.StringIO(), Records()
    private_key = format_key(bytes(range(32)))
    secrets = [private_key, format_key(psk(11).raw), format_key(psk(12).raw), "broken-" + "S" * 36 + "="]
    logging.getLogger().addHandler(records)
    logging.getLogger().setLevel(logging.DEBUG)
    log.configure("debug", "json", stream)

    def prepare(core: Any) -> None:
        field = "prvkey" if generation == 1 else "private_key"
        setattr(core.configuration, field, private_key)
        core.configuration.peers.append(device(core, 1, 11))

    async def scenario(agent: Agent, core: Any) -> None:
        await holds(world, peers((1, 11)))
        core.create(device(core, 2, 12))
        broken = device(core, 3)
        broken.preshared_key = secrets[3]
        core.create(broken)
        await holds(world, peers((1, 11), (2, 12)))
        await eventually(lambda: key(3) in agent.state.roster.refused)
        # A configuration that is refused whole, with the secrets in it.
        setattr(core.configuration, "prvkey" if generation == 1 else "private_key", secrets[3])
        kind = core.wire.MODIFY if generation == 1 else core.wire.UPDATE_TYPE_MODIFY
        core.push(core.wire.Update(update_type=kind, network=core.configuration))
        await eventually(lambda: agent.metric("wg_agent_core_invalid_total"), "the refusal")

    try:
        run_following(world, generation, scenario, prepare)
    finally:
        logging.getLogger().removeHandler(records)
        logging.getLogger().setLevel(logging.WARNING)
        structlog.reset_defaults()
    said = stream.getvalue() + records.text
    assert "core sent something invalid" in said
    for secret in secrets:
        assert secret not in said


class Records(logging.Handler):
    """What libraries log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"
