"""What an agent costs that has nothing to do: processor time and memory.

``python -m tests.bench.idle PEERS SERIES FILE SEED`` measures one agent, in a namespace of its own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from agent import timers
from tests.bench.figures import Figure, save
from tests.bench.gateway import METRICS_PORT, sh
from tests.bench.generator import GeneratorCore
from tests.bench.manager import Manager
from tests.bench.peers import Population, entry, session, state
from tests.support.netns import interface_name

LASTS = 80_000.0
SCRAPE, TICK, TICKS = 15.0, 30.0, 3
_EMPTY_LOOP = """
import asyncio
async def main():
    while True:
        await asyncio.sleep(%s)
asyncio.run(main())
"""


def _configure(folder: Path, interface: str, url: str, *, per_peer: bool) -> None:
    token = folder / "token"
    token.write_text("bench-token")
    token.chmod(0o600)
    (folder / "agent.toml").write_text(
        f"""
[interface]
name = "{interface}"
[core]
url = "{url}"
token_file = "{token}"
max_body = 268435456
[sessions]
idle_timeout = 86400
connect_timeout = 86400
[stats]
interval = {TICK}
[http]
listen = "127.0.0.1:{METRICS_PORT}"
[metrics]
per_peer = {"true" if per_peer else "false"}
[paths]
state = "{folder}/state"
runtime = "{folder}/run"
[log]
format = "json"
"""
    )


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _megabytes(pid: int, field: str) -> float:
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def _scrape() -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=60) as answer:
        return len(answer.read())


def measure(folder: Path, population: Population, count: int, *, per_peer: bool) -> dict[str, Any]:
    """Let one agent hold so many peers, and look at it for three ticks."""
    interface = interface_name()
    # The guard's chain wants a link of that name at its hook.
    sh("ip", "link", "add", interface, "type", "veth", "peer", "name", f"{interface}-")
    manager, core = Manager(folder / "notify"), GeneratorCore(folder / "core.sock")
    _configure(folder, interface, core.url, per_peer=per_peer)
    peers = population.first(count)
    core.serve(state([entry(peer, session(peer, LASTS)) for peer in peers], 1), 1)
    core.start()
    with (folder / "agent.log").open("wb") as log:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "tests.bench.idle_agent", str(folder)], stderr=log)
    # What waking up costs on this machine, whatever is done then.
    wakes = timers.TICK / 2
    empty = subprocess.Popen([sys.executable, "-c", _EMPTY_LOOP % wakes])
    try:
        if manager.wait_ready(began, 600) is None:
            raise TimeoutError((folder / "agent.log").read_text()[-2000:])
        ready = time.monotonic() - began
        peak = _megabytes(process.pid, "VmHWM")
        # The first look and the first scrape make what later ones keep.
        _scrape()
        time.sleep(TICK)
        size, cpu, since = 0, _cpu(process.pid), time.monotonic()
        empty_cpu = _cpu(empty.pid)
        for scrapes in range(1, int(TICKS * TICK / SCRAPE) + 1):
            time.sleep(max(0.0, since + scrapes * SCRAPE - time.monotonic()))
            size = _scrape()
        lasted = time.monotonic() - since
        used = (_cpu(process.pid) - cpu) / lasted
        memory = _megabytes(process.pid, "VmRSS")
        return {
            "cores": used,
            "cores_of_an_empty_loop": (_cpu(empty.pid) - empty_cpu) / lasted,
            "wakes_of_an_empty_loop_per_s": 1 / wakes,
            "rss_mb": memory,
            "peak_while_loading_mb": peak,
            "peak_mb": _megabytes(process.pid, "VmHWM"),
            "ready_s": ready,
            "scrape_bytes": size,
            "peers": count,
            "device": "a stand-in that costs nothing",
        }
    finally:
        for started in (process, empty):
            started.kill()
            started.wait()
        core.close()
        manager.close()
        sh("ip", "link", "delete", interface)


def main() -> int:
    count, per_peer, path, seed = (
        int(sys.argv[1]),
        sys.argv[2] == "series",
        Path(sys.argv[3]),
        int(sys.argv[4]),
    )
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        raw = measure(folder, Population(seed), count, per_peer=per_peer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raw = {name: round(value, 5) if isinstance(value, float) else value for name, value in raw.items()}
    if per_peer:
        save({"idle_cpu_10k": Figure(raw["cores"], raw), "rss_10k": Figure(raw["rss_mb"], raw)}, path)
    else:
        save({"rss_100k": Figure(raw["rss_mb"], raw)}, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
