"""The product in under a minute: a gateway, a client and a core in two network namespaces.

    python -m agent.sandbox demo [--keep]

Real processes, a real WireGuard and real pings; needs root. Exit codes: 0 all steps passed, 1 one
did not, 2 it can't be played here, 130 and 143 interrupted. Whatever happens, all of it is taken
down at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import shutil
import sys

from agent.errors import ConfigError
from agent.sandbox.demo import play
from agent.wireguard.kernel import kernel_has_wireguard


def main(argv: list[str]) -> int:
    """Play the demo; return the exit code. Raises ConfigError if something that it takes is missing."""
    arguments = parser().parse_args(argv)
    if os.geteuid() != 0:
        _as_root(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    return asyncio.run(play.run(_wireguard(), keep_files=arguments.keep))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the demo's arguments."""
    made = argparse.ArgumentParser(prog="wg-agent demo", description=__doc__.partition("\n")[0])
    made.add_argument("--keep", action="store_true", help="keep the folder with settings and logs")
    return made


def _as_root(argv: list[str]) -> None:
    """Become root through sudo; does not return."""
    sudo = shutil.which("sudo")
    if sudo is None:
        raise ConfigError("the demo makes network namespaces and so needs root", "run it as root")
    print("as root, through sudo, for network namespaces and WireGuard", file=sys.stderr, flush=True)
    # Compiled files of root's would be in the way of the next run that is not root's.
    again = ["env", "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-m", "agent.sandbox", "demo", *argv]
    os.execv(sudo, ["sudo", *again])  # noqa: S606 (no shell is wanted)


def _wireguard() -> str:
    """Return which WireGuard there is, in words, having looked for everything else as well."""
    missing = [name for name in ("ip", "ping") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {' and '.join(missing)}", "`make demo` installs what is missing, on Debian"
        )
    if asyncio.run(kernel_has_wireguard()):
        return "the kernel's"
    if shutil.which("wireguard-go") is None:
        raise ConfigError(
            "this kernel has no WireGuard, and wireguard-go is not installed",
            "`make demo` installs it, on Debian",
        )
    if not os.path.exists("/dev/net/tun"):  # noqa: PTH110 (a device, not a path of ours)
        raise ConfigError(
            "this kernel has no WireGuard, and there is no /dev/net/tun for wireguard-go",
            "load the module tun, or give the container the device",
        )
    return "wireguard-go (this kernel has none)"
