"""The agent as an operator has it: its unit as installed, under systemd, with live tunnels.

One site for all tests, since a start of the agent takes 10 to 20 s under emulation: each leaves the unit
running for the next, but for the last ones.
"""

import asyncio
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from agent.lock import InterfaceLock
from tests.support.defguard_core import SecondGeneration
from tests.support.ledger import FULL, Seen
from tests.support.scenarios import connect, ping
from tests.support.site import until
from tests.support.unit import INTERFACE, RUNTIME, START, STATE, UNIT, Gateway, UnitSite, overrun, sh

pytestmark = [pytest.mark.systemd, pytest.mark.lab]

ROUNDS = 5 if FULL else 1
PINGS = 0.02
KEY = STATE / "private.key"
LOCK = RUNTIME / f"{INTERFACE}.lock"
ONLY_NET_ADMIN = f"{1 << 12:016x}"  # linux/capability.h
DYNAMIC_USERS = range(61184, 65520)  # systemd.exec(5)
WATCHDOG = 30  # the unit's WatchdogSec
COMMANDS = [
    ["ip", "rule", "add", "fwmark", "77", "table", "77"],
    ["ip", "route", "add", "192.0.2.0/24", "dev", "%i", "table", "77"],
    ["nft", "list", "ruleset"],
    ["wg", "show", "%i"],
    ["touch", "/tmp/private"],
    ["touch", "/etc/wg-agent/x"],
    ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"],
    ["ls", "/home"],
    ["setpriv", "--reuid=0", "true"],
]
"""Commands of the operator's, of which the unit lets the first ``MAY`` do what they mean to."""
MAY = 5


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    folder = Path("/run/lab-core")  # where the unit sees it, other than the tests' own /tmp
    folder.mkdir()
    with UnitSite(folder) as site:
        staying, ending = site.add_clients(2)
        site.unit.drop_in(
            "hooks", f"[Service]\nEnvironment='WG_AGENT_HOOKS__POST_UP={json.dumps(COMMANDS)}'\n"
        )
        began = time.monotonic()
        with subprocess.Popen(["systemctl", "start", UNIT]) as start:
            for client in (staying, ending):
                site.attach(client)
        assert start.returncode == 0
        started = time.monotonic() - began
        # READY was told, and what core lists was there by then.
        assert [peer["state"] for peer in site.status()["peers"]] == ["waiting", "waiting"]
        connect(site, staying)
        yield Gateway(site, staying, ending, started)


@pytest.mark.reliability(
    "the agent taken over by an attacker (its unit as installed)",
    "CAP_NET_ADMIN is all that it holds, and nobody else reads its secrets",
)
def test_the_unit_has_one_capability_and_its_secrets_to_itself(gateway: Gateway, seen: Seen) -> None:
    unit = gateway.site.unit
    lines = Path(f"/proc/{unit.pid}/status").read_text().splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert status[capabilities] == ONLY_NET_ADMIN
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    [user] = set(status["Uid"].split())
    assert int(user) in DYNAMIC_USERS

    credentials = Path("/run/credentials") / UNIT
    for folder in (STATE, RUNTIME):
        assert (stat.S_IMODE(folder.stat().st_mode), folder.stat().st_uid) == (0o700, int(user))
    for file in (KEY, STATE / "journal.sqlite", RUNTIME / f"{INTERFACE}.sock", LOCK):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    for secret in (credentials / "core.token", KEY, gateway.site.token):
        assert secret.read_bytes()
        assert sh(*nobody, "cat", str(secret), check=False).returncode == 1

    judged = sh("systemd-analyze", "security", "--no-pager", UNIT).stdout
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", judged)
    assert found
    assert float(found[1]) <= 1.8
    seen(note=f"exposure {found[1]} by systemd-analyze security; ready after {gateway.started:.0f} s")


def test_the_operators_commands_may_do_in_the_unit_what_its_comments_say(gateway: Gateway) -> None:
    site = gateway.site
    until(lambda: len(site.logged("command done")) + len(site.logged("command failed")) == len(COMMANDS))

    failed = {line["command"]: line["output"] for line in site.logged("command failed")}
    assert list(failed) == list(range(MAY + 1, len(COMMANDS) + 1)), failed
    assert "fwmark 0x4d lookup 77" in site.gateway.run("ip", "rule").stdout


