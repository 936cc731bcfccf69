"""The agent as an operator has it: installed, and run by its systemd unit on this very host.

Only for the lab, whose root is thrown away: it writes to /opt, /usr/bin, /etc and /run, and the gateway
is the host itself. Clients have namespaces of their own, as everywhere.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.control import ControlClient
from agent.sandbox.sessions import Session
from tests.support.client import Client
from tests.support.netns import Namespace, Pinger
from tests.support.scenarios import SLACK, monotonic_of
from tests.support.site import Site

INTERFACE = "wg0"
UNIT = f"wg-agent@{INTERFACE}.service"
SOURCES = Path(__file__).parents[2]
OPT = Path("/opt/wg-agent")
PROGRAM = Path("/usr/bin/wg-agent")
ETC = Path("/etc/wg-agent")
UNITS = Path("/etc/systemd/system")
STATE = Path("/var/lib/wg-agent") / INTERFACE
RUNTIME = Path("/run/wg-agent") / INTERFACE
STATES = [Path(root) / "wg-agent" for root in ("/var/lib", "/var/lib/private", "/run", "/run/private")]
"""All that systemd makes for the units; the first of each two is a link to the second."""
START = 180.0
"""The unit's TimeoutStartSec, in seconds."""
LIFETIME = 15.0
"""Seconds of a session that is to end: enough to begin it, and less than an emulated restart."""

_LAUNCHER = """#!{python} -I
import sys
sys.path[:0] = ["{opt}/site-packages"]
sys.path[:0] = ["{opt}/lib"]
from agent.__main__ import main
sys.exit(main())
"""


def sh(*argv: str, check: bool = True, timeout: float = 200.0) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; a failing one raises with what it printed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.returncode}: {(done.stdout + done.stderr).strip()}")
    return done


def install_from_checkout() -> None:
    """Put the agent, its dependencies and its unit where a package would.

    What is large is mounted instead of copied, at a path that ProtectHome and PrivateTmp do not hide.
    Nothing happens a second time.
    """
    if OPT.exists():
        return
    OPT.mkdir(parents=True)
    shutil.copytree(SOURCES / "agent", OPT / "lib/agent")
    _bind(Path(sysconfig.get_path("purelib")), OPT / "site-packages")
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = Path("/usr/bin") / name
    if not python.exists():
        _bind(Path(sys.base_prefix), OPT / "python")
        python = OPT / "python/bin" / name
    PROGRAM.write_text(_LAUNCHER.format(python=python, opt=OPT))
    PROGRAM.chmod(0o755)
    for unit in (SOURCES / "systemd").iterdir():
        shutil.copy(unit, UNITS)


def uninstall() -> None:
    """Leave nothing of the agent that was installed, started and configured here to who comes next."""
    sh("systemctl", "stop", "wg-agent-userspace@*.path")
    sh("ip", "link", "delete", INTERFACE, check=False)
    for table in re.findall(r"inet wg_agent\S+", sh("nft", "list", "tables").stdout):
        sh("nft", "delete", "table", *table.split())
    for part in ("site-packages", "python"):
        sh("umount", str(OPT / part), check=False)
    for path in (OPT, ETC, UNITS / f"{UNIT}.d", *STATES):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
    for path in (PROGRAM, *UNITS.glob("wg-agent*@.*")):
        path.unlink(missing_ok=True)
    sh("systemctl", "daemon-reload")


def _bind(source: Path, target: Path) -> None:
    target.mkdir()
    sh("mount", "--bind", str(source), str(target))


