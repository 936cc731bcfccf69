from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.__main__ import main
from agent.folders import claim_state
from agent.journal import Journal
from agent.lock import InterfaceLock
from tests.commands.parts import wg_agent, write_config
from tests.support.netns import Namespace, Network, interface_name


@pytest.fixture
def gateway() -> Iterator[Namespace]:
    with Network() as net:
        yield net.namespace("gateway")


def lived_in(folder: Path) -> None:
    """What an agent leaves behind, and a file of somebody else's."""
    state = folder / "state"
    state.mkdir(mode=0o700)
    journal = Journal(state, "boot")
    journal.load()
    journal.close()
    (state / "journal.sqlite.unreadable-1").touch()
    (state / "acl.json").touch()
    (state / "acl.json.new").touch()
    (state / "private.key").write_text("key")
    (state / "notes.txt").touch()


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "state").iterdir()}


def test_beside_an_agent_it_ends_with_1_and_removes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, name="wgnone")
    lived_in(tmp_path)
    before = names(tmp_path)

    with InterfaceLock(tmp_path / "run", "wgnone"):
        done = wg_agent("purge", "-c", path)

    assert done.returncode == 1
    assert "another agent" in done.stderr
    assert "stop that one first" in done.stderr
    assert names(tmp_path) == before


def test_what_was_remembered_goes_and_the_private_key_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path, name="wgnone"))
    lived_in(tmp_path)
    key = tmp_path / "state" / "private.key"

    assert main(["purge", "-c", path]) == 0
    out = capsys.readouterr().out
    assert "wgnone: there was no such interface" in out
    assert f"{key}: kept, the gateway's private key (remove it with --key)" in out
    assert names(tmp_path) == {"private.key", "notes.txt"}

    assert main(["purge", "-c", path, "--key", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "interface": "wgnone",
        "interface_removed": False,
        "table_removed": False,
        "removed": [str(key)],
        "kept": [],
        "failed": [],
    }
    assert names(tmp_path) == {"notes.txt"}


def test_another_interfaces_state_is_refused_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path, name="wgnone"))
    lived_in(tmp_path)
    claim_state(tmp_path / "state", "wgother")
    before = names(tmp_path)

    assert main(["purge", "-c", path, "--key"]) == 2

    assert "belongs to the interface 'wgother', and this is the agent of wgnone" in capsys.readouterr().err
    assert names(tmp_path) == before


def test_a_folder_is_anybodys_again_once_the_key_has_gone_too(tmp_path: Path) -> None:
    path = str(write_config(tmp_path, name="wgnone"))
    lived_in(tmp_path)
    claim_state(tmp_path / "state", "wgnone")

    assert main(["purge", "-c", path]) == 0
    assert names(tmp_path) == {"private.key", "notes.txt", "interface"}
    assert main(["purge", "-c", path, "--key"]) == 0
    assert names(tmp_path) == {"notes.txt"}


@pytest.mark.userspace
def test_the_interface_goes_with_its_peers(tmp_path: Path, gateway: Namespace) -> None:
    name = interface_name()
    gateway.run("wireguard-go", name)
    gateway.run("wg", "set", name, "peer", "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=")

    done = wg_agent("purge", "-c", write_config(tmp_path, name=name), "--json", through=gateway.argv())

    assert (done.returncode, json.loads(done.stdout)["interface_removed"]) == (0, True)
    assert name not in gateway.links()
    deadline = time.monotonic() + 5
    while gateway.pids() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gateway.pids() == []


@pytest.mark.userspace
def test_the_operators_commands_run_around_it_and_one_that_fails_keeps_nothing_up(
    tmp_path: Path, gateway: Namespace
) -> None:
    name = interface_name()
    gateway.run("wireguard-go", name)
    sees = f"ls /sys/class/net >> {tmp_path}/"
    hooks = {
        "pre_down": [["sh", "-c", f"{sees}before"], ["false"]],
        "post_down": [["sh", "-c", f"{sees}after"]],
    }
    lists = "".join(f"{when} = {json.dumps(commands)}\n" for when, commands in hooks.items())
    path = write_config(tmp_path, name=name, more=f"[hooks]\n{lists}")

    done = wg_agent("purge", "-c", path, through=gateway.argv())

    assert done.returncode == 1
    assert f"{name}: removed" in done.stdout
    assert "hooks.pre_down, command 2 (false) ended with status 1" in done.stdout
    assert name in (tmp_path / "before").read_text().split()
    assert name not in (tmp_path / "after").read_text().split()

    # There is none any more.
    again = wg_agent("purge", "-c", path, "--json", through=gateway.argv())
    assert (again.returncode, json.loads(again.stdout)["failed"]) == (0, [])
    assert len((tmp_path / "after").read_text().split()) == 1


@pytest.mark.netns
def test_an_interface_that_is_no_wireguard_stays_and_so_does_the_journal(
    tmp_path: Path, gateway: Namespace
) -> None:
    gateway.ip("link", "add", "wg0", "type", "veth")
    path = write_config(tmp_path)
    lived_in(tmp_path)
    before = names(tmp_path)

    done = wg_agent("purge", "-c", path, through=gateway.argv())

    assert done.returncode == 1
    assert "is not a WireGuard interface" in done.stderr
    assert "wg0" in gateway.links()
    assert names(tmp_path) == before


@pytest.mark.netns
def test_the_table_of_access_rules_goes_and_other_tables_stay(tmp_path: Path, gateway: Namespace) -> None:
    path = write_config(tmp_path)
    owner = '{ comment "made by wg-agent, which owns this table"; }'
    gateway.run("nft", f"add table inet wg_agent.acl_wg0 {owner}; add table inet wg_agent.acl_wg1 {owner}")

    done = wg_agent("purge", "-c", path, through=gateway.argv())

    assert done.returncode == 0
    assert "the access rules of wg0: removed from nftables" in done.stdout
    assert "the guard" not in done.stdout
    assert gateway.run("nft", "list", "tables").stdout == "table inet wg_agent.acl_wg1\n"