def test_the_operator_sees_who_is_up_and_the_kernel_guards_it(gateway: Gateway) -> None:
    said = sh("wg-agent", "status", "-i", INTERFACE).stdout

    assert all(count in said for count in ("1 up", "1 waiting", "0 refused"))
    assert gateway.staying.sessions[0] in said
    assert gateway.staying.address in gateway.site.guarded()


@contextmanager
def on_a_slow_disk(file: Path) -> Iterator[None]:
    """Whoever opens the file waits until somebody writes it."""
    before = file.read_text()
    file.unlink()
    os.mkfifo(file, 0o644)
    try:
        yield
    finally:
        with suppress(OSError):  # ENXIO: nobody waits any more
            os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
        file.unlink()
        file.write_text(before)


@pytest.mark.full_size
@pytest.mark.reliability(
    "the unit's process killed (SIGKILL)",
    "systemd starts it again, tunnels lose nothing; a session whose deadline passes meanwhile is cut on time",
)
def test_a_killed_unit_is_back_by_itself_and_nobody_notices(gateway: Gateway, seen: Seen) -> None:
    site, unit = gateway.site, gateway.site.unit
    key = (KEY.read_text(), KEY.stat().st_mtime_ns)
    late: list[float] = []
    took: list[float] = []
    crashes = site.metric('wg_agent_starts_total{after="crash"}')
    with ping(gateway.staying, PINGS) as kept, ping(gateway.ending, PINGS) as cut:
        kept.wait_reply()
        for _ in range(ROUNDS):
            deadline = gateway.begin(cut)
            pid, restarts, killed = unit.pid, unit.restarts(), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            late.append(overrun(cut, deadline))
            unit.wait_ready(pid)
            took.append(time.monotonic() - killed)
            assert unit.restarts() == restarts + 1
            gateway.adopted()
            assert until(gateway.ended, 30, "the end's report") == ["expired"]
        kept.wait_reply()
    assert kept.lost == 0
    assert site.metric('wg_agent_starts_total{after="crash"}') == crashes + ROUNDS
    assert (KEY.read_text(), KEY.stat().st_mtime_ns) == key
    assert set(site.shown()) == {gateway.staying.public_key}
    seen(tried=ROUNDS, overrun=max(late), lost=kept.lost, note=f"back after at most {max(took):.0f} s")


@pytest.mark.full_size
@pytest.mark.reliability(
    "the unit's process stopped (SIGSTOP)",
    f"the watchdog ({WATCHDOG} s) has systemd kill it and start it again, tunnels lose nothing",
)
def test_a_hung_unit_is_killed_by_the_watchdog_and_nobody_notices(gateway: Gateway, seen: Seen) -> None:
    site, unit = gateway.site, gateway.site.unit
    before = {
        after: site.metric(f'wg_agent_starts_total{{after="{after}"}}') for after in ("crash", "watchdog")
    }
    with ping(gateway.staying, PINGS) as kept:
        kept.wait_reply()
        pid, restarts, hung = unit.pid, unit.restarts(), time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        # It hangs, but it is there: its interface is not anybody's to take down.
        purge = sh("wg-agent", "purge", "-i", INTERFACE, check=False)
        assert (purge.returncode, f"another agent (process {pid}) runs" in purge.stderr) == (1, True)
        unit.wait_ready(pid)
        took = time.monotonic() - hung
        kept.wait_reply()
    assert kept.lost == 0
    assert took > WATCHDOG
    assert unit.restarts() == restarts + 1
    assert f"Watchdog timeout (limit {WATCHDOG}s)!" in unit.journal()
    after = {after: site.metric(f'wg_agent_starts_total{{after="{after}"}}') for after in before}
    assert after == {"crash": before["crash"], "watchdog": before["watchdog"] + 1}
    gateway.adopted()
    seen(lost=kept.lost, note=f"back after {took:.0f} s")


