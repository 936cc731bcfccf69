"""What goes wrong around a Defguard core: nobody stays in who has to go, nobody is locked out for it."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from agent.acl import Acl, Verdict
from agent.configfile import load_config
from agent.core.defguard import certificates
from agent.core.defguard.client import DefguardClient
from agent.core.defguard.connection import CallingCore
from agent.encoding import format_key
from agent.errors import ConfigError
from tests.core.defguard.harness import (
    Rules,
    adopted,
    configuration,
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
from tests.support.defguard_core import DER, FirstGeneration, SecondGeneration

both = pytest.mark.parametrize("generation", [1, 2])


async def back(core: Any) -> None:
    if isinstance(core, FirstGeneration):
        await core.start(core.port)
    else:
        core.start()


def firewall(core: Any) -> Any:
    """Rules of core's: everything is denied."""
    update = core.wire.Update(update_type=1 if isinstance(core, FirstGeneration) else 2)
    update.firewall_config.default_policy = 1 if isinstance(core, FirstGeneration) else 2
    return update


class SlowRules(Rules):
    """nftables hangs for a second over the removal of the rules."""

    async def put(self, acl: Acl | None) -> None:
        if acl is None and self.put_in_force:
            await asyncio.sleep(1.0)
        await super().put(acl)


# Access rules.


@both
def test_who_has_to_go_goes_while_the_access_rules_can_not_be_put_in_force(
    world: World, generation: int
) -> None:
    rules = Rules()

    async def scenario(agent: Agent, core: Any) -> None:
        for number in (1, 2):
            core.create(device(core, number, 10 + number))
        await holds(world, peers((1, 11), (2, 12)))
        rules.fails = True
        core.push(firewall(core))
        core.delete(format_key(key(1)))
        core.create(device(core, 3, 13))
        await holds(world, peers((2, 12)))
        await eventually(lambda: agent.state.roster.refused.get(key(3)) == "not_guarded")
        # Who is in already is reported, or core would take everybody for gone.
        assert world.host.kernel.handshake(key(2), psk(12), "", world.clock.now)
        await agent.look()
        await eventually(lambda: core.told, "a report")
        # Nor does anybody get another address meanwhile.
        core.modify(device(core, 2, 12, allowed_ips=["10.8.0.77"]))
        await holds(world, {})
        rules.fails = False
        await holds(world, peers((2, 12), (3, 13)))
        assert agent.inbox.core_connected

    run_following(world, generation, scenario, rules=rules)


