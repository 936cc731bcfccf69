"""``python -m tests.lab run -- COMMAND``: a command on a kernel that has WireGuard.

Exit status: the command's own; 124 when the guest ran past its time; 125 when it never ran it.
"""

import argparse
import sys
from pathlib import Path

from tests.lab.kernel import LabUnavailableError, fetch
from tests.lab.machine import MEMORY, NEVER_RAN, TIMEOUT, Boot, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("fetch", help="fetch and unpack the kernel, and say where it is")
    runs = commands.add_parser("run", help="boot, run a command, power off")
    runs.add_argument("--systemd", action="store_true", help="run it as a unit under systemd")
    runs.add_argument("--memory", type=int, default=MEMORY, metavar="MIB")
    runs.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS")
    runs.add_argument("--out", type=Path, help="the folder that the guest sees as $LAB_OUT")
    runs.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    runs.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    try:
        if options.action == "fetch":
            print(fetch().image)
            return 0
        boot = Boot(
            command=tuple(options.command),
            systemd=options.systemd,
            memory=options.memory,
            timeout=options.timeout,
            env=dict(pair.split("=", 1) for pair in options.env),
        )
        return run(boot, out=options.out)
    except LabUnavailableError as error:
        print(f"lab: {error}", file=sys.stderr)
        return NEVER_RAN


if __name__ == "__main__":
    sys.exit(main())
