"""``make bench``: every figure, as a table and in build/bench.json.

The figures on WireGuard itself are measured on this kernel where it has WireGuard, else on the lab's; the
others here. Each part is a process in a network namespace of its own. The exit status says nothing of the
figures. ``BENCH_ONLY`` names some of them; ``BENCH_SCALE`` below 1 makes all of it smaller, to try the bench.
"""

import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

from tests.bench.figures import KINDS, Figure, document, load, table
from tests.support import needs
from tests.support.netns import Network

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build"
MEMORY = 8192
"""MiB of the lab's guest: 100,000 peers in its kernel, the agent, and a root that is kept in memory."""
LIMIT = 4 * 3600.0


def _part(path: Path, *argv: str) -> dict[str, Figure]:
    """Run a part in a namespace of its own; what it measured."""
    path.unlink(missing_ok=True)
    with Network() as network:
        space = network.namespace("bench")
        subprocess.run(space.argv(sys.executable, *argv), cwd=ROOT, check=False, timeout=LIMIT)
    return load(path)


def _in_the_lab(path: Path, *argv: str) -> dict[str, Figure]:
    path.unlink(missing_ok=True)
    env = [f"BENCH_ONLY={os.environ['BENCH_ONLY']}"] if "BENCH_ONLY" in os.environ else []
    lab = [
        "-m",
        "tests.lab",
        "run",
        "--memory",
        str(MEMORY),
        "--timeout",
        str(LIMIT),
        "--out",
        str(path.parent),
    ]
    command = [sys.executable, *lab, *(f"--env={pair}" for pair in env), "--", sys.executable, *argv]
    subprocess.run(command, cwd=ROOT, check=False, timeout=LIMIT + 60)
    return load(path)


def main() -> None:
    only = set(os.environ.get("BENCH_ONLY", "").split()) or set(KINDS)
    seed = int(os.environ.get("BENCH_SEED") or random.SystemRandom().randrange(1_000_000))
    scale = float(os.environ.get("BENCH_SCALE", "1"))
    OUT.mkdir(exist_ok=True)
    parts = OUT / "bench-parts"
    parts.mkdir(exist_ok=True)
    figures: dict[str, Figure] = {}
    reason = needs.no_kernel_wireguard()
    machine = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} processors"
    native = {"idle_cpu_10k", "rss_10k", "rss_100k", "fleet_200"}
    if only - native:
        kernel = parts / "kernel.json"
        if reason is None:
            figures |= _part(kernel, "-m", "tests.bench.kernel", str(kernel), str(seed), str(scale))
        else:
            machine += f"; WireGuard in the lab ({reason})"
            argv = ("-m", "tests.bench.kernel", "/lab/out/kernel.json", str(seed), str(scale))
            figures |= _in_the_lab(kernel, *argv)
    number = max(20, int(10_000 * scale))
    if only & {"idle_cpu_10k", "rss_10k"}:
        path = parts / "idle.json"
        figures |= _part(path, "-m", "tests.bench.idle", str(number), "series", str(path), str(seed))
    if "rss_100k" in only:
        path = parts / "rss.json"
        figures |= _part(path, "-m", "tests.bench.idle", str(10 * number), "none", str(path), str(seed))
    if "fleet_200" in only:
        path = parts / "fleet.json"
        figures |= _part(path, "-m", "tests.bench.fleet", str(path), str(seed), str(scale))
    (OUT / "bench.json").write_text(json.dumps(document(figures, machine, seed), indent=1) + "\n")
    print(f"\n{machine}; seed {seed}; build/bench.json has the raw figures\n{table(figures)}")


if __name__ == "__main__":
    main()
