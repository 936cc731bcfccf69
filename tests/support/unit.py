"""The agent as an operator has it: installed, and run by its systemd unit on this very host.

Only for the lab, whose root is thrown away: it writes to /opt, /usr/bin, /etc and /run, and the gateway
is the host itself. Clients have namespaces of their own, as everywhere.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.control import ControlClient
from tests.support.netns import Namespace
from tests.support.site import Site, until

INTERFACE = "wg0"
UNIT = f"wg-agent@{INTERFACE}.service"
SOURCES = Path(__file__).parents[2]
OPT = Path("/opt/wg-agent")
PROGRAM = Path("/usr/bin/wg-agent")
ETC = Path("/etc/wg-agent")
UNITS = Path("/etc/systemd/system")
STATE = Path("/var/lib/wg-agent") / INTERFACE
RUNTIME = Path("/run/wg-agent") / INTERFACE
START = 180.0
"""The unit's TimeoutStartSec, in seconds."""

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


def install() -> None:
    """Put the agent, its dependencies and its unit where a package would.

    What is large is mounted instead of copied, at a path that ProtectHome and PrivateTmp do not hide.
    """
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
    shutil.copy(SOURCES / "systemd/wg-agent@.service", UNITS)


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

    def show(self, name: str) -> str:
        """One of the unit's properties."""
        return sh("systemctl", "show", "--value", "-p", name, UNIT).stdout.strip()

    @property
    def pid(self) -> int:
        """The agent's process, 0 if there is none."""
        return int(self.show("MainPID"))

    def restarts(self) -> int:
        """How often systemd has started it again by itself."""
        return int(self.show("NRestarts"))

    def wait_ready(self, since: int, timeout: float = START) -> None:
        """Wait until it is active with another process than ``since``."""

        def ready() -> bool:
            return self.show("ActiveState") == "active" and self.pid not in {0, since}

        until(ready, timeout, "the unit's return")

    def journal(self) -> str:
        """All that the journal has of the unit: the agent's lines, and systemd's about it."""
        sh("journalctl", "--sync")
        return sh("journalctl", "-u", UNIT, "-o", "cat", "--no-pager").stdout


class UnitSite(Site):
    """A site whose gateway is this host, and whose agent is the unit ``wg-agent@wg0``."""

    def __init__(self, folder: Path, **members: Any) -> None:
        super().__init__(folder, **members)
        self.interface = INTERFACE
        self.unit = Unit()
        self.config = ETC / f"{INTERFACE}.toml"
        self.token = ETC / f"{INTERFACE}.token"
        # Not one of the network's: what runs in this one is everything.
        self.gateway = Namespace("wga-host")
        sh("ip", "netns", "attach", self.gateway.name, "1")

    def __enter__(self) -> Self:
        install()
        ETC.mkdir(mode=0o755)
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
        print(self.unit.journal()[-12000:])
        self.unit.ctl("stop", check=False)
        super().__exit__(kind, error, trace)

    def configure(self, more: str = "") -> None:
        """Write the configuration."""
        url = self.core.service.gateway_url
        self.config.write_text(f'[core]\nurl = "{url}"\n[stats]\ninterval = 5\n{more}')

    def status(self) -> dict[str, Any]:
        """``wg-agent status --json``, without the program."""
        return ControlClient(RUNTIME / f"{INTERFACE}.sock").status()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The agent's log lines of one event."""
        lines = (json.loads(line) for line in self.unit.journal().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == event]
