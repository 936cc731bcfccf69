"""What comes first: journal or kernel, removal or addition, kernel or answer (rules 15 and 16)."""

from agent.model import AddPeer, RemovePeer, UpdatePeer
from agent.ports import Verdict
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, upserted, with_agent
from tests.support.builders import grant, key, peer, psk


def log_since(world: World, mark: int) -> list[str]:
    """Operations and what sessions and ends were journalled, in their order."""
    words = []
    for kind, what in world.host.log[mark:]:
        if kind == "operation":
            words.append(type(what).__name__)
        elif kind == "journal":
            if what.sessions:  # type: ignore[attr-defined]
                words.append("journal session")
            if what.ends:  # type: ignore[attr-defined]
                words.append("journal end")
    return words


def test_a_grant_is_journalled_before_the_kernel_has_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        mark = len(world.host.log)
        await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert log_since(world, mark) == ["journal session", "AddPeer"]

    with_agent(world, scenario)


def test_an_end_is_in_the_kernel_before_it_is_journalled(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        mark = len(world.host.log)
        await agent.give([core.change(revoked(1, "s1"))])
        assert log_since(world, mark) == ["RemovePeer", "journal end"]

    with_agent(world, scenario)


def test_an_end_and_a_grant_in_one_step_remove_and_add(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        mark = len(world.host.log)
        changes = [core.change(revoked(1, "s1")), core.change(granted(1, grant("s2", 2)))]
        await agent.give(changes)
        assert log_since(world, mark) == ["RemovePeer", "journal session", "AddPeer", "journal end"]
        assert world.on_interface() == {key(1): psk(2)}

    with_agent(world, scenario)


def test_a_renewal_and_a_replacement_update_in_place(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        before = {k: p.incarnation for k, p in world.host.kernel.peers.items()}
        mark = len(world.host.log)
        await agent.give([core.change(granted(1, grant("s1", 11, expires_at=1_800_007_200.0)))])
        await agent.give([core.change(granted(2, grant("s2b", 22)))])
        assert log_since(world, mark) == [
            "journal session",
            "UpdatePeer",
            "journal session",
            "journal end",
            "UpdatePeer",
            "journal end",
        ]
        assert world.on_interface() == {key(1): psk(11), key(2): psk(22)}
        assert {k: p.incarnation for k, p in world.host.kernel.peers.items()} == before

    with_agent(world, scenario)


def test_another_id_first_seen_in_a_snapshot_is_an_end_and_a_grant(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        mark = len(world.host.log)
        await agent.give(core.state([live(1, session="s1b", psk=2)]))
        done = ["RemovePeer", "journal session", "journal end", "AddPeer", "journal end"]
        assert log_since(world, mark) == done
        assert agent.ends() == {"s1": "replaced"}

    with_agent(world, scenario)


def test_a_plan_removes_then_updates_then_adds(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3)]))
        mark = len(world.host.operations())
        # The prefix of peer 1 moves to peer 3.
        changes = [
            core.change(upserted(1, "10.8.0.99")),
            core.change(upserted(3, "10.8.0.1", session=grant("s3", 3))),
            core.change(granted(2, grant("s2", 22, lasts=100))),
        ]
        await agent.give(changes)
        kinds = [type(operation) for operation in world.host.operations()[mark:]]
        assert kinds == [RemovePeer, UpdatePeer, AddPeer]
        assert world.on_interface() == {key(2): psk(22), key(3): psk(3)}

    with_agent(world, scenario)


def test_the_answer_comes_once_the_kernel_holds_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        outcome = await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert (outcome.verdict, str(outcome.position)) == (Verdict.APPLIED, "e1:2")
        assert world.on_interface() == {key(1): psk(1)}

    with_agent(world, scenario)


def test_peers_are_on_a_new_interface_before_it_is_up(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        del agent
        kinds = [kind for kind, _ in world.host.log]
        assert kinds.index("configure") < kinds.index("up")
        assert core.revision == 0

    with_agent(world, scenario)


def test_keepalive_is_set_once_the_peer_has_an_endpoint(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1, session=grant("s1", 1), persistent_keepalive=25)]))
        assert world.host.kernel.peers[key(1)].persistent_keepalive == 0
        world.host.kernel.handshake(key(1), psk(1), "client", world.clock())
        await agent.look()
        assert world.host.kernel.peers[key(1)].persistent_keepalive == 25
        assert agent.drift() == {}

    with_agent(world, scenario)
