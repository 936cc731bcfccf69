"""What becomes of the table when somebody else, or a former agent, has had it in hand."""

import asyncio

import pytest

from agent.encoding import parse_prefix
from agent.errors import GuardDrifted, GuardError
from agent.guard import compare
from agent.model import PublicKey
from agent.ruleset import table_name
from tests.firewall.behaviour import LONG, Behaviours, differences, reply
from tests.firewall.stand import ALICE, ALICE4, BOB, BOB4, GATEWAY4, ROUTER, Stand, exempt, session
from tests.support.netns import Pinger

behaviours = Behaviours()


@behaviours.add
async def a_new_agent_takes_over_what_it_finds(stand: Stand) -> None:
    guard = stand.firewall()
    await guard.raise_({ALICE: session(40, ALICE4, "10.8.5.0/24"), ROUTER: exempt("10.8.9.0/24")}, LONG)
    with Pinger(stand.clients, GATEWAY4) as ping:
        await reply(ping)
        before = await stand.ours()
        guard = stand.firewall()
        contents = await guard.read()
        assert contents is not None
        assert contents.faults == ()
        alice, router = (session(0, ALICE4, "10.8.5.0/24").prefixes, exempt("10.8.9.0/24").prefixes)
        assert 30 < contents.remaining(alice) <= 40
        assert contents.remaining((*alice, parse_prefix(BOB4))) == 0
        assert contents.remaining(router) == 0
        assert contents.elements[router[0]] is None
        assert contents.lease is not None
        assert await guard.raise_({}, LONG) == {}
        await reply(ping)
    assert ping.lost == 0
    after = await stand.ours()
    assert [line for line in before.splitlines() if "expires" not in line] == [
        line for line in after.splitlines() if "expires" not in line
    ]
    assert (contents := await guard.read()) is not None
    assert 20 < contents.remaining(alice) <= 40


@behaviours.add
async def the_ingress_chain_is_back_after_the_link_was_made_again(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4)}
    await guard.raise_(wanted, LONG)
    await asyncio.to_thread(stand.gateway.ip, "link", "delete", stand.name)
    await asyncio.to_thread(stand.wire)
    await guard.raise_(wanted, LONG)
    assert (contents := await guard.read()) is not None
    assert contents.faults == ()
    assert await stand.answers(ALICE4, GATEWAY4)
    # Judged inbound by itself: postrouting is made to let everything out.
    name = f"inet {table_name(stand.name)}"
    await stand.nft(f"flush chain {name} postrouting")
    assert not await stand.answers(BOB4, GATEWAY4)
    assert (contents := await guard.read()) is not None
    assert contents.faults == ("the rules of the chain postrouting are not those of the agent",)