@pytest.mark.reliability(
    "the unit reloaded, its configuration on a slow disk",
    "it is reloading until it has read it, says what changed and what needs a restart, tunnels lose nothing",
)
def test_a_reload_says_what_changed_and_nobody_notices(gateway: Gateway, seen: Seen) -> None:
    site, unit = gateway.site, gateway.site.unit
    text = site.configuration('[log]\nlevel = "debug"\n[push]\nmax_body = 7\n')
    pid = unit.pid
    with ping(gateway.staying, PINGS) as kept, on_a_slow_disk(site.config):
        kept.wait_reply()
        with subprocess.Popen(["systemctl", "reload", UNIT]) as reload:
            # /bin/kill has done its work: it is the agent's word that counts.
            until(
                lambda: (
                    unit.show("ActiveState", "ControlPID") == {"ActiveState": "reloading", "ControlPID": "0"}
                ),
                what="the state of reloading",
            )
            site.config.write_text(text)
        assert reload.returncode == 0
        until(lambda: unit.show("ActiveState") == {"ActiveState": "active"}, what="the reload's end")
        kept.wait_reply()
    # Others of this boot's tests have reloaded it, too.
    [*_, reloaded] = site.logged("configuration reloaded")
    assert (reloaded["changed"], reloaded["needs_restart"]) == (["log.level"], ["push.max_body"])
    assert unit.pid == pid
    assert kept.lost == 0
    seen(lost=kept.lost)


@pytest.mark.full_size
@pytest.mark.reliability(
    "the unit stopped, and started with a configuration that can't be used",
    "it fails with 2, says why and stays failed; tunnels lose nothing, deadlines are kept by the kernel",
)
def test_a_configuration_that_can_not_be_used_fails_the_unit_and_nobody_notices(
    gateway: Gateway, seen: Seen
) -> None:
    site, unit = gateway.site, gateway.site.unit
    with ping(gateway.staying, PINGS) as kept, ping(gateway.ending, PINGS) as cut:
        kept.wait_reply()
        deadline = gateway.begin(cut)
        unit.ctl("stop")
        # One file for ever: were it made anew, two could hold a lock each.
        lock = LOCK.stat().st_ino
        site.configure("[nonsense]\n")
        assert unit.ctl("start", check=False).returncode != 0
        late = overrun(cut, deadline)
        time.sleep(2)  # twice RestartSec
        assert unit.show("ActiveState", "Result", "ExecMainStatus", "NRestarts") == {
            "ActiveState": "failed",
            "Result": "exit-code",
            "ExecMainStatus": "2",
            "NRestarts": "0",
        }
        assert f"{site.config}, line 5: unknown section [nonsense]; remove it" in unit.journal()
        # Nobody was there to remove the peer: the kernel's table has stopped it.
        assert set(site.shown()) == {gateway.staying.public_key, gateway.ending.public_key}
        site.configure()
        unit.ctl("start")
        kept.wait_reply()
    assert kept.lost == 0
    assert LOCK.stat().st_ino == lock
    assert set(site.shown()) == {gateway.staying.public_key}
    gateway.adopted()
    seen(overrun=late, lost=kept.lost, note="adopted once it is corrected")


@pytest.mark.reliability(
    "whatever became of the unit before",
    "no secret in the journal, in systemctl show, in its environment or arguments, nor a PSK on disk",
)
def test_no_secret_is_where_others_or_the_disk_have_it(gateway: Gateway, seen: Seen) -> None:
    unit, psks = gateway.site.unit, gateway.site.psks
    secrets = [gateway.site.token.read_text().strip(), KEY.read_text().strip(), *psks]
    process = Path(f"/proc/{unit.pid}")
    places = {
        "the journal": unit.journal(),
        "systemctl show": "\n".join(f"{name}={value}" for name, value in unit.show().items()),
        "environment and arguments": (process / "environ").read_text() + (process / "cmdline").read_text(),
    }
    assert [place for place, text in places.items() for secret in secrets if secret in text] == []
    kept = [file.read_bytes() for file in STATE.iterdir()]
    assert [psk for psk in psks if any(psk.encode() in content for content in kept)] == []
    seen(tried=len(secrets))


@pytest.mark.reliability("the unit stopped, then purged", "tunnels stay up; then all is down but the key")
def test_stopping_ends_nothing_and_purge_ends_all_but_the_key(gateway: Gateway, seen: Seen) -> None:
    site = gateway.site
    key = KEY.read_text()
    with ping(gateway.staying, PINGS) as kept:
        kept.wait_reply()
        site.unit.ctl("stop")
        kept.wait_reply()
    assert kept.lost == 0

    purged = json.loads(sh("wg-agent", "purge", "-i", INTERFACE, "--json").stdout)

    assert (purged["interface_removed"], purged["table_removed"]) == (True, True)
    assert str(STATE / "journal.sqlite") in purged["removed"]
    assert purged["kept"] == [str(KEY)]
    # The key stays the interface's, and so does the folder.
    assert (KEY.read_text(), {file.name for file in STATE.iterdir()}) == (key, {KEY.name, "interface"})
    assert INTERFACE not in site.gateway.links()
    assert "wg_agent_" not in site.guarded()
    seen(lost=kept.lost)


