"""What DefGuard's own tests check of a gateway and its core, as behaviour, each by name."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.acl import Acl, Verdict
from agent.core.defguard import certificates
from agent.core.defguard.client import DefguardClient
from agent.encoding import format_key
from agent.errors import CoreRejected, CoreUnavailable
from agent.model import KEEP, AddPeer, Prefix, PublicKey, UpdatePeer
from tests.core.defguard.harness import (
    Rules,
    adopted,
    device,
    eventually,
    following,
    holds,
    listens,
    make_core,
    peers,
    run_following,
)
from tests.reconciler.harness import Agent, World
from tests.support.builders import key, prefixes, psk
from tests.support.defguard_core import PEM, FirstGeneration, SecondGeneration, jwt
from tests.support.kernel_model import Kernel

both = pytest.mark.parametrize("generation", [1, 2])


def second(world: World, scenario: Any, prepare: Any = lambda _: None, **members: Any) -> None:
    run_following(world, 2, scenario, prepare, **members)


# The first generation.


def test_config_alone_makes_a_gateway_known_and_updates_make_it_connected(world: World) -> None:
    async def main() -> None:
        core = FirstGeneration()
        seen: list[str] = []
        core.at_config = lambda: seen.append(core.gateways["gw-1"])
        async with core.running(), following(world, core) as agent:
            await eventually(lambda: agent.inbox.position is not None)
            assert seen == ["known", "connected"]
            assert core.gateways == {"gw-1": "connected"}
            await core.stop()
            await eventually(lambda: not agent.inbox.core_connected)

    asyncio.run(main())


def test_updates_before_config_are_refused_by_core(world: World) -> None:
    async def main() -> None:
        core = FirstGeneration()
        async with core.running():
            client = DefguardClient(core.url, core.token, hostname="stranger")

            async def read() -> None:
                """The refusal shows at once, or at the first update that is to be read."""
                async with client.connect() as connection:
                    async for _ in await connection.updates():
                        pytest.fail("an update for a gateway that core does not know")

            with pytest.raises(CoreUnavailable, match="INTERNAL"):
                await read()

    asyncio.run(main())


def test_a_token_of_another_location_is_refused_and_said_to_be_the_fault(world: World) -> None:
    async def main() -> None:
        core = FirstGeneration()
        async with core.running():
            client = DefguardClient(core.url, jwt(8), hostname="gw-1")
            with pytest.raises(CoreRejected, match="UNAUTHENTICATED") as caught:
                async with client.connect() as connection:
                    await connection.config()
            assert "core.token_file" in caught.value.hint
            assert jwt(8) not in str(caught.value)

    asyncio.run(main())


def test_updates_reach_only_the_gateways_of_their_location(tmp_path: Path) -> None:
    worlds = [World(tmp_path / name) for name in ("hq", "branch")]
    for world in worlds:
        world.folder.mkdir()

    async def main() -> None:
        core, other = FirstGeneration(7), FirstGeneration(8)
        core.others[other.token] = other
        async with core.running():
            other.port = core.port
            async with following(worlds[0], core), following(worlds[1], other):
                await eventually(lambda: core.gateways == other.gateways == {"gw-1": "connected"})
                core.create(device(core, 1, 11))
                other.create(device(other, 2, 12))
                await holds(worlds[0], peers((1, 11)))
                await holds(worlds[1], peers((2, 12)))

    asyncio.run(main())


def test_the_location_is_known_by_the_number_in_the_token(world: World) -> None:
    async def scenario(agent: Agent, _: Any) -> None:
        assert agent.state.location is not None
        assert (agent.state.location.id, agent.state.location.name) == ("7", "hq")

    run_following(world, 1, scenario)


# The second generation.


def test_nothing_but_the_request_is_sent_before_the_configuration(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        await core.stop()
        # There is something to report by the time that core is back, and it takes its time to answer.
        assert world.host.kernel.handshake(key(1), psk(11), "", world.clock.now)
        await agent.look()
        core.config_takes = 2.0
        core.start()
        await eventually(lambda: core.told, "the report")
        assert core.early == 0
        assert core.requests == ["config_request", "config_request", "peer_stats"]

    second(world, scenario)


def test_without_certificates_nothing_but_adoption_is_served(world: World) -> None:
    async def main() -> None:
        core = make_core(2)
        assert isinstance(core, SecondGeneration)
        async with following(world, core):
            await eventually(lambda: listens(core.port))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{core.port}") as made:
                call: Any = made.stream_stream("/defguard.gateway.v2.Gateway/Bidi")(metadata=core.metadata)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())


def test_the_agent_asks_for_the_configuration_once_a_stream(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        # What can't be read makes it ask for the whole: by another stream, not by another request.
        core.push(core.wire.Update(update_type=core.wire.UPDATE_TYPE_CREATE))
        await eventually(lambda: core.streams == 2, "another stream")
        await eventually(lambda: agent.inbox.core_connected)
        assert core.requests == ["config_request", "config_request"]
        assert agent.metric("wg_agent_core_invalid_total") == 1

    second(world, scenario)


@both
def test_a_peer_without_an_address_or_a_handshake_is_not_reported(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        await holds(world, peers((1, 11), (2, 12)))
        world.host.kernel.knock(key(2))
        assert world.host.kernel.handshake(key(1), psk(11), "", world.clock.now)
        await agent.look()
        await eventually(lambda: core.told, "a report")
        await agent.look()
        await asyncio.sleep(0.3)
        assert {told.public_key for told in core.told} == {format_key(key(1))}
        [told] = core.told
        assert told.endpoint == "203.0.113.9:51000"
        assert (told.upload, told.download, told.keepalive_interval) == (92, 148, 25)
        assert told.allowed_ips == "10.8.0.1/32"

    def prepare(core: Any) -> None:
        core.configuration.peers.extend([device(core, 1, 11), device(core, 2, 12)])

    run_following(world, generation, scenario, prepare)


@both
def test_a_handshake_is_told_with_its_time(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        at = world.clock.now
        assert world.host.kernel.handshake(key(1), psk(11), "", at)
        await agent.look()
        await eventually(lambda: core.told, "a report")
        handshake = core.told[0].latest_handshake
        seconds = handshake if generation == 1 else handshake.seconds
        assert seconds == int(at.wall)
        assert core.told[0].endpoint == "203.0.113.9:51000"
        assert (core.told[0].upload, core.told[0].download) == (92, 148)

    run_following(world, generation, scenario)


@both
def test_mfa_authorised_is_a_session_and_mfa_disconnect_ends_it(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        [session] = agent.state.sessions.values()
        assert session.preshared_key == psk(11)
        core.delete(format_key(key(1)))
        await holds(world, {})
        # The end is counted once the step is over.
        await eventually(lambda: agent.metric("wg_agent_session_ends_total", reason="peer_removed") == 1)
        # Nobody is told of ends in this protocol: they do not pile up.
        await eventually(lambda: not agent.unreported())

    run_following(world, generation, scenario)


@both
def test_a_psk_whose_session_has_ended_lets_nobody_in_again(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        await agent.end(1)
        await holds(world, {})
        core.create(device(core, 1, 11))
        await eventually(lambda: agent.state.roster.refused.get(key(1)) == "session_ended")
        core.create(device(core, 1, 12))
        await holds(world, peers((1, 12)))

    run_following(world, generation, scenario)


@both
def test_a_session_outlives_restarts_of_both_and_keeps_its_deadline(world: World, generation: int) -> None:
    async def main() -> None:
        core = make_core(generation)
        core.configuration.peers.append(device(core, 1, 11))
        deadlines = []
        for life in range(3):
            if isinstance(core, FirstGeneration):
                await core.start()
            async with following(world, core) as agent:
                if isinstance(core, SecondGeneration):
                    if not life:
                        await adopted(core)
                    core.start()
                await eventually(lambda agent=agent: agent.inbox.position is not None)  # type: ignore[misc]
                await holds(world, peers((1, 11)))
                deadlines.append(agent.state.sessions[key(1)].deadline)
                world.clock.advance(60.0)
                await core.stop()
        assert deadlines == deadlines[:1] * 3
        added = [one for one in world.host.operations() if type(one).__name__ == "AddPeer"]
        assert len(added) == 1

    asyncio.run(main())


def test_a_network_change_carries_port_mtu_and_fwmark(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        changed = core.configuration
        changed.port, changed.mtu, changed.fwmark = 51999, 1380, 7
        core.push(core.wire.Update(update_type=core.wire.UPDATE_TYPE_MODIFY, network=changed))
        await eventually(lambda: world.host.mtu == 1380, "the MTU")
        assert (world.host.listen_port, world.host.fwmark) == (51999, 7)
        assert world.on_interface() == peers((1, 11))

    second(world, scenario)


def test_a_network_change_without_peers_is_never_nobody(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        streams = core.streams
        changed = core.wire.Configuration(name="hq", port=51999, mtu=1420)
        core.push(core.wire.Update(update_type=core.wire.UPDATE_TYPE_MODIFY, network=changed))
        await eventually(lambda: core.streams > streams, "the whole asked for")
        await eventually(lambda: agent.inbox.core_connected)
        assert world.on_interface() == peers((1, 11))

    second(world, scenario)


@both
def test_core_hands_out_the_interfaces_key(world: World, generation: int) -> None:
    raw = bytes(range(32))

    def prepare(core: Any) -> None:
        setattr(core.configuration, "prvkey" if generation == 1 else "private_key", format_key(raw))

    async def scenario(agent: Agent, core: Any) -> None:
        assert agent.state.identity is not None
        assert agent.state.identity.private_key == raw
        own = agent.state.identity.public_key
        await eventually(lambda: world.host.public_key == own, "the key on the interface")
        # Nobody else may have it, or a peer would be the gateway itself.
        core.create(device(core, 1, 11, pubkey=format_key(own)))
        await eventually(lambda: agent.state.roster.refused.get(own) == "own_public_key")
        assert repr(raw) not in repr(agent.state.identity)

    run_following(world, generation, scenario, prepare)


@both
def test_a_firewall_change_is_put_in_force_and_disabling_it_removes_the_rules(
    world: World, generation: int
) -> None:
    rules = Rules()

    async def scenario(agent: Agent, core: Any) -> None:
        assert rules.put_in_force == [None]
        wire = core.wire
        changed = wire.Update(update_type=1 if generation == 1 else 2)
        changed.firewall_config.default_policy = 1 if generation == 1 else 2
        core.push(changed)
        await eventually(lambda: len(rules.put_in_force) == 2, "the rules")
        assert rules.put_in_force[1] == Acl(Verdict.DROP)
        disabled = wire.Update(update_type=2 if generation == 1 else 3)
        disabled.disable_firewall.SetInParent()
        core.push(disabled)
        await eventually(lambda: len(rules.put_in_force) == 3, "no rules")
        assert rules.put_in_force[2] is None

    run_following(world, generation, scenario, rules=rules)


@both
def test_nobody_is_let_in_while_the_access_rules_cannot_be_put_in_force(
    world: World, generation: int
) -> None:
    rules = Rules()
    rules.fails = True

    async def main() -> None:
        core = make_core(generation)
        core.configuration.peers.append(device(core, 1, 11))
        if isinstance(core, FirstGeneration):
            await core.start()
        async with following(world, core, rules=rules) as agent:
            if isinstance(core, SecondGeneration):
                await adopted(core)
                core.start()
            await eventually(lambda: agent.state.roster.refused.get(key(1)) == "not_guarded")
            assert world.on_interface() == {}
            assert agent.inbox.core_connected
            rules.fails = False
            await holds(world, peers((1, 11)))
            await core.stop()

    asyncio.run(main())


@both
def test_a_stream_that_closed_is_opened_again(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        for number in (1, 2, 3):
            await core.stop()
            await eventually(lambda: not agent.inbox.core_connected)
            core.configuration.peers.append(device(core, number, 10 + number))
            if generation == 1:
                await core.start(core.port)
            else:
                core.start()
            await holds(world, peers(*((n, 10 + n) for n in range(1, number + 1))))

    run_following(world, generation, scenario)


# Who is let in by the second generation's TLS.


def refused_dial(world: World, **members: Any) -> list[grpc.StatusCode]:
    """How an adopted gateway answers somebody else's Bidi."""
    codes: list[grpc.StatusCode] = []

    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        await core.stop()
        async with core.channel(**{k: v(core) for k, v in members.items() if k != "metadata"}) as made:
            call: Any = made.stream_stream(
                "/defguard.gateway.v2.Gateway/Bidi",
                core.wire.CoreResponse.SerializeToString,
                core.wire.CoreRequest.FromString,
            )(metadata=members.get("metadata", core.metadata))
            try:
                async with asyncio.timeout(10):
                    await call.read()
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())

    second(world, scenario)
    return codes


