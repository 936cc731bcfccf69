"""The package's life on a gateway: installed, upgraded under traffic, removed, installed again, purged.

In their order: each test leaves what the next begins with.
"""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import package
from tests.support.client import Client
from tests.support.ledger import Seen
from tests.support.package import LIB
from tests.support.scenarios import connect, ping
from tests.support.site import until
from tests.support.unit import ETC, INTERFACE, STATE, STATES, UNIT, UnitSite, sh

# dpkg takes its time under emulation.
pytestmark = [pytest.mark.systemd, pytest.mark.lab, pytest.mark.package, pytest.mark.timeout(900)]

PINGS = 0.02
USERSPACE = f"wg-agent-userspace@{INTERFACE}"
WANTED = Path(f"/etc/systemd/system/multi-user.target.wants/{UNIT}")


class PackageSite(UnitSite):
    """A site whose agent was installed by dpkg."""

    def install(self) -> None:
        # Packages may start and stop services, which they may not in a container, whose files these may be;
        # and going through all man pages of the host would take minutes.
        Path("/usr/sbin/policy-rc.d").unlink(missing_ok=True)
        Path("/var/lib/man-db/auto-update").unlink(missing_ok=True)
        assert package.now().exists(), "run .ci/deb: it says why there is no package"
        dpkg("--install", str(package.now()))

    def uninstall(self) -> None:
        dpkg("--purge", "wg-agent")


def dpkg(*arguments: str) -> str:
    """Run dpkg; what it and the package's scripts printed."""
    done = sh("dpkg", *arguments, timeout=600)
    return done.stdout + done.stderr


def log() -> str:
    """What the host's log has of the agent and of dpkg's scripts, by the microsecond."""
    return sh("journalctl", "--no-pager", "--output=short-precise", "--utc", "--lines=200").stdout


@dataclass
class Life:
    """The site and its one client, who has a session for good."""

    site: PackageSite
    client: Client


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    folder = Path("/run/lab-package")
    folder.mkdir()
    with PackageSite(folder) as site:
        [client] = site.add_clients(1)
        site.attach(client)
        yield Life(site, client)


