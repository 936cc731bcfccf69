"""Access rules over a restart and a reboot: what is kept of them, and what comes of it."""

import asyncio
import socket
import stat

import pytest
from structlog.testing import capture_logs

from agent.acl import Acl, SnatBinding, Verdict
from agent.encoding import parse_prefix
from agent.errors import GuardError
from tests.firewall.rules import SHUT, addresses, allow, filled, ports, shut_but_for
from tests.firewall.scene import PORTS, PUBLIC4, WEB, Balky, Scene, kept, until
from tests.firewall.stand import ALICE4, in_gateway

pytestmark = pytest.mark.netns


@in_gateway
async def test_after_a_reboot_the_rules_stand_before_core_is_there(scene: Scene) -> None:
    acl = Acl(
        Verdict.DROP,
        (allow(ports=ports(WEB), comment="Büro"), *filled(range(3))),
        (SnatBinding(5, addresses(ALICE4), socket.inet_aton(PUBLIC4)),),
    )
    await scene.access().put(acl)
    table = await scene.table()
    await scene.nft("flush", "ruleset")
    rules = scene.access()
    await rules.start()
    assert await scene.table() == table
    assert await scene.opened() == set()  # their answers go to the public address
    await rules.put(SHUT)
    await scene.nft("flush", "ruleset")
    await scene.access().start()
    assert await scene.opened() == set()


@in_gateway
async def test_the_file_is_its_owners_alone_and_goes_with_the_rules(scene: Scene) -> None:
    rules = scene.access()
    await rules.put(SHUT)
    assert stat.S_IMODE(scene.file.stat().st_mode) == 0o600
    assert [path.name for path in scene.file.parent.iterdir()] == ["acl.json"]
    await rules.put(None)
    assert not scene.file.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"null",
        b'{"acl":null}x',
        b'{"acl":{"default":"perhaps"},"version":1}',
        b'{"acl":{"default":"accept"},"version":2}',
        b'{"acl":{"default":"accept","rules":[{"id":1,"version":4,"verdict":"accept","ports":[[9,8]]}]},"version":1}',
        b'{"acl":null,"networks":[["CggAAA==",-1]],"version":1}',
        b'{"acl":null,"networks":[["CggA",16]],"version":1}',
    ],
)
@in_gateway
async def test_a_file_that_can_not_be_read_closes_the_way_until_core_says_otherwise(
    scene: Scene, content: bytes
) -> None:
    scene.file.write_bytes(content)
    rules = scene.access()
    with capture_logs() as logs:
        await rules.start()
    assert ["can't be read" in entry["event"] for entry in logs] == [True]
    assert await scene.opened() == set()
    assert scene.file.read_bytes() == content
    await rules.put(None)
    assert await scene.opened() == set(PORTS)
    assert not scene.file.exists()


@in_gateway
async def test_what_needs_no_table_does_not_touch_nftables(scene: Scene) -> None:
    balky = Balky()
    rules = scene.access(nft=balky)
    await rules.start()
    async with kept(rules):
        rules.refresh()
        await asyncio.sleep(0.7)
        assert rules._watch is None
    assert balky.ran == 0
    assert not scene.file.exists()


@in_gateway
async def test_a_table_that_is_no_longer_wanted_goes_at_the_next_start(scene: Scene) -> None:
    await scene.access(masquerade=True).start()
    assert "masquerade" in await scene.table()
    await scene.access().start()
    assert await scene.table() == ""
    assert not scene.file.exists()


@in_gateway
async def test_with_access_rules_off_cores_are_ignored_and_forgotten(scene: Scene) -> None:
    await scene.access().put(SHUT)
    rules = scene.access(enabled=False, masquerade=True)
    await rules.start()
    with capture_logs() as logs:
        await rules.put(SHUT)
        await rules.put(SHUT)
    assert [entry["event"] for entry in logs] == ["core's access rules are ignored"]
    assert await scene.opened() == set(PORTS)
    assert await scene.seen_as(ALICE4) == "192.0.2.1"
    await scene.access().start()
    assert await scene.opened() == set(PORTS)


@in_gateway
async def test_rules_that_can_not_be_kept_are_in_force_and_told_once_and_kept_later(scene: Scene) -> None:
    async def is_kept(scene: Scene) -> bool:
        return scene.file.exists()

    (scene.file.parent / "acl.json.new").mkdir()
    rules = scene.access()
    with capture_logs() as logs:
        for _ in range(2):
            await rules.put(shut_but_for(allow(ports=ports(WEB))))
    assert ["not kept" in entry["event"] for entry in logs] == [True]
    assert await scene.opened() == {WEB}
    assert not scene.file.exists()
    (scene.file.parent / "acl.json.new").rmdir()
    async with kept(rules):
        rules._awake.set()
        await until(lambda: is_kept(scene))


@in_gateway
async def test_a_restart_goes_on_masquerading_before_the_networks_are_known(scene: Scene) -> None:
    async def changed(scene: Scene) -> bool:
        return "ip saddr 10.77.0.0/24 masquerade" in await scene.table()

    await scene.access(masquerade=True).start()
    before = await scene.nft("-a", "list", "ruleset")
    for networks in ([parse_prefix("10.77.0.0/24")], None):
        scene.networks = networks
        await scene.access(masquerade=True).start()
        assert await scene.nft("-a", "list", "ruleset") == before
    rules = scene.access(masquerade=True)
    await rules.start()
    async with kept(rules):
        rules.refresh()
        await asyncio.sleep(0.3)
        assert await scene.nft("-a", "list", "ruleset") == before
        scene.networks = [parse_prefix("10.77.0.0/24")]
        rules.refresh()
        await until(lambda: changed(scene))
    scene.networks = None
    await scene.nft("flush", "ruleset")
    await scene.access(masquerade=True).start()
    assert await changed(scene)


@in_gateway
async def test_a_start_that_fails_is_made_good(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.aclfirewall._RETRY", 0.1)

    await scene.access().put(SHUT)
    await scene.nft("flush", "ruleset")
    balky = Balky()
    balky.refuses = "jump"
    rules = scene.access(nft=balky)
    with pytest.raises(GuardError):
        await rules.start()
    async with kept(rules):
        balky.refuses = ""
        await until(scene.is_judged)
    assert await scene.opened() == set()


@in_gateway
async def test_a_put_that_nobody_waits_for_any_more_is_done_to_its_end(scene: Scene) -> None:
    balky = Balky()
    rules = scene.access(nft=balky)
    await rules.put(SHUT)
    balky.takes = 0.2
    task = asyncio.create_task(rules.put(shut_but_for(allow(ports=ports(WEB)))))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await scene.opened() == set()
    async with kept(rules):
        await asyncio.sleep(1.5)
        assert await scene.opened() == {WEB}
    await scene.nft("flush", "ruleset")
    await scene.access().start()
    assert await scene.opened() == {WEB}
