"""A program that looks at a WireGuard interface over and over, as ``wg show`` has it.

    python3 -I look_on.py INTERFACE PAUSE

After each look, and then PAUSE seconds, it prints a line: monotonic time, peers, and how many of them have
allowed IPs. It imports little and starts ``wg`` from a small process, so that looking on takes next to
nothing from what is looked at. It ends once nobody reads what it prints.
"""

import contextlib
import os
import subprocess
import sys
import time


def main(interface: str, pause: float) -> None:
    """Look until nobody listens any more."""
    # Whatever changes an interface makes ``wg`` begin anew: a slow look would only end when all is over.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    while True:
        shown = subprocess.run(
            ["wg", "show", interface, "allowed-ips"], stdout=subprocess.PIPE, check=False
        ).stdout
        peers = shown.count(b"\n")
        os.write(1, f"{time.monotonic():.4f} {peers} {peers - shown.count(b'(none)')}\n".encode())
        time.sleep(pause)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1], float(sys.argv[2]))
