"""A gateway for the commands of the documentation, in namespaces: nothing of this host is touched.

The agent is ``wg-agent run -i wg0``, its files lie where the documentation names them, in a mount namespace
of this gateway's own. Core is the sandbox's, in this process. alice-laptop has a session and a tunnel,
bob-phone has neither.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.control import ControlClient
from tests.support.client import Client
from tests.support.netns import Namespace
from tests.support.site import Site, until

INTERFACE = "wg0"
_ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name.startswith("PYTHON")},
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_MOUNTS = """
set -e
mount -t tmpfs scratch {scratch}
for folder in /etc /var/lib; do
  mkdir -p {scratch}$folder/upper {scratch}$folder/work
  mount -t overlay overlay -o lowerdir=$folder,upperdir={scratch}$folder/upper,workdir={scratch}$folder/work \
    $folder
done
mount -t tmpfs run /run
mkdir -p /run/netns
for folder in /etc/wg-agent /var/lib/wg-agent; do
  mkdir -p $folder
  mount -t tmpfs scratch $folder
done
echo ready
exec sleep infinity
"""
_CONFIG = """\
[core]
url = "{url}"
token_file = "wg0.token"
[stats]
interval = 1
"""


@dataclass(frozen=True, slots=True)
class Inside(Namespace):
    """A network namespace seen from a mount namespace, that of the process ``holder``."""

    holder: int

    def argv(self, *argv: str) -> list[str]:
        spaces = (f"--mount=/proc/{self.holder}/ns/mnt", f"--net={self.path}")
        return ["nsenter", *spaces, f"--wdns={os.getcwd()}", *argv]  # noqa: PTH109


class Gateway(Site):
    """A site whose gateway has /etc, /var/lib and /run to itself; commands are run in ``home``."""

    alice: Client
    bob: Client

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.interface = INTERFACE
        scratch, self.home = folder / "scratch", folder / "home"
        scratch.mkdir()
        self.home.mkdir()
        self._holder = subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *("sh", "-c", _MOUNTS.format(scratch=scratch)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.root = Path(f"/proc/{self._holder.pid}/root")
        self.gateway = Inside(self.gateway.name, self._holder.pid)

    def __enter__(self) -> Self:
        super().__enter__()
        self._configure()
        [self.alice] = self.add_clients(1, name="alice-laptop")
        [self.bob] = self.add_clients(1, name="bob-phone")
        self.start_agent()
        for client in (self.alice, self.bob):
            self.attach(client)
        self.let_in(self.alice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._holder.kill()
            self._holder.wait()
            assert self._holder.stdout is not None
            self._holder.stdout.close()

    def _configure(self) -> None:
        etc = self.root / "etc/wg-agent"
        (etc / "wg0.toml").write_text(_CONFIG.format(url=self.core.service.gateway_url))
        (etc / "wg0.token").write_text(self.core.service.gateway_token + "\n")
        (etc / "wg0.token").chmod(0o600)

    def let_in(self, client: Client) -> None:
        """Give the client a session and a tunnel, and wait for its handshake."""
        _, psk = self.grant(client)
        self.connect(client, psk)
        until(lambda: self.peer(client)["latest_handshake"], what="the handshake")

    def restore(self) -> None:
        """Alice has a session again, and the configuration is what it was."""
        self._configure()
        if self.peer(self.alice)["state"] != "up":
            self.let_in(self.alice)

    def fork_agent(self) -> None:
        with self.log.open("ab") as log:
            argv = (sys.executable, "-m", "agent", "run", "-i", INTERFACE)
            self.process = self.gateway.popen(*argv, stderr=log)

    def status(self) -> dict[str, Any]:
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"the agent ended: {self.log.read_text()[-3000:]}")
        return ControlClient(self.root / f"run/wg-agent/{INTERFACE}/{INTERFACE}.sock").status()

    def run(self, script: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a script as root on the gateway, as its shell would; stdout and stderr come in one."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        # A file, since what a script leaves in the background would keep a pipe open.
        with (self.folder / "printed").open("w+") as printed:
            done = subprocess.run(
                self.gateway.argv("bash", "-euo", "pipefail", "-c", f"cd {self.home}\n{script}"),
                env={**_ENVIRONMENT, "PATH": path, "HOME": str(self.home)},
                input=stdin,
                stdout=printed,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=90,
                check=False,
            )
            printed.seek(0)
            done.stdout = printed.read()
        return done
