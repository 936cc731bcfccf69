"""Two hundred agents after core restarts: ``python -m tests.bench.fleet FILE SEED SCALE``.

Each agent is the real client, inbox, reconciler, journal and reports with a stand-in in WireGuard's place and
without the guard; fifty of them share a process. Core comes back with another revision, as one that was
changed meanwhile.
"""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from agent import clock
from agent.core.http import CoreClient
from agent.core.reports import Reporter
from agent.core.sync import CoreSync
from agent.journal import Journal
from agent.metrics import Metrics
from agent.model import PublicKey
from agent.reconciler import Reconciler
from agent.sessions import Limits
from agent.state import State
from agent.timers import Timers
from tests.bench.figures import Figure, percentile, save
from tests.bench.generator import GeneratorCore
from tests.bench.peers import Population, entry, session, state
from tests.bench.stand_in import StandInLink

AGENTS, PROCESSES, PEERS = 200, 4, 500
AWAY = 5.0
"""Seconds that core is gone."""
OWN_KEY = PublicKey(b"\x07" * 32)


async def one_agent(folder: Path, url: str, number: int) -> NoReturn:
    """What the daemon wires together, but for listeners, guard and device."""
    place = folder / f"agent-{number}"
    place.mkdir(mode=0o700)
    held = State(Limits(86_400.0, 86_400.0, 86_400.0), OWN_KEY)
    reconciler = Reconciler(
        interface="wg0",
        state=held,
        link=StandInLink("wg0", OWN_KEY),
        journal=Journal(place, clock.boot_id()),
        metrics=Metrics("wg0", "0", per_peer=False),
    )
    client = CoreClient(url, f"agent-{number}", clock=clock.read, heard=reconciler.inbox.heard)
    sync = CoreSync(client, reconciler.inbox, poll_interval=30)
    reporter = Reporter(client, reconciler.reports, started_at=time.time(), accepted=sync.core_found)
    await reconciler.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(reconciler.run())
        tasks.create_task(sync.run())
        tasks.create_task(reporter.run())
        tasks.create_task(Timers(reconciler, 30.0, lambda: None).run())
    raise AssertionError("an agent does not end")


async def agents(folder: Path, url: str, numbers: range) -> None:
    """The agents of one process."""
    async with asyncio.TaskGroup() as tasks:
        for number in numbers:
            tasks.create_task(one_agent(folder, url, number))


def measure(folder: Path, population: Population, count: int) -> Figure:
    """Start them, take core away, and see when the last one is back."""
    core = GeneratorCore(folder / "core.sock")
    entries = [entry(peer, session(peer, 80_000.0)) for peer in population.first(PEERS)]
    core.serve(state(entries, 1), 1)
    core.start()
    share = -(-count // PROCESSES)
    argv = [sys.executable, "-m", "tests.bench.fleet", "agents", str(folder), core.url]
    starts = range(0, count, share)
    ranges = [(start, min(start + share, count)) for start in starts]
    processes = [subprocess.Popen([*argv, *map(str, bounds)], stdout=subprocess.DEVNULL) for bounds in ranges]
    try:
        core.wait_streams(count, 300)
        time.sleep(2)
        core.stop()
        time.sleep(AWAY)
        core.requests_by.clear()
        core.serve(state(entries, 2), 2)
        core.asks_for_pulls = True
        began = time.monotonic()
        core.start()
        back = core.wait_all_applied(2, count, began, 300)
        requests = list(core.requests_by.values())
        raw = {
            "agents": count,
            "processes": len(processes),
            "peers": PEERS,
            "core_away_s": AWAY,
            "median_s": round(percentile(back, 50), 3),
            "most_requests": max(requests),
            "mean_requests": round(sum(requests) / len(requests), 2),
            "device": "a stand-in that costs nothing, without the guard",
        }
        return Figure(max(back), raw)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        core.close()


def main() -> None:
    if sys.argv[1] == "agents":
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(agents(Path(sys.argv[2]), sys.argv[3], range(int(sys.argv[4]), int(sys.argv[5]))))
        return
    path, seed, scale = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        save({"fleet_200": measure(Path(folder), Population(seed), max(4, int(AGENTS * scale)))}, path)


if __name__ == "__main__":
    main()
