"""A journal that can't be written: nothing new is admitted, nothing that is live is touched (rule 15)."""

import base64

import pytest

from agent.model import Now, Refusal
from agent.ports import Verdict
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, with_agent
from tests.support.builders import NOW, grant, key, peer, psk

pytestmark = pytest.mark.reliability(
    "a journal that can't be read or written, a disk that hangs (injected)",
    "nothing new is admitted, nothing live is touched, ends take effect all the same",
)


def test_a_session_that_cannot_be_journalled_is_not_admitted(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2), peer(3, mfa_exempt=True)]))
        world.journal_fails = True
        outcome = await agent.give([core.change(granted(2, grant("s2", 2)))])
        assert outcome.verdict is Verdict.APPLIED
        assert [r.reason for r in outcome.refused] == ["not_journalled"]
        assert world.on_interface() == {key(1): psk(1), key(3): None}
        assert (await agent.desk.status())["journal_ok"] is False

    with_agent(world, scenario)


def test_it_is_admitted_once_the_journal_works_again(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        world.journal_fails = True
        await agent.give([core.change(granted(1, grant("s1", 1)))])
        await agent.acknowledge()
        await agent.look()
        assert world.on_interface() == {}
        world.journal_fails = False
        await agent.tick()
        assert world.on_interface() == {key(1): psk(1)}
        assert (await agent.acknowledge()).refused == ()
        assert (await agent.desk.status())["journal_ok"] is True

    async def after(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {key(1): psk(1)}
        assert core.revision == 0
        assert agent.ends() == {}

    with_agent(world, scenario)
    with_agent(world, after)


def test_a_revocation_takes_effect_all_the_same_and_is_journalled_later(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        world.journal_fails = True
        await agent.give([core.change(revoked(1, "s1"))])
        assert world.on_interface() == {}
        assert agent.ends() == {}
        world.journal_fails = False
        await agent.tick()
        assert agent.ends() == {"s1": "revoked"}

    async def after(agent: Agent, core: Core) -> None:
        assert agent.ends() == {"s1": "revoked"}
        assert core.revision == 0

    with_agent(world, scenario)
    with_agent(world, after)


def test_a_probe_of_the_journal_is_no_contact_with_core(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        agent.inbox.heard()
        await agent.give(core.state([live(1)]))
        world.clock.advance(50)
        world.journal_fails = True
        await agent.look()
        world.clock.advance(20)
        await agent.tick()
        world.journal_fails = False
        await agent.tick()

    async def after(agent: Agent, core: Core) -> None:
        assert agent.ends() == {"s1": "core_lost"}
        assert core.revision == 0

    with_agent(world, scenario)
    with_agent(world, after, core_lost_grace=60.0)


def test_a_switch_of_mfa_that_could_not_be_journalled_is_journalled_later(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)], mfa_required=False))
        world.journal_fails = True
        await agent.give(core.state([peer(1)]))
        assert world.on_interface() == {}
        world.journal_fails = False
        await agent.tick()
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {}
        assert agent.state.location is not None
        assert agent.state.location.mfa_required
        assert core.revision == 0

    with_agent(world, scenario)
    with_agent(world, after)


def test_traffic_that_could_not_be_journalled_is_not_reported_before_it_is(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1, mfa_exempt=True), live(2)]))
        kernel = world.host.kernel
        kernel.peers[key(1)].rx_bytes = 1000
        world.journal_fails = True
        await agent.look()
        assert agent.reconciler.reports.stats(10) is None
        world.journal_fails = False
        await agent.look()
        report = agent.reconciler.reports.stats(10)
        assert report is not None
        assert [(p.public_key, p.rx_bytes) for p in report.peers] == [(key(1), 1000)]
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1, mfa_exempt=True), live(2)]))
        await agent.look()
        assert agent.state.traffic.get(key(1)).rx_bytes == 1000

    with_agent(world, scenario)
    world.reboot()
    with_agent(world, after)