def test_another_client_certificate_of_the_same_ca_is_unauthenticated(world: World) -> None:
    other: dict[str, Any] = {}

    def make(core: SecondGeneration) -> Any:
        other["key"], other["certificate"] = core.authority.another_client()
        return other["key"]

    codes = refused_dial(world, key=make, certificate=lambda _: other["certificate"])
    assert codes == [grpc.StatusCode.UNAUTHENTICATED]


def test_a_client_of_an_unknown_ca_is_refused_before_any_handler(world: World) -> None:
    stranger = SecondGeneration(0).authority
    codes = refused_dial(world, key=lambda _: stranger.client_key, certificate=lambda _: stranger.client)
    assert codes == [grpc.StatusCode.UNAVAILABLE]


def test_a_client_without_a_certificate_is_refused(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        await core.stop()
        ca = core.authority.ca.public_bytes(encoding=PEM)
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{core.port}", grpc.ssl_channel_credentials(ca)
        ) as made:
            call: Any = made.stream_stream("/defguard.gateway.v2.Gateway/Bidi")(metadata=core.metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    second(world, scenario)


@pytest.mark.parametrize(
    "metadata", [(), (("defguard-component-version", "1.6.6"),), (("defguard-component-version", "two"),)]
)
def test_a_core_that_is_too_old_or_does_not_say_is_refused(world: World, metadata: Any) -> None:
    assert refused_dial(world, metadata=metadata) == [grpc.StatusCode.INTERNAL]


def test_a_second_connection_of_cores_is_refused_while_the_first_lives(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        async with core.channel() as made:
            call: Any = made.stream_stream(
                "/defguard.gateway.v2.Gateway/Bidi",
                core.wire.CoreResponse.SerializeToString,
                core.wire.CoreRequest.FromString,
            )(metadata=core.metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))

    second(world, scenario)


def expiries(agent: Agent) -> dict[str, float]:
    """When the certificates expire, as the metrics have it."""
    samples = (s for family in agent.metrics._registry.collect() for s in family.samples)
    name = "wg_agent_certificate_expiry_timestamp_seconds"
    return {s.labels["certificate"]: s.value for s in samples if s.name == name}


def test_purge_takes_all_of_it_down_and_a_new_adoption_builds_it_up_again(world: World) -> None:
    rules = Rules()

    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        held = certificates.load(world.folder / "state" / "certs")
        assert held is not None
        assert expiries(agent) == held.expiries
        assert min(expiries(agent).values()) == held.expires_at
        await core.stop()
        await core.purge()
        assert expiries(agent) == {}
        assert not world.host.exists
        assert agent.state.sessions == {}
        assert rules.put_in_force[-1] is None
        assert not list((world.folder / "state" / "certs").glob("*.pem"))
        assert agent.metric("wg_agent_session_ends_total", reason="peer_removed") == 1
        # Ticks and looks do not bring it back.
        await agent.look()
        assert not world.host.exists
        core.configuration.peers[0].CopyFrom(device(core, 1, 21))
        await adopted(core)
        core.start()
        await holds(world, peers((1, 21)))
        await eventually(lambda: world.host.up, "the link, which comes up once its peers are on it")

    second(world, scenario, rules=rules)


def test_an_adopted_gateway_that_core_does_not_dial_is_settled_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.core.defguard.gateway.DIAL", 0.3)

    async def main() -> None:
        core = make_core(2)
        assert isinstance(core, SecondGeneration)
        async with following(world, core):
            await adopted(core)
        # Another life of the agent, which has its certificates from the start.
        async with following(world, core) as agent:
            assert not agent.inbox.settled.is_set()
            await eventually(agent.inbox.settled.is_set, "READY without core")
            assert "core has not connected" in agent.inbox.core_error
            core.start()
            await eventually(lambda: agent.inbox.core_connected)
            await core.stop()

    asyncio.run(main())


# Size.


class Roomy(Kernel):
    """No two peers have a prefix in common: nothing is looked for, which would take a minute."""

    def _give(self, key: PublicKey, allowed_ips: tuple[Prefix, ...]) -> None:
        self.peers[key].allowed_ips.update(allowed_ips)


@both
def test_a_configuration_of_50_000_peers_with_psks_is_taken(world: World, generation: int) -> None:
    count = 50_000
    world.host.kernel = Roomy()

    def prepare(core: Any) -> None:
        for number in range(1, count + 1):
            address = f"10.{8 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
            core.configuration.peers.append(device(core, number, number, allowed_ips=[address]))

    async def scenario(agent: Agent, core: Any) -> None:
        await eventually(lambda: len(world.host.kernel.peers) == count, "all peers")
        assert len(agent.state.sessions) == count
        assert not agent.state.roster.refused

    run_following(world, generation, scenario, prepare)


# Taking over.


@both
def test_peers_that_another_gateway_left_keep_their_tunnels_if_core_lists_that_psk(
    world: World, generation: int
) -> None:
    world.host.exists = world.host.up = True
    for number, secret in ((1, 11), (2, 12), (3, 13)):
        world.host.kernel.apply(AddPeer(key(number), psk(secret), prefixes(f"10.8.0.{number}")))
        assert world.host.kernel.handshake(key(number), psk(secret), "before", world.clock.now)

    def prepare(core: Any) -> None:
        # One has authenticated anew meanwhile, and one is gone.
        core.configuration.peers.extend([device(core, 1, 11), device(core, 2, 22)])

    async def scenario(agent: Agent, core: Any) -> None:
        await holds(world, peers((1, 11), (2, 22)))
        assert len(world.host.kernel.working_tunnels(key(1), world.clock.now)) == 1
        assert world.host.kernel.working_tunnels(key(2), world.clock.now) == []
        # Nothing but its keepalive.
        [only] = [one for one in world.host.operations() if one.public_key == key(1)]
        assert only == UpdatePeer(key(1), KEEP, KEEP, False, 25)

    run_following(world, generation, scenario, prepare)
