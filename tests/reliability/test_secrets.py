"""The running agent's secrets, sought in everything that it lets out, over its whole life."""

import base64
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from agent.encoding import format_key
from tests.reliability.grep import Hunt, Secret
from tests.reliability.pushing import Courier, push_secret
from tests.reliability.secret_life import BUG, Life
from tests.reliability.tls_front import Authority
from tests.reliability.witness import Witness
from tests.support.client import Client
from tests.support.ledger import FULL, Seen
from tests.support.site import Site, until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]

PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
NOBODY = 65534


def modes_are_tight(folder: Path) -> int:
    """Everything below the folder is its owner's alone; how many things there are."""
    things = [folder, *folder.rglob("*")]
    for path in things:
        mode = path.lstat().st_mode
        wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
        assert (stat.S_IMODE(mode), path.stat().st_uid) == (wanted, os.geteuid()), path
    return len(things)


def core_limits(pid: int) -> list[str]:
    """The soft and the hard limit of a core file's size."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith("Max core file size")).split()[4:6]


def killed(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """It dies of a signal that writes a core file, where one may be written; none is."""
    assert core_limits(process.pid) == ["0", "0"]
    process.send_signal(number)
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert (ended.si_code, ended.si_status) == (os.CLD_KILLED, number)
    process.wait(10)


def taken(site: Site) -> "subprocess.Popen[bytes]":
    """The agent's process, which is no longer the site's to end."""
    assert isinstance(site.process, subprocess.Popen)
    process, site.process = site.process, None
    return process


@contextmanager
def loose_surroundings() -> Iterator[None]:
    """What a careless host would have: no umask, and core files of any size."""
    umask = os.umask(0)
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    # A shell's background jobs, of which this may be one, ignore it, and so would our children.
    on_quit = signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGQUIT, on_quit)
        resource.setrlimit(resource.RLIMIT_CORE, limits)
        os.umask(umask)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700)
    subprocess.run(
        ("mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(folder)), check=True, timeout=20
    )
    try:
        yield
    finally:
        subprocess.run(("umount", "--lazy", str(folder)), check=True, timeout=20)


@pytest.mark.reliability(
    "A whole life at debug level: grants, renewals, ends, malformed messages, forged pushes, drift, a full "
    "disk, core's death, reloads, a bug that quotes everything, SIGABRT, SIGSEGV",
    "no PSK, private key, token or push secret in any log, file, answer, argv, environment or core file",
)
def test_no_secret_is_let_out_in_a_whole_life(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = push_secret()
    file = tmp_path / "push.secret"
    file.touch(0o600)
    file.write_text(secret)
    bug = tmp_path / "bug"
    bug.mkdir()
    (bug / "sitecustomize.py").write_text(BUG)
    monkeypatch.setenv("PYTHONPATH", str(bug))
    push = f'[push]\nlisten = "127.0.0.1:9587"\nsecret_file = "{file}"'
    with Witness(tmp_path / "witnessed") as witness, ExitStack() as stack:
        stack.enter_context(small_disk(tmp_path / "state"))
        site = stack.enter_context(Site(tmp_path, agent=push, core={"heartbeat": 0.3}))
        clients = site.add_clients(7)
        stack.enter_context(loose_surroundings())
        couriers = [
            stack.enter_context(Courier(site.gateway, target))
            for target in ("127.0.0.1:9587", "127.0.0.1:9586", f"{tmp_path}/run/{site.interface}.sock")
        ]
        life = Life(site, secret, *couriers)
        site.start_agent()
        private_key = (tmp_path / "state" / "private.key").read_text().strip()
        life.hunt.secrets.append(Secret("the private key", base64.b64decode(private_key)))
        for chapter in ("json", "console"):
            tell_a_life(life, clients, chapter)
            site.config.write_text(site.config.read_text().replace('format = "json"', 'format = "console"'))
            if chapter == "json":
                site.start_agent()
        assert "\x1b" not in site.log.read_text()
        site.start_agent()
        killed(taken(site), signal.SIGABRT)
        site.start_agent()
        life.process_shown()
        killed(taken(site), signal.SIGSEGV)
        life.search()
        planted = life.hunt.secrets[-1]
        (tmp_path / "state" / "planted").write_bytes(planted.raw[3:19])
        again = Hunt(life.hunt.secrets)
        again.look_below(tmp_path / "state", {tmp_path / "state" / "private.key": "the private key"})
        assert {finding.secret for finding in again.found} == {planted.name}
    life.hunt.look("argv and environments of all processes", witness.seen)
    assert {"wireguard-go"} <= witness.programs
    assert life.hunt.found == []
    seen(
        tried=len(life.hunt.secrets),
        note=f"{len(life.hunt.secrets)} secrets sought in {life.hunt.looked_through / 2**20:.1f} MiB",
    )


def tell_a_life(life: Life, clients: list[Client], chapter: str) -> None:
    """From the first grant to the agent's fall."""
    *some, last = clients
    whole = chapter == "json" or FULL
    life.sessions(some[:5], expire=whole)
    life.malformed(some[5], answers=4 if whole else 1)
    life.pushes(last)
    life.drift(some[0])
    life.ask_pages()
    life.process_shown()
    if whole:
        life.without_journal(last)
        life.core_faults()
        life.reload()
        life.ask_commands()
    modes_are_tight(life.site.folder / "state")
    modes_are_tight(life.site.folder / "run")
    life.bug_in_push()
    life.bug_in_writer(last)
    life.search()