# Each of these takes several starts of the agent.
if FULL:

    @pytest.mark.reliability(
        "the unit started while wg-agent purge is at work",
        "it tries again until purge is done: there is one writer at any time",
    )
    def test_the_unit_does_not_start_beside_purge(gateway: Gateway, seen: Seen) -> None:
        unit = gateway.site.unit
        with InterfaceLock(RUNTIME, INTERFACE):  # what purge holds while it works
            assert unit.ctl("start", check=False).returncode != 0
            until(lambda: unit.restarts() >= 2, START, "two more tries")
            assert f"another agent (process {os.getpid()}) runs" in unit.journal()
        unit.wait_ready(0)
        seen(tried=unit.restarts())

    @pytest.mark.reliability(
        "the interface's key given as a credential after one was made",
        "a restart takes it, the one that was made stays, and check finds nothing to complain of",
    )
    def test_the_interfaces_key_may_be_a_credential(gateway: Gateway, seen: Seen) -> None:
        site, unit = gateway.site, gateway.site.unit
        made, given = KEY.read_text(), clamp(os.urandom(32))
        file = site.token.with_suffix(".key")
        file.write_text(format_key(given) + "\n")
        file.chmod(0o600)
        unit.drop_in("key", f"[Service]\nLoadCredential=interface.private_key:{file}\n")
        unit.ctl("restart")
        assert sh("wg", "show", INTERFACE, "public-key").stdout.strip() == format_key(public_key(given))
        assert KEY.read_text() == made
        checked = json.loads(sh("wg-agent", "check", "-i", INTERFACE, "--json", check=False).stdout)
        faults = {check["check"] for check in checked["checks"] if check["mark"] == "fault"}
        assert faults <= {"forwarding"}  # which is the operator's
        assert format_key(given) not in unit.journal()
        seen()


def test_the_unit_serves_a_defguard_core_with_the_certificates_that_it_was_given(gateway: Gateway) -> None:
    """Last of all, for it has another core."""
    site, unit = gateway.site, gateway.site.unit
    certs = STATE / "certs"
    core = SecondGeneration(50066)
    site.config.write_text(
        '[core]\nprotocol = "defguard"\n[defguard]\nlisten = "127.0.0.1:50066"\n[stats]\ninterval = 5\n'
    )

    async def meet(*, adopt: bool) -> None:
        if adopt:
            async with asyncio.timeout(START):
                while not site.logged("waiting to be adopted"):  # noqa: ASYNC110 it is another process
                    await asyncio.sleep(1)
            await core.adopt()
        async with core.dialling(), asyncio.timeout(START):
            await core.connected.wait()
            while not str(site.status()["epoch"]).startswith("defguard-"):  # noqa: ASYNC110 the same
                await asyncio.sleep(0.5)

    unit.ctl("restart")
    asyncio.run(meet(adopt=True))
    assert {stat.S_IMODE(file.stat().st_mode) for file in certs.iterdir()} == {0o600}

    # As Defguard's gateway leaves them: root's, in a folder of its own.
    unit.ctl("stop")
    theirs = Path("/etc/defguard/certs")
    theirs.mkdir(parents=True)
    lines = ""
    for file in list(certs.iterdir()):
        (theirs / file.name).touch(0o600)
        (theirs / file.name).write_bytes(file.read_bytes())
        file.unlink()
        lines += f"LoadCredential={file.name}:{theirs / file.name}\n"
    unit.drop_in("certificates", f"[Service]\n{lines}")
    unit.ctl("start")
    asyncio.run(meet(adopt=False))
    assert len(list(certs.iterdir())) == 4
    checked = json.loads(sh("wg-agent", "check", "-i", INTERFACE, "--json", check=False).stdout)
    marks = {check["check"]: check["mark"] for check in checked["checks"]}
    assert marks["adoption"] == "ok"
