"""The lab's machine as the host of a newcomer: wg-agent is installed, and nothing is configured."""

import re
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pyotp

from tests.support.unit import ETC, PROGRAM, UNIT, UNITS, install_from_checkout, sh, uninstall

HOME = Path("/run/newcomer")
SANDBOX = Path("/usr/bin/wg-agent-sandbox")
_LEFT = ("/etc/wg-agent-core", "/var/lib/wg-agent-core", f"{UNITS}/{UNIT}.d")
_TOTP = re.compile(r'"secret":\s*"([A-Z2-7]+)"')


class Host:
    """Runs the documents' commands as root; at the end nothing is left of what they made."""

    def __init__(self) -> None:
        self._printed = ""

    def __enter__(self) -> Self:
        install_from_checkout()
        if not SANDBOX.exists():
            SANDBOX.write_text(PROGRAM.read_text().replace("agent.__main__", "agent.sandbox.__main__"))
            SANDBOX.chmod(0o755)
        HOME.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for unit in (UNIT, "wg-agent-core"):
            sh("systemctl", "disable", "--now", unit, check=False)
        if Path("/sys/class/net/wg0").exists():
            sh("wg-agent", "purge", "-i", "wg0", "--key", check=False)
        sh("ip", "netns", "delete", "laptop", check=False)
        sh("rm", "-rf", str(ETC), *_LEFT, str(HOME), str(SANDBOX))
        uninstall()
        sh("systemctl", "reset-failed")

    def run(self, script: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a script in the newcomer's folder; stdout and stderr come in one."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=HOME,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        self._printed += done.stdout
        return done

    def authenticator(self) -> str:
        """The code that the user's authenticator shows, by the secret that was printed last."""
        secrets = _TOTP.findall(self._printed)
        return f"{pyotp.TOTP(secrets[-1]).now()}\n" if secrets else ""