@pytest.mark.reliability(
    "A secret is planted in a file, a log, an answer and an environment, whole and cut, in each form",
    "the search finds it",
)
def test_a_planted_secret_is_found(tmp_path: Path, seen: Seen) -> None:
    key = os.urandom(32)
    hunt = Hunt([Secret("a key", key), Secret("another", os.urandom(32))])
    written = {
        "raw": key,
        "base64": base64.b64encode(key),
        "URL-safe base64": base64.urlsafe_b64encode(key),
        "hex": key.hex().encode(),
        "HEX": key.hex().upper().encode(),
        "repr": repr(key).encode(),
    }
    cut = {
        f"{form} from {start}": text[start : start + len(text) // 2 + 1]
        for form, text in written.items()
        for start in (0, 7, len(text) // 2 - 1)
    }
    # Any 16 bytes of the key.
    cut |= {f"16 bytes from {start}": key[start : start + 16] for start in range(17)}
    for form, text in (written | cut).items():
        (tmp_path / "file").write_bytes(b"before " + text + b" after")
        assert {finding.secret for finding in hunt.look(form, b"{" + text + b"}")} == {"a key"}, form
        assert hunt.look_below(tmp_path, {}) == 1
        assert hunt.found[-1].place == str(tmp_path / "file")
    # Where it may be, nobody minds.
    found = len(hunt.found)
    hunt.look_below(tmp_path, {tmp_path / "file": "a key"})
    assert len(hunt.found) == found

    with Witness(tmp_path / "witnessed") as witness:
        planted = format_key(key)
        by_argv = subprocess.Popen((sys.executable, "-c", "input()", planted), stdin=subprocess.PIPE)
        by_environment = subprocess.Popen(
            (sys.executable, "-c", "input()"), stdin=subprocess.PIPE, env={"PSK": key.hex()}
        )
        time.sleep(0.3)
        for process in (by_argv, by_environment):
            process.communicate(b"\n", timeout=10)
    assert {finding.form for finding in hunt.look("processes", witness.seen)} >= {"base64", "hex"}
    seen(tried=len(written) + len(cut) + 2)


@pytest.mark.reliability(
    "Another process of the agent's own user reads its memory or environment, or attaches to it",
    "the kernel refuses: what is the agent's belongs to root, and core files are off",
)
def test_the_agents_memory_is_closed_to_its_own_users_other_processes(seen: Seen) -> None:
    as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    # pytest's own folders are root's alone.
    with TemporaryDirectory(prefix="wg-agent-") as path, Site(Path(path)) as site:
        # A userspace program that never answers holds the agent in its start.
        waits = site.folder / "waits"
        waits.write_text("#!/bin/sh\nexec sleep 20\n")
        waits.chmod(0o755)
        program = f'backend = "userspace"\nuserspace_program = "{waits}"\n[core]'
        site.config.write_text(site.config.read_text().replace("[core]", program))
        for mine in (site.folder, site.folder / "token"):
            os.chown(mine, NOBODY, NOBODY)
        with site.log.open("ab") as log:
            process = site.gateway.popen(sys.executable, "-c", AS_NOBODY, str(site.config), stderr=log)
        try:
            until(lambda: "listening" in site.log.read_text(), 20, "the agent's start")
            folder = Path(f"/proc/{process.pid}")
            assert f"Uid:\t{NOBODY}\t{NOBODY}" in (folder / "status").read_text()
            for name in ("environ", "mem", "maps", "auxv"):
                assert (folder / name).stat().st_uid == 0, name
                argv = (*as_nobody, "head", "-c1", str(folder / name))
                done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
                assert (done.returncode, done.stdout) == (1, ""), name
                assert "denied" in done.stderr or "not permitted" in done.stderr
            assert core_limits(process.pid) == ["0", "0"]
        finally:
            process.kill()
            process.wait(10)
    seen(tried=8)


@pytest.mark.reliability(
    "`wg-agent check`, which reads the secrets too, is ended by Ctrl-\\",
    "no core file",
)
def test_a_check_that_is_cut_off_leaves_no_core_file(tmp_path: Path, seen: Seen) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("a-token-of-core")
    with socket.create_server(("127.0.0.1", 0)) as core:
        core.settimeout(20)
        config = tmp_path / "agent.toml"
        config.write_text(f"""
paths.state = "{tmp_path}/state"
paths.runtime = "{tmp_path}/run"
core.url = "http://127.0.0.1:{core.getsockname()[1]}/"
core.token_file = "{token}"
""")
        with loose_surroundings():
            check = subprocess.Popen((sys.executable, "-m", "agent", "check", "-c", str(config)))
        # It has asked core, with its token, and waits.
        with core.accept()[0] as asking:
            assert b"a-token-of-core" in asking.recv(4096)
            killed(check, signal.SIGQUIT)
    seen()


AS_NOBODY = f"""
import ctypes, os, sys
import agent.__main__, agent.commands.run, agent.nft, agent.wireguard.userspace, pyroute2
import encodings.ascii, encodings.idna, encodings.latin_1, encodings.unicode_escape
agent.commands.run.load_daemon()
ctypes.CDLL(None).prctl({PR_SET_KEEPCAPS}, 1, 0, 0, 0)
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
# As a process is that was started as this user: one may look into it.
assert ctypes.CDLL(None).prctl({PR_SET_DUMPABLE}, 1, 0, 0, 0) == 0
sys.exit(agent.__main__.main(["run", "-c", sys.argv[1]]))
"""


@pytest.mark.reliability(
    "A secret's file or a folder that others may read or write: modes 0640, 0644, 0660, 0604, 0770, 0777",
    "the agent does not start (exit 2), names the file and says how to mend it",
)
def test_what_others_may_read_is_refused_with_its_remedy(tmp_path: Path, seen: Seen) -> None:
    ours = Authority(tmp_path, "ours")
    listener, client = ours.issue("listener"), ours.issue("gateway", "gateway.example")
    files = {
        "core.token_file": tmp_path / "token",
        "push.secret_file": tmp_path / "push.secret",
        "interface.private_key_file": tmp_path / "private.key",
        "core.client_key_file": client.key,
        "push.tls_key_file": listener.key,
    }
    secrets = {"core.token_file": "a-token-of-core", "push.secret_file": push_secret()}
    secrets["interface.private_key_file"] = format_key(os.urandom(32))
    for key, text in secrets.items():
        files[key].touch(0o600)
        files[key].write_text(text)
    config = tmp_path / "agent.toml"
    config.write_text(f"""
interface.private_key_file = "{files["interface.private_key_file"]}"
paths.state = "{tmp_path}/state"
paths.runtime = "{tmp_path}/run"
[core]
url = "https://127.0.0.1:9/"
token_file = "{files["core.token_file"]}"
client_cert_file = "{client.cert}"
client_key_file = "{client.key}"
[push]
secret_file = "{files["push.secret_file"]}"
tls_cert_file = "{listener.cert}"
tls_key_file = "{listener.key}"
""")
    cases = [(key, path, mode, "600") for key, path in files.items() for mode in (0o640, 0o644, 0o660, 0o604)]
    for folder, name, mode in (("state", "state", 0o770), ("runtime", "run", 0o777)):
        path = tmp_path / name
        path.mkdir(0o700)
        cases.append((f"paths.{folder}", path, mode, "700"))
    cases = cases if FULL else cases[::11]
    for key, path, mode, remedy in cases:
        tight = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        argv = (sys.executable, "-m", "agent", "run", "-c", str(config))
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        path.chmod(tight)
        assert done.returncode == 2, (key, oct(mode), done.stderr)
        assert key in done.stderr
        assert f"mode {mode:04o}" in done.stderr
        assert f"chmod {remedy} {path}" in done.stderr
        assert not any(secret in done.stderr for secret in secrets.values())
    seen(tried=len(cases))