@behaviours.add
async def a_flush_of_everything_is_told_and_the_table_made_whole_again(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    disturbed = asyncio.create_task(guard.disturbed())
    await asyncio.sleep(0.1)
    await guard.admit(wanted)
    await guard.renew_lease(LONG)
    await guard.dismiss([parse_prefix(BOB4)])
    await asyncio.sleep(0.3)
    assert not disturbed.done()
    await stand.nft("flush", "ruleset")
    await asyncio.wait_for(disturbed, 5)
    assert await guard.read() is None
    assert compare(wanted, None, lease_demanded=True).rebuild
    works = guard.admit(wanted), guard.renew_lease(LONG), guard.dismiss([parse_prefix(BOB4)])
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        assert isinstance(outcome, GuardError)
        assert "is not whole: it is gone" in str(outcome)
    assert await guard.raise_(wanted, LONG) == {}
    assert await stand.answers(ALICE4, GATEWAY4)
    assert not await stand.answers(BOB4, GATEWAY4)
    assert (contents := await guard.read()) is not None
    assert differences(wanted, contents) == []


@behaviours.add
async def a_long_change_of_ones_own_is_not_listened_to_and_the_table_is_looked_at_after_it(
    stand: Stand,
) -> None:
    guard = stand.firewall()
    many = {
        PublicKey(n.to_bytes(32, "big")): session(LONG, f"10.9.{n >> 8}.{n & 255}") for n in range(1, 1001)
    }
    guard.mute()
    await guard.raise_({}, LONG)
    await guard.unmute()
    disturbed = asyncio.create_task(guard.disturbed())
    await asyncio.sleep(0.1)
    await guard.read()
    guard.mute()
    guard.mute()
    await guard.admit(many)
    await guard.unmute()
    assert not guard.untouched(), "who else has changed elements meanwhile is not known"
    assert not disturbed.done()
    await guard.unmute()
    assert (contents := await guard.read()) is not None
    assert differences(many, contents) == []
    assert guard.untouched()
    guard.mute()
    await stand.nft("flush", "ruleset")
    with pytest.raises(GuardDrifted, match="it is gone"):
        await guard.unmute()
    await guard.raise_(many, LONG)
    await guard.lower()
    guard.mute()
    await guard.unmute()
    disturbed.cancel()


@behaviours.add
async def what_was_read_need_not_be_read_again_until_somebody_else_changes_the_table(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    assert not guard.untouched()
    disturbed = asyncio.create_task(guard.disturbed())
    await asyncio.sleep(0.1)
    await guard.read()
    assert guard.untouched()
    # What the agent does itself, and what happens to other tables, it need not read.
    await guard.admit({BOB: session(LONG, BOB4)._replace(fresh=True)})
    await guard.admit(wanted | {BOB: session(LONG, BOB4)})
    await guard.dismiss([parse_prefix(ALICE4)])
    await guard.renew_lease(LONG)
    await stand.nft("add table inet wg_agent_wg; add set inet wg_agent_wg s { type ipv4_addr; }")
    await stand.nft("add element inet wg_agent_wg s { 10.8.0.5 }")
    assert guard.untouched()
    assert not disturbed.done()
    name = f"inet {table_name(stand.name)}"
    for foreign in (
        f"delete element {name} session4_32 {{ {BOB4} }}",
        f"add element {name} session4_32 {{ {ALICE4} timeout 1h }}",
        f"flush set {name} barred4_32",
    ):
        await stand.nft(foreign)
        assert not guard.untouched(), foreign
        assert not disturbed.done()
        await guard.admit({BOB: session(LONG, BOB4)})
        assert not guard.untouched(), "what was heard is not forgotten by a change of our own"
        await guard.read()
        assert guard.untouched()
    await stand.nft(f"add chain {name} strange")
    assert not guard.untouched()
    await asyncio.wait_for(disturbed, 5)
    await stand.nft("flush ruleset")
    await guard.read()
    await guard.raise_(wanted, LONG)
    assert not guard.untouched()


@behaviours.add
async def an_element_for_everything_is_taken_out_when_it_is_seen(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4)}
    await guard.raise_(wanted, LONG)
    await stand.nft(f"add element inet {table_name(stand.name)} session4_32 {{ * timeout 1h }}")
    assert await stand.answers(BOB4, GATEWAY4)
    assert (contents := await guard.read()) is not None
    assert contents.faults == ("the set session4_32 had an element for everything",)
    assert not await stand.answers(BOB4, GATEWAY4)
    assert await stand.answers(ALICE4, GATEWAY4)
    assert differences(wanted, await guard.read()) == []


@behaviours.add
async def what_others_do_to_the_table_is_seen_and_mended_around_its_elements(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4, "10.8.5.0/24"), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    name = f"inet {table_name(stand.name)}"
    faults = {
        f"add table {name} {{ flags dormant; }}": "the table is dormant",
        f"insert rule {name} ingress accept": "the rules of the chain ingress",
        f"flush chain {name} from_exempt": "the rules of the chain from_exempt",
        f"add rule {name} to_session drop": "the rules of the chain to_session",
        f"flush chain {name} postrouting; delete chain {name} postrouting": "the chain postrouting is gone",
        f"flush chain {name} ingress; delete chain {name} ingress": "the chain ingress is gone",
        f"flush chain {name} ingress; delete chain {name} ingress;"
        f"add chain {name} ingress {{ type filter hook ingress device lo priority 0; policy drop; }}": (
            "the chain ingress is not hooked in"
        ),
        f"flush chain {name} ingress; delete chain {name} ingress;"
        f"add chain {name} ingress {{ type filter hook prerouting priority 0; policy accept; }}": (
            "the chain ingress is not hooked in"
        ),
        f"add chain {name} ingress {{ policy accept; }}": "the chain ingress is not hooked in",
        f"add chain {name} extra {{ type filter hook input priority 0; policy drop; }}": (
            "there is a foreign chain extra"
        ),
        f"flush chain {name} ingress; flush chain {name} postrouting; delete set {name} lease": (
            "the set lease is gone"
        ),
    }
    for command, fault in faults.items():
        await guard.admit(wanted)
        await stand.nft(command)
        contents = await guard.read()
        assert contents is not None
        assert any(line.startswith(fault) for line in contents.faults), (command, contents.faults)
        repair = compare(wanted, contents, lease_demanded=True)
        assert (repair.rebuild, repair.admit, repair.dismiss) == (True, {}, ())
        assert await guard.raise_({}, LONG) == {}
        contents = await guard.read()
        assert contents is not None
        assert differences(wanted, contents) == [], command
        assert contents.lease is not None
        assert await stand.answers(ALICE4, GATEWAY4)
        assert not await stand.answers(BOB4, GATEWAY4)


@behaviours.add
async def a_set_that_somebody_made_otherwise_costs_the_table(stand: Stand) -> None:
    """A set of sessions without a timeout of its own would not fail closed."""
    guard = stand.firewall()
    wanted = {ALICE: session(LONG, ALICE4), ROUTER: exempt("10.8.9.0/24")}
    await guard.raise_(wanted, LONG)
    name = f"inet {table_name(stand.name)}"
    chains = "; ".join(f"flush chain {name} {way}_session" for way in ("from", "to"))
    await stand.nft(
        f"{chains}; delete set {name} session4_32;"
        f"add set {name} session4_32 {{ type ipv4_addr; flags timeout; }};"
        f"add element {name} session4_32 {{ {BOB4} }}"
    )
    contents = await guard.read()
    assert contents is not None
    assert "the set session4_32 is not as the agent made it" in contents.faults
    assert await guard.raise_(wanted, LONG) == {}
    assert (contents := await guard.read()) is not None
    assert differences(wanted, contents) == []
    assert not await stand.answers(BOB4, GATEWAY4)


@behaviours.add
async def elements_that_others_change_are_repaired(stand: Stand) -> None:
    guard = stand.firewall()
    wanted = {
        ALICE: session(40, ALICE4, "10.8.5.0/24"),
        BOB: session(40, BOB4),
        ROUTER: exempt("10.8.9.0/24"),
    }
    await guard.raise_(wanted, LONG)
    name = f"inet {table_name(stand.name)}"
    await stand.nft(
        f"delete element {name} session4_32 {{ {ALICE4} }};"
        f"add element {name} session4_32 {{ {ALICE4} timeout 3000s, 10.8.66.6 timeout 3000s }};"
        f"delete element {name} barred4_32 {{ {BOB4} }}; add element {name} barred4_32 {{ 10.8.66.7 }};"
        f'flush set {name} exempt4_24; add element {name} exempt4_32 {{ 10.8.66.8 comment "mine" }}'
    )
    repair = compare(wanted, await guard.read(), lease_demanded=True)
    assert set(repair.admit) == {ALICE, BOB, ROUTER}
    assert {str(prefix) for prefix in repair.dismiss} == {"10.8.66.6/32", "10.8.66.7/32", "10.8.66.8/32"}
    assert not repair.rebuild
    await guard.dismiss(repair.dismiss)
    await guard.admit(repair.admit)
    assert differences(wanted, await guard.read()) == []
