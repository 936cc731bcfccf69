"""Access rules that somebody else has changed, or that can't be put in force."""

import asyncio
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from agent.acl import PortRange
from agent.aclruleset import acl_table
from agent.errors import GuardError
from tests.firewall.rules import BOTH, OPEN, SHUT, addresses, allow, ports, shut_but_for
from tests.firewall.scene import SSH, WEB, Balky, Scene, kept, until
from tests.firewall.stand import ALICE4, BOB4, in_gateway

pytestmark = pytest.mark.netns


@pytest.mark.parametrize(
    "command",
    [
        "delete table {table}",
        "flush ruleset",
        "flush chain {table} forward_0",
        "flush chain {table} access_a",
        "flush table {table}",
        "add table {table} {{ flags dormant; }}",
        "insert rule {table} access_a accept",
        "insert rule {table} forward_0 accept",
        "add chain {table} theirs; add rule {table} theirs drop",
        "flush chain {table} postrouting; delete chain {table} postrouting",
    ],
)
@in_gateway
async def test_what_somebody_does_to_the_table_is_put_right_at_once_and_told(
    scene: Scene, command: str
) -> None:
    async def is_whole(scene: Scene, whole: str) -> bool:
        now = (await scene.table()).replace("_a ", "_b ")
        return sorted(undigested(now)) == sorted(undigested(whole))

    def undigested(table: str) -> Iterator[str]:
        for line in table.splitlines():
            yield line.partition(' comment "wg-agent')[0].strip()

    rules = scene.access(masquerade=True)
    await rules.put(shut_but_for(allow(ports=ports(WEB), sources=addresses(ALICE4, BOB4))))
    whole = (await scene.table()).replace("_a ", "_b ")
    async with kept(rules):
        with capture_logs() as logs:
            await scene.nft(command.format(table=acl_table(scene.name)))
            took = await until(lambda: is_whole(scene, whole))
            assert took < 2
            await asyncio.sleep(0.1)
        told = [entry for entry in logs if "somebody has changed" in entry["event"]]
        assert len(told) == 1
        assert told[0]["changes"]
        assert await scene.opened() == {WEB}


@in_gateway
async def test_what_the_agent_does_itself_is_no_drift(scene: Scene) -> None:
    rules = scene.access(masquerade=True)
    await rules.start()
    async with kept(rules):
        with capture_logs() as logs:
            for acl in (SHUT, None, *BOTH["the default allows"], OPEN):
                await rules.put(acl)
                await asyncio.sleep(0.7)
            assert logs == []


@in_gateway
async def test_a_long_change_of_the_guards_is_not_listened_to_and_followed_by_a_look(scene: Scene) -> None:
    guard, rules = scene.firewall(), scene.access()
    await guard.raise_({}, None)
    listener = asyncio.create_task(guard.disturbed())
    await asyncio.sleep(0.1)
    await rules.put(SHUT)
    async with kept(rules):
        guard.mute()
        await scene.nft("delete", "table", *acl_table(scene.name).split())
        await asyncio.sleep(0.7)
        assert await scene.table() == ""
        await guard.unmute()
        await until(scene.table)
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)


@in_gateway
async def test_without_word_of_changes_it_looks_more_often(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoWatch:
        def __init__(self, *_: object) -> None:
            raise GuardError("notifications can't be had")

    monkeypatch.setattr("agent.aclfirewall.Watch", NoWatch)
    monkeypatch.setattr("agent.aclfirewall._LOOK_DEAF", 0.3)

    rules = scene.access()
    await rules.put(SHUT)
    with capture_logs() as logs:
        async with kept(rules):
            await asyncio.sleep(1)
            await scene.nft("delete", "table", *acl_table(scene.name).split())
            await until(scene.table)
    assert [entry["event"] for entry in logs] == [
        "changes of the access rules are found at looks only",
        "somebody has changed the table of access rules: it is put back",
    ]


@pytest.mark.parametrize("refuses", ["add chain", "jump", "list"])
@in_gateway
async def test_rules_that_can_not_be_put_in_force_leave_those_before(scene: Scene, refuses: str) -> None:
    balky = Balky()
    rules = scene.access(nft=balky)
    await rules.put(shut_but_for(allow(ports=ports(WEB))))
    kept_ = scene.file.read_bytes()
    balky.refuses = refuses
    with pytest.raises(GuardError, match="Cannot allocate memory"):
        await rules.put(shut_but_for(allow(ports=ports(SSH))))
    assert await scene.opened() == {WEB}
    assert scene.file.read_bytes() == kept_
    balky.refuses = ""
    await rules.put(shut_but_for(allow(ports=ports(SSH))))
    assert await scene.opened() == {SSH}


@in_gateway
async def test_rules_that_are_none_are_refused_and_leave_those_before(scene: Scene) -> None:
    rules = scene.access()
    await rules.put(shut_but_for(allow(ports=ports(WEB))))
    with pytest.raises(GuardError, match="a range ends before it begins"):
        await rules.put(shut_but_for(allow(ports=(PortRange(2, 1),))))
    assert await scene.opened() == {WEB}


@in_gateway
async def test_a_repair_that_fails_is_told_once_and_tried_until_it_succeeds(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.aclfirewall._RETRY", 0.1)

    balky = Balky()
    rules = scene.access(nft=balky)
    await rules.put(SHUT)
    async with kept(rules):
        with capture_logs() as logs:
            balky.refuses = "jump"
            await scene.nft("delete", "table", *acl_table(scene.name).split())
            await asyncio.sleep(1)
            balky.refuses = ""
            await until(scene.is_judged)
            await asyncio.sleep(0.1)
    assert [entry["event"] for entry in logs] == [
        "access rules can't be put in force",
        "access rules are in force again",
        "somebody has changed the table of access rules: it is put back",
    ]