def test_a_start_without_a_readable_journal_admits_nobody_new_and_knows_the_dead_later(world: World) -> None:
    async def before(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        await agent.end(1)

    async def scenario(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {key(2): psk(2)}
        outcome = await agent.give(core.state([live(1), peer(3, mfa_exempt=True)]))
        assert [r.reason for r in outcome.refused] == ["not_journalled"]
        assert world.on_interface() == {key(3): None}
        world.journal_fails = False
        await agent.tick()
        # The operator ended s1 in an earlier life: core's word does not bring it back.
        assert world.on_interface() == {key(3): None}
        assert agent.ends() == {"s1": "operator"}

    with_agent(world, before)
    world.journal_fails = True
    with_agent(world, scenario)


def test_without_a_journal_nothing_is_touched_before_the_first_state(world: World) -> None:
    async def before(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))

    async def scenario(agent: Agent, core: Core) -> None:
        marked = len(world.host.operations())
        await agent.tick()
        await agent.look()
        assert len(world.host.operations()) == marked
        assert world.host.listen_port == 443
        assert agent.drift() == {}
        await agent.give(core.state([live(1), peer(2)]))
        assert set(world.on_interface()) == {key(1)}
        assert world.host.listen_port == 51820

    with_agent(world, before)
    for file in world.folder.iterdir():
        file.unlink()
    world.host.listen_port = 443
    with_agent(world, scenario)


def test_a_journal_that_is_no_database_is_set_aside(world: World) -> None:
    async def before(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))

    async def scenario(agent: Agent, core: Core) -> None:
        assert agent.journal.set_aside is not None
        await agent.give(core.state([live(1), live(2)]))
        assert set(world.on_interface()) == {key(1), key(2)}

    with_agent(world, before)
    (world.folder / "journal.sqlite").write_bytes(b"\x00garbage" * 4096)
    with_agent(world, scenario)


def test_no_secret_is_on_the_disk(world: World) -> None:
    static = psk(0x5EC2E7)
    session = psk(0x5E5510)

    async def scenario(agent: Agent, core: Core) -> None:
        peers = [
            peer(1, session=grant("s1", 0x5E5510)),
            peer(2, mfa_exempt=True, preshared_key=static),
            peer(3, session=grant("s3", 3)),
        ]
        await agent.give(core.state(peers))
        await agent.give([core.change(revoked(3, "s3"))])
        await agent.look()
        forms = [
            form
            for key_ in (static, session, psk(3))
            for form in (
                key_.raw,
                key_.raw.hex().encode(),
                base64.b64encode(key_.raw),
                str(key_.raw).encode(),
            )
        ]
        files = [file for file in world.folder.rglob("*") if file.is_file()]
        assert {file.name for file in files} >= {"journal.sqlite", "journal.sqlite-wal"}
        for file in files:
            content = file.read_bytes()
            assert not [form for form in forms if form in content], file
            assert file.stat().st_mode & 0o777 == 0o600

    with_agent(world, scenario)


def test_a_peer_that_was_refused_is_not_admitted_by_an_older_record_after_a_reboot(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), peer(2)], mfa_required=False))
        assert set(world.on_interface()) == {key(1), key(2)}
        # Its PSK can't be read: that is not "no PSK".
        broken = peer(1, fault=Refusal.INVALID_PRESHARED_KEY)
        outcome = await agent.give(core.state([broken, peer(2)], mfa_required=False))
        assert len(outcome.refused) == 1
        assert set(world.on_interface()) == {key(2)}

    async def after(agent: Agent, core: Core) -> None:
        assert set(world.on_interface()) == {key(2)}
        assert core.revision == 0
        assert key(1) in agent.state.roster.refused

    with_agent(world, scenario)
    world.reboot()
    assert world.clock() != Now(NOW.boot, NOW.wall)
    with_agent(world, after)