@both
def test_who_has_to_go_goes_while_the_access_rules_can_not_be_read(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        for number in (1, 2):
            core.create(device(core, number, 10 + number))
        await holds(world, peers((1, 11), (2, 12)))
        bad = firewall(core)
        bad.firewall_config.rules.add(id=1, verdict=bad.firewall_config.default_policy).source_addrs.add(
            ip="none"
        )
        core.configuration.firewall_config.CopyFrom(bad.firewall_config)
        core.push(bad)
        core.delete(format_key(key(1)))
        core.create(device(core, 3, 13))
        await holds(world, peers((2, 12)))

    run_following(world, generation, scenario)


@both
def test_a_network_change_brings_its_access_rules(world: World, generation: int) -> None:
    rules = Rules()

    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        changed = firewall(core)
        core.configuration.firewall_config.CopyFrom(changed.firewall_config)
        core.configuration.port = 51999
        core.push(core.wire.Update(update_type=changed.update_type, network=core.configuration))
        await eventually(lambda: world.host.listen_port == 51999)
        assert rules.put_in_force[-1] == Acl(Verdict.DROP)

    run_following(world, generation, scenario, rules=rules)


# Ends.


@both
@pytest.mark.parametrize("away", [False, True])
def test_a_psk_that_has_reached_max_lifetime_does_not_begin_anew(
    world: World, generation: int, away: bool
) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        if away:
            await core.stop()
            await eventually(lambda: not agent.inbox.core_connected)
        world.clock.advance(86_400.5)
        await agent.tick()
        await holds(world, {})
        # Ids are forgotten by the hour.
        world.clock.advance(2 * 3600.0)
        await agent.tick()
        if not away:
            await core.stop()
            await eventually(lambda: not agent.inbox.core_connected)
        await back(core)
        await eventually(lambda: agent.state.roster.refused.get(key(1)) == "session_ended")
        assert world.on_interface() == {}
        # Once core lists it no longer, it may be forgotten.
        core.delete(format_key(key(1)))
        await eventually(lambda: key(1) not in agent.state.roster.peers)
        world.clock.advance(3601.0)
        await agent.tick()
        assert not agent.state.roster.ended

    run_following(world, generation, scenario)


@both
def test_an_ended_psk_stays_ended_whatever_the_wall_clock_does(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        await agent.end(1)
        await holds(world, {})
        world.clock.step(90_000.0)
        for _ in range(2):
            await core.stop()
            await eventually(lambda: not agent.inbox.core_connected)
            await back(core)
            await eventually(lambda: agent.state.roster.refused.get(key(1)) == "session_ended")
        assert world.on_interface() == {}

    run_following(world, generation, scenario)


# Order.


def test_what_overtook_the_configuration_ends_no_session_that_is_in_it(world: World) -> None:
    async def main() -> None:
        core = FirstGeneration()
        core.configuration.peers.append(device(core, 1, 12))

        async def overtaken() -> None:
            # Older than the configuration, which has them both.
            if 2 <= core.configs <= 4:
                core.push(core.wire.Update(update_type=2, peer=core.wire.Peer(pubkey=format_key(key(1)))))
                core.push(core.wire.Update(update_type=0, peer=device(core, 1, 12)))
                await asyncio.sleep(0.3)

        core.at_config = overtaken
        async with core.running(), following(world, core) as agent:
            await eventually(lambda: agent.inbox.position is not None)
            await holds(world, peers((1, 12)))
            await agent.tick()
            assert agent.state.roster.refused == {}
            assert core.configs == 4

    asyncio.run(main())


@both
def test_two_devices_that_change_places_are_both_in_afterwards(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        core.create(device(core, 2, 12))
        await holds(world, peers((1, 11), (2, 12)))
        core.modify(device(core, 1, 11, allowed_ips=["10.8.0.2"]))
        await holds(world, peers((1, 11)))
        core.modify(device(core, 2, 12, allowed_ips=["10.8.0.1"]))
        await holds(world, peers((1, 11), (2, 12)))

    run_following(world, generation, scenario)


@both
def test_asking_for_the_whole_again_does_not_count_as_core_lost(world: World, generation: int) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        seen = []
        for _ in range(30):
            await asyncio.sleep(0.1)
            seen.append(agent.inbox.core_connected)
        assert all(seen)
        if generation == 1:
            assert core.configs > 3
        else:
            assert core.streams > 1

    run_following(world, generation, scenario, quiet=1.0)


def test_core_that_does_not_dial_again_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.core.defguard.gateway.BACK", 0.5)

    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.redial = 60.0
        await eventually(lambda: not agent.inbox.core_connected)
        assert "has not dialled again" in agent.inbox.core_error

    run_following(world, 2, scenario, quiet=1.0)


# Purge.


def test_purge_of_many_leaves_no_interface(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        await eventually(lambda: len(world.on_interface()) == 60)
        await core.purge()
        for _ in range(10):
            await agent.look()
        assert not world.host.exists
        assert agent.metric("wg_agent_session_ends_total", reason="peer_removed") == 60
        assert not agent.reconciler.writer.to_reap

    def prepare(core: Any) -> None:
        core.configuration.peers.extend([device(core, n, 100 + n) for n in range(1, 61)])

    run_following(world, 2, scenario, prepare)


def test_nothing_that_core_says_during_a_purge_brings_anybody_back(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        purging = asyncio.create_task(core.purge())
        await eventually(lambda: not world.host.exists)
        core.configuration.peers.append(device(core, 2, 22))
        core.push(core.wire.Update(update_type=2, network=core.configuration))
        core.create(device(core, 3))
        await purging
        core.redial = 60.0
        await agent.look()
        assert not world.host.exists
        assert not list((world.folder / "state" / "certs").glob("*.pem"))

    run_following(world, 2, scenario, rules=SlowRules())


def test_a_purge_that_core_does_not_wait_for_is_finished(world: World) -> None:
    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        await core.stop()
        async with core.channel() as made:
            call = made.unary_unary(
                "/defguard.gateway.v2.Gateway/Purge", Empty.SerializeToString, Empty.FromString
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await call(Empty(), metadata=core.metadata, timeout=0.5)
        certs = world.folder / "state" / "certs"
        await eventually(lambda: not list(certs.glob("*.pem")), "the certificates' end")
        await adopted(core)

    run_following(world, 2, scenario, rules=SlowRules())


def test_a_purge_that_fails_leaves_the_gateway_to_core(world: World) -> None:
    rules = Rules()

    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        rules.fails = True
        with pytest.raises(grpc.aio.AioRpcError, match="nftables is gone"):
            await core.purge()
        rules.fails = False
        await core.purge()
        assert not list((world.folder / "state" / "certs").glob("*.pem"))

    run_following(world, 2, scenario, rules=rules)


# Starting and stopping.


def test_one_cancellation_ends_it_whatever_it_is_at(world: World) -> None:
    async def main() -> None:
        core = make_core(2)
        assert isinstance(core, SecondGeneration)
        config = load_config(configuration(world.folder, core))
        async with world.agent() as agent:
            inbox = agent.inbox
            followed = CallingCore(config, inbox, agent.reconciler.reports, Rules(), world.clock)
            task = asyncio.create_task(followed.run())
            await adopted(core)
            core.start()
            await eventually(lambda: inbox.position is not None)
            await core.purge()
            await core.stop()
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=10)
            assert done

    asyncio.run(main())


def test_a_proxy_of_the_environment_is_never_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def main() -> None:
        core = FirstGeneration()
        async with core.running():
            client = DefguardClient(core.url, core.token, hostname="gw-1", timeout=5)
            async with client.connect() as connection:
                assert (await connection.config()).name == "hq"

    asyncio.run(main())


def test_a_host_name_that_core_can_not_be_told_is_a_fault_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gwä")
    with pytest.raises(ConfigError, match="hostname"):
        DefguardClient("http://127.0.0.1:9/", "token")


def test_a_set_of_certificates_that_is_not_whole_is_said(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "state" / "certs"
    folder.mkdir(parents=True)
    (folder / certificates.KEY).touch(0o600)

    async def main() -> None:
        core = make_core(2)
        assert isinstance(core, SecondGeneration)
        async with following(world, core):
            await adopted(core)

    asyncio.run(main())
    assert "the certificates are no whole set" in capsys.readouterr().out


@both
def test_the_token_and_the_bearer_are_not_logged(
    world: World, generation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        await holds(world, peers((1, 11)))
        await core.stop()
        await eventually(lambda: not agent.inbox.core_connected)

    run_following(world, generation, scenario)
    said = capsys.readouterr()
    for secret in ("Bearer setup", "eyJ", format_key(psk(11).raw)):
        assert secret not in said.out + said.err


# What was told just before the end.


class HungRules(Rules):
    """nftables does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs = False

    async def put(self, acl: Acl | None) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        await super().put(acl)


@both
def test_a_revocation_is_taken_in_though_core_goes_right_after_it(world: World, generation: int) -> None:
    rules = Rules()

    async def slowly(acl: Acl | None) -> None:
        await asyncio.sleep(0.5)
        await Rules.put(rules, acl)

    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        core.create(device(core, 2, 12))
        await holds(world, peers((1, 11), (2, 12)))
        rules.put = slowly  # type: ignore[method-assign]
        core.push(firewall(core))
        await asyncio.sleep(0.2)
        core.delete(format_key(key(1)))
        await asyncio.sleep(0.1)
        await core.stop()
        await holds(world, peers((2, 12)))

    run_following(world, generation, scenario, rules=rules)


@both
def test_no_revocation_waits_for_access_rules_that_nftables_hangs_over(
    world: World, generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.core.defguard.feed.PUT", 1.0)
    rules = HungRules()

    async def scenario(agent: Agent, core: Any) -> None:
        core.create(device(core, 1, 11))
        core.create(device(core, 2, 12))
        await holds(world, peers((1, 11), (2, 12)))
        rules.hangs = True
        core.push(firewall(core))
        await asyncio.sleep(0.1)
        core.delete(format_key(key(1)))
        core.create(device(core, 3, 13))
        await holds(world, peers((2, 12)))
        await eventually(lambda: agent.state.roster.refused.get(key(3)) == "not_guarded")
        rules.hangs = False
        await holds(world, peers((2, 12), (3, 13)))

    run_following(world, generation, scenario, rules=rules)


@both
def test_after_a_reboot_nobody_is_in_already_while_access_rules_are_not_in_force(
    world: World, generation: int
) -> None:
    rules = Rules()

    async def main() -> None:
        core = make_core(generation)
        core.configuration.peers.extend([device(core, 1, 11)])
        for life in range(2):
            rules.fails = bool(life)
            if isinstance(core, FirstGeneration):
                await core.start()
            async with following(world, core, rules=rules) as agent:
                if isinstance(core, SecondGeneration):
                    if not life:
                        await adopted(core)
                    core.start()
                await eventually(lambda agent=agent: agent.inbox.position is not None)  # type: ignore[misc]
                if not life:
                    await holds(world, peers((1, 11)))
                else:
                    await eventually(
                        lambda agent=agent: agent.state.roster.refused.get(key(1)) == "not_guarded"  # type: ignore[misc]
                    )
                    assert world.on_interface() == {}
                await core.stop()
            world.reboot()

    asyncio.run(main())


def test_a_location_without_peers_has_its_access_rules_too(world: World) -> None:
    rules = Rules()

    async def scenario(agent: Agent, core: SecondGeneration) -> None:
        changed = firewall(core)
        core.configuration.firewall_config.CopyFrom(changed.firewall_config)
        core.push(core.wire.Update(update_type=2, network=core.configuration))
        await eventually(lambda: rules.put_in_force[-1] == Acl(Verdict.DROP))

    run_following(world, 2, scenario, rules=rules)


def test_certificates_of_a_gateway_that_core_has_deleted_are_not_taken_over_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, folder = SecondGeneration(0), tmp_path / "certs"
    made = certificates_of(core)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    certificates.store(tmp_path / "credentials", made)
    assert certificates.take_over(folder) == made
    certificates.remove(folder)
    assert certificates.take_over(folder) is None
    # Another adoption is as good as the first.
    certificates.store(folder, made)
    assert certificates.load(folder) == made


def certificates_of(core: SecondGeneration) -> certificates.Certificates:
    made = certificates.make_key()
    signed = core.authority.sign(certificates.make_request(made, "g"))
    ders = [one.public_bytes(DER) for one in (signed, core.authority.ca, core.authority.client)]
    return certificates.check_bundle(made, ders[0], ders[1], ders[2], datetime.now(UTC))