def digest(tree: Path) -> str:
    """Return one hash for all files below a folder and their names."""
    total = hashlib.sha256()
    for file in sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()):
        total.update(str(file.relative_to(tree)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def tree_of(pid: int) -> Path:
    """Return the folder that a running agent imports from."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    [tree] = {Path(*Path(line.split()[-1]).parts[:6]) for line in lines if f" {LIB}/" in line}
    return tree


def test_installed_configured_and_enabled_it_lets_a_client_in(life: Life) -> None:
    site = life.site
    assert not site.unit.pid

    said = sh("systemctl", "enable", "--now", f"wg-agent@{INTERFACE}")

    assert str(WANTED) in said.stderr
    connect(site, life.client)
    shown = sh("wg-agent", "status", "-i", INTERFACE).stdout
    assert all(count in shown for count in ("1 up", "0 waiting", "0 refused"))
    assert tree_of(site.unit.pid) == (LIB / "current").resolve()
    assert oct(ETC.stat().st_mode) == oct(0o40711)
    assert sh("dpkg", "--verify", "wg-agent").stdout == ""


def test_each_interface_has_a_user_of_its_own(life: Life) -> None:
    other = "wg-agent@wg1.service"
    drop_in = Path(f"/run/systemd/system/{other}.d/stand-in.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nType=exec\nExecStart=\nExecStart=sleep 1000\nWatchdogSec=0\n")
    sh("systemctl", "daemon-reload")
    try:
        sh("systemctl", "start", other)
        theirs = Path(f"/proc/{sh('systemctl', 'show', '-p', 'MainPID', '--value', other).stdout.strip()}")
        ours = Path(f"/proc/{life.site.unit.pid}")
        assert len({0, theirs.stat().st_uid, ours.stat().st_uid}) == 3
        assert {STATE.stat().st_uid, (STATE.parent / "wg1").stat().st_uid} == {
            ours.stat().st_uid,
            theirs.stat().st_uid,
        }
    finally:
        sh("systemctl", "stop", other)
        shutil.rmtree(drop_in.parent)
        for states in STATES[1::2]:
            shutil.rmtree(states / "wg1", ignore_errors=True)
        sh("systemctl", "daemon-reload")


@pytest.mark.reliability(
    "the package upgraded, the agent killed between unpacking and configuring",
    "until it is configured what runs and what is started is the old version, whole; tunnels lose nothing",
)
def test_an_upgrade_under_traffic_loses_no_ping_and_mixes_no_versions(life: Life, seen: Seen) -> None:
    site, unit = life.site, life.site.unit
    before, version = unit.pid, sh("wg-agent", "--version").stdout
    tree = tree_of(before)
    files = digest(tree)
    with ping(life.client, PINGS) as kept:
        kept.wait_reply()
        dpkg("--unpack", str(package.later()))
        assert digest(tree) == files
        assert sh("wg-agent", "--version").stdout == version
        os.kill(before, signal.SIGKILL)
        unit.wait_ready(before)
        between = unit.pid
        assert tree_of(between) == tree
        began = time.monotonic()
        said = dpkg("--configure", "wg-agent")
        took = time.monotonic() - began
        kept.wait_reply()
    assert kept.lost == 0, (kept.losses(), log())
    assert "not every instance" not in said
    assert unit.pid not in {0, before, between}
    assert f'version="{package.LATER}"' in site.metrics()
    assert sh("wg-agent", "--version").stdout == f"wg-agent {package.LATER}\n"
    adopted(life)
    assert (tree_of(unit.pid), tree.exists()) == ((LIB / "current").resolve(), False)
    assert list((LIB / "live").iterdir()) == [tree_of(unit.pid)]
    assert sh("dpkg", "--verify", "wg-agent").stdout == ""
    seen(lost=kept.lost, note=f"{kept.received} pings, the restart took {took:.0f} s")


def adopted(life: Life) -> None:
    """The client's session is the one that it was granted first."""
    [session] = life.client.sessions
    assert (life.site.peer(life.client)["state"], life.site.peer(life.client)["session_id"]) == (
        "up",
        session,
    )


@pytest.mark.reliability(
    "the package removed, and installed again",
    "the unit is gone and tunnels stay; then the agent adopts them",
)
def test_removal_leaves_tunnels_and_state_and_installing_it_again_takes_them_over(
    life: Life, seen: Seen
) -> None:
    site = life.site
    with ping(life.client, PINGS) as kept:
        kept.wait_reply()
        said = dpkg("--remove", "wg-agent")
        assert said.count(f"{INTERFACE} stays up, but nobody is let in any more") == 1
        kept.wait_reply()
        assert sh("systemctl", "show", "-p", "LoadState,ActiveState", "--value", UNIT).stdout.split() == [
            "not-found",
            "inactive",
        ]
        assert not any(Path(path).exists() for path in (LIB, "/usr/bin/wg-agent"))
        assert (site.config.exists(), (STATE / "journal.sqlite").exists(), WANTED.is_symlink()) == (True,) * 3

        dpkg("--install", str(package.later()))
        sh("systemctl", "start", UNIT)  # as at the next boot: it is still enabled
        kept.wait_reply()
    assert kept.lost == 0, kept.losses()
    adopted(life)
    seen(lost=kept.lost, note=f"{kept.received} pings")


@pytest.mark.reliability(
    "the agent's unit restarted where WireGuard is a userspace program (the packaged units)",
    "the program is a unit of its own, and tunnels lose nothing",
)
def test_userspace_wireguard_is_a_unit_of_its_own_that_the_hardened_agent_asks_for(
    life: Life, seen: Seen
) -> None:
    site, unit = life.site, life.site.unit
    Path("/dev/net/tun").chmod(0o666)  # as udev leaves it, which does not run here
    unit.ctl("stop")
    sh("wg-agent", "purge", "-i", INTERFACE)
    site.configure('[interface]\nbackend = "userspace"\n')
    unit.ctl("start")
    life.client.sessions.clear()
    connect(site, life.client)
    with ping(life.client, PINGS) as kept:
        kept.wait_reply()
        program = main_pid(USERSPACE)
        assert Path(f"/proc/{program}/comm").read_text() == "wireguard-go\n"
        assert Path(f"/proc/{program}").stat().st_uid == Path(f"/proc/{unit.pid}").stat().st_uid != 0
        unit.ctl("restart")
        kept.wait_reply()
    assert (kept.lost, main_pid(USERSPACE)) == (0, program)
    adopted(life)
    assert "WireGuard runs inside" not in unit.journal()
    security = sh("systemd-analyze", "security", "--no-pager", f"{USERSPACE}.service").stdout
    seen(lost=kept.lost, note=f"{security.splitlines()[-1].strip()}")


def test_purging_leaves_nothing_of_ours(life: Life) -> None:
    site = life.site
    program = main_pid(USERSPACE)
    # Beside the program's interface one of the kernel's that an agent has left, and somebody else's.
    (STATE.parent / "wg9").mkdir()
    (STATE.parent / "wg9/journal.sqlite").touch()
    for name in ("wg9", "bystander"):
        sh("ip", "link", "add", name, "type", "wireguard")

    files = sh("dpkg", "--listfiles", "wg-agent").stdout.split()

    said = dpkg("--purge", "wg-agent")

    assert "not empty" not in said
    # Folders that other packages have, too, stay.
    assert [file for file in files if "wg-agent" in file and os.path.lexists(file)] == []
    assert set(site.gateway.links()) & {INTERFACE, "wg9", "bystander"} == {"bystander"}
    until(lambda: not Path(f"/proc/{program}").exists(), what="the program's end")
    assert not os.path.lexists(f"/run/wireguard/{INTERFACE}.sock")
    sh("ip", "link", "delete", "bystander")
    assert "wg_agent" not in site.guarded()
    assert [path for path in (ETC, LIB, *STATES) if os.path.lexists(path)] == []
    names = ["find", "/etc", "/run", "/usr/lib", "/var/lib", "-maxdepth", "3", "-name", "*wg-agent*"]
    drop_ins = Path(f"/etc/systemd/system/{UNIT}.d")  # the operator's own
    found = {Path(path) for path in sh(*names).stdout.split()}
    assert {path for path in found if not path.name.startswith("wg-agent-lab")} <= {drop_ins}
    assert sh("systemctl", "list-units", "--all", "--plain", "--no-legend", "wg-agent*").stdout == ""
    assert sh("dpkg-query", "-W", "wg-agent", check=False).returncode == 1


def main_pid(unit: str) -> int:
    """Return the process of a unit, 0 if it has none."""
    return int(sh("systemctl", "show", "-p", "MainPID", "--value", f"{unit}.service").stdout)