class Unit:
    """The unit, by systemctl and its journal."""

    def drop_in(self, name: str, text: str) -> None:
        """As ``systemctl edit`` does it."""
        folder = UNITS / f"{UNIT}.d"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.conf").write_text(text)
        sh("systemctl", "daemon-reload")

    def ctl(self, verb: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """``systemctl VERB UNIT``."""
        return sh("systemctl", verb, UNIT, check=check)

    def show(self, *names: str) -> dict[str, str]:
        """Return some of the unit's properties, or all."""
        chosen = ["-p", ",".join(names)] if names else []
        lines = sh("systemctl", "show", *chosen, UNIT).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def pid(self) -> int:
        """The agent's process, 0 if there is none."""
        return int(self.show("MainPID")["MainPID"])

    def restarts(self) -> int:
        """Return how often systemd has started it again by itself since it was last started."""
        return int(self.show("NRestarts")["NRestarts"])

    def wait_ready(self, since: int, timeout: float = START) -> None:
        """Wait until it is active with another process than ``since``."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            now = self.show("ActiveState", "MainPID")
            if now["ActiveState"] == "active" and int(now["MainPID"]) not in {0, since}:
                return
            time.sleep(1)  # systemctl takes an emulated processor from the agent that it asks about
        raise TimeoutError(f"the unit did not come back in {timeout} s:\n{self.journal()[-3000:]}")

    def journal(self) -> str:
        """Return all that the journal has of the unit: the agent's lines, and systemd's about it."""
        sh("journalctl", "--sync")
        return sh("journalctl", "-u", UNIT, "-o", "cat", "--no-pager").stdout


class UnitSite(Site):
    """A site whose gateway is this host, and whose agent is the unit ``wg-agent@wg0``."""

    def __init__(self, folder: Path, **members: Any) -> None:
        super().__init__(folder, **members)
        self.interface = INTERFACE
        self.unit = Unit()
        self.psks: list[str] = []
        """Every PSK that was granted, in base64."""
        self.config = ETC / f"{INTERFACE}.toml"
        self.token = ETC / f"{INTERFACE}.token"
        # Not one of the network's: what runs in this one is everything.
        self.gateway = Namespace("wga-host")
        sh("ip", "netns", "attach", self.gateway.name, "1")

    def install(self) -> None:
        """Put the agent where the unit finds it."""
        install_from_checkout()

    def uninstall(self) -> None:
        """Leave nothing of it."""
        uninstall()

    def __enter__(self) -> Self:
        self.install()
        ETC.mkdir(mode=0o711, exist_ok=True)
        super().__enter__()
        # The core listens where the unit sees it, and for the unit's user too.
        self.folder.chmod(0o711)
        (self.folder / "core.sock").chmod(0o666)
        self.token.write_text(self.core.service.gateway_token + "\n")
        self.token.chmod(0o600)
        self.configure()
        self.unit.drop_in("credentials", f"[Service]\nLoadCredential=core.token:{ETC}/{INTERFACE}.token\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            print(self.unit.journal()[-6000:])
        self.unit.ctl("stop", check=False)
        super().__exit__(kind, error, trace)
        self.uninstall()
        sh("ip", "netns", "delete", self.gateway.name)

    def configuration(self, more: str = "") -> str:
        """Return the configuration, with ``more`` TOML."""
        return f'[core]\nurl = "{self.core.service.gateway_url}"\n[stats]\ninterval = 5\n{more}'

    def configure(self, more: str = "") -> None:
        """Write the configuration."""
        self.config.write_text(self.configuration(more))

    def grant(self, client: Client, lifetime: float = 0) -> tuple[Session, str]:
        """As ``Site``; the PSK is remembered."""
        session, psk = super().grant(client, lifetime)
        self.psks.append(psk)
        return session, psk

    def status(self) -> dict[str, Any]:
        """``wg-agent status --json``, without the program."""
        return ControlClient(RUNTIME / f"{INTERFACE}.sock").status()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the agent's log lines of one event."""
        lines = (json.loads(line) for line in self.unit.journal().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == event]

    def guarded(self) -> str:
        """Return the kernel's whole ruleset."""
        return self.gateway.run("nft", "list", "ruleset").stdout


@dataclass
class Gateway:
    """A site with its unit running; ``staying`` has a session for good, ``ending`` one now and then."""

    site: UnitSite
    staying: Client
    ending: Client
    started: float
    """Seconds that ``systemctl start`` took."""

    def begin(self, cut: Pinger) -> float:
        """Give ``ending`` a session and wait for replies; the monotonic moment at which it ends."""
        session, psk = self.site.grant(self.ending, LIFETIME)
        self.site.connect(self.ending, psk)
        cut.wait_reply(LIFETIME)
        return monotonic_of(session.expires_at)

    def adopted(self) -> None:
        """The session that stays is the one it was, and was not granted anew."""
        [session] = self.staying.sessions
        [peer] = [p for p in self.site.status()["peers"] if p["public_key"] == self.staying.public_key]
        assert (peer["state"], peer["session_id"]) == ("up", session)
        granted = [line["session"] for line in self.site.logged("session granted")]
        assert granted.count(session) == 1

    def ended(self) -> list[str]:
        """Core's reasons for the end of the last session of ``ending``."""
        ends = self.site.core.call(self.site.core.admin.session_ends())
        return [end["reason"] for end in ends if end["session_id"] == self.ending.sessions[-1]]


def overrun(cut: Pinger, deadline: float) -> float:
    """Wait for the deadline and the silence after it; the seconds from the one to the last reply."""
    time.sleep(max(0.0, deadline - time.monotonic()))
    late = cut.wait_silence(1.0, 3 * SLACK) - deadline
    assert -SLACK < late < SLACK
    return late
