"""The operator's commands, run by the daemon around the life of a real interface."""

import json
import sys
import time
from pathlib import Path

import pytest

from tests.support.site import Site, until

pytestmark = pytest.mark.userspace


def hooks(folder: Path, **more: object) -> str:
    """Each command writes when it ran, and how the interface was then."""
    sees = "echo {when} $(cat /sys/class/net/%i/flags 2>/dev/null || echo none) >> {folder}/ran"
    lists = {
        when: [["sh", "-c", sees.format(when=when, folder=folder)]]
        for when in ("pre_up", "post_up", "pre_down", "post_down")
    }
    return "[hooks]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in {**lists, **more}.items())


def ran(folder: Path) -> list[str]:
    """What ran, each with ``up``, ``down`` or ``gone`` for the interface."""
    path = folder / "ran"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [f"{when} {'gone' if f == 'none' else 'up' if int(f, 16) & 1 else 'down'}" for when, f in lines]


def is_up(site: Site) -> bool:
    flags = site.gateway.run("cat", f"/sys/class/net/{site.interface}/flags").stdout
    return bool(int(flags, 16) & 1)


def readiness(site: Site) -> str:
    """Status and body of /readyz."""
    fetch = (
        "import http.client as h; c = h.HTTPConnection('127.0.0.1', 9586, timeout=5); "
        "c.request('GET', '/readyz'); r = c.getresponse(); print(r.status, r.read().decode())"
    )
    return site.gateway.run("python3", "-c", fetch).stdout.strip()


def test_commands_run_around_the_life_of_the_interface_and_not_around_the_agents(tmp_path: Path) -> None:
    with Site(tmp_path, agent=hooks(tmp_path)) as site:
        site.start_agent()
        came_up = ["pre_up down", "post_up up"]
        until(lambda: ran(tmp_path) == came_up, 5)
        site.stop_agent()
        site.start_agent()
        site.kill_agent()
        site.start_agent()
        assert ran(tmp_path) == came_up

        site.gateway.ip("link", "set", site.interface, "down")
        until(lambda: "link_down" in str(site.logged("drift")), 10)
        until(lambda: is_up(site), 10)
        assert ran(tmp_path) == came_up

        site.gateway.ip("link", "delete", site.interface)
        made_again = [*came_up, "post_down down", *came_up]
        until(lambda: ran(tmp_path) == made_again, 20, "the commands of the interface that is made again")

        site.stop_agent()
        site.gateway.run(sys.executable, "-m", "agent", "purge", "-c", str(site.config))
        assert ran(tmp_path) == [*made_again, "pre_down up", "post_down gone"]
        assert not site.logged("command failed")


def test_no_session_waits_for_a_command_and_the_interface_does(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    slow = [
        ["sh", "-c", f"test -e {ready} && exit; sleep 60"],
        ["sh", "-c", f"echo pre_up 0 >> {tmp_path}/ran"],
    ]
    with Site(tmp_path, agent=hooks(tmp_path, pre_up=slow, timeout=6)) as site:
        one, other = site.add_clients(2)
        site.start_agent()
        began = time.monotonic()
        site.grant(one, lifetime=2)
        site.grant(other)
        assert set(site.shown()) == {one.public_key, other.public_key}
        until(lambda: set(site.shown()) == {other.public_key}, 4, "the end of the session")
        assert ran(tmp_path) == []
        assert not site.status()["expiry_late"]
        assert time.monotonic() - began < 6, "it is not known whether the command was waited for"

        until(lambda: site.logged("command failed"), 10)
        assert site.logged("command failed")[0]["reason"] == "took longer than 6 s and was killed"
        why = until(lambda: site.status()["device_error"], 5)
        assert f"{site.interface} stays down: hooks.pre_up, command 1 (sh) took longer than 6 s" in why
        assert readiness(site) == "503 the interface is down"
        ready.touch()
        until(lambda: ran(tmp_path) == ["pre_up down", "post_up up"], 15, "the second attempt")
        until(lambda: not site.status()["device_error"], 5)
        assert readiness(site).startswith("200")
        assert not site.logged("drift")
        assert not site.logged("slow")
