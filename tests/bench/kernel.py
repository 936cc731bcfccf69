"""The figures on WireGuard itself: ``python -m tests.bench.kernel FILE``, in a namespace of its own.

Natively where the kernel has WireGuard, else in the lab. Whatever fails is said in its figure, and the
others go on.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyroute2 import WireGuard

from agent.encoding import parse_public_key
from agent.model import PublicKey, RemovePeer
from agent.wireguard import netlink
from agent.wireguard.interface import find_backend, open_device
from tests.bench import peers as bench_peers
from tests.bench.figures import Figure, percentile, ratio, save
from tests.bench.gateway import Gateway, Here, Pusher, plain, sh, timed, write_setconf
from tests.bench.peers import BenchPeer, Population, entry, session, state
from tests.support.bystander import Bystander, Onlooker

PATIENCE = 900.0
LASTS = 80_000.0
"""Seconds that sessions last which are not to end."""
_LOOK_EVERY = 8.0
WHOLE = 128
"""Removals in a message of the reference."""
Peers = Sequence[BenchPeer]


class Bench:
    """All figures of one gateway; ``scale`` below 1 makes everything smaller, to try the bench itself."""

    def __init__(self, gateway: Gateway, population: Population, scale: float) -> None:
        self.gateway = gateway
        self.core = gateway.core
        self.population = population
        self.scale = scale

    def count(self, count: int) -> int:
        """So many, at this scale."""
        return max(20, int(count * self.scale))

    def serve(self, peers: Peers, lasts: float = LASTS, *, without: Peers = ()) -> None:
        """Core's state from now on: these peers with sessions, all begun now, and some that have none."""
        # Making as many under emulation takes seconds, and they are to end at once.
        now = time.time()
        entries = [entry(peer, session(peer, lasts, began=now)) for peer in peers]
        entries += [entry(peer, None) for peer in without]
        self.core.serve(state(entries, self.core.revision + 1), self.core.revision + 1)

    def pull(self) -> float:
        """Have the state pulled; seconds from its first byte to the word that it is in the kernel."""
        since = time.monotonic()
        self.core.resync()
        applied = self.core.wait_applied(self.core.revision, since, PATIENCE)
        return applied - self.core.sent_from

    def begin(self, peers: Peers, *, interval: float = 3600, without: Peers = ()) -> None:
        """A fresh agent whose interface holds these peers."""
        self.gateway.reset()
        self.gateway.configure(interval=interval)
        self.serve([])
        self.gateway.start()
        self.core.wait_stream()
        self.serve(peers, without=without)
        self.pull()

    # The figures.

    def cold_sync(self, number: int, runs: int) -> Figure:
        """Core's list, and the same peers from a file by ``wg setconf``, in turn."""
        peers, ours, theirs = self.population.first(self.count(number)), [], []
        for _ in range(runs):
            with plain(self.population) as (name, key):
                theirs.append(timed("wg", "setconf", name, write_setconf(self.gateway.folder, key, peers)))
            self.begin([])
            self.serve(peers)
            ours.append(self.pull())
        return ratio(ours, theirs, peers=len(peers), body_bytes=len(self.core.body))

    def resync(self, number: int, runs: int) -> Figure:
        """The whole list again, whole and by a 304."""
        peers, ours, theirs = self.population.first(self.count(number)), [], []
        with plain(self.population) as (name, key):
            conf = write_setconf(self.gateway.folder, key, peers)
            sh("wg", "setconf", name, conf)
            self.begin(peers)
            applies = self.gateway.metric("wg_agent_apply_seconds_count")
            body = self.core.body
            for _ in range(runs):
                theirs.append(timed("wg", "syncconf", name, conf))
                old = self.core.revision
                self.core.serve(
                    body.replace(b'"revision":%d' % old, b'"revision":%d' % (old + 1), 1), old + 1
                )
                body = self.core.body
                ours.append(self.pull())
        sent = self.gateway.metric("wg_agent_apply_seconds_count") - applies
        raw = {"peers": len(peers), "plans_with_set_messages": sent}
        return ratio(ours, theirs, **raw, not_modified_cpu_s=round(self._poll(), 5))

    def _poll(self) -> float:
        """Seconds of processor time that a poll costs which core answers by a 304."""
        self.core.streaming = False
        self.gateway.kill()
        self.gateway.start()
        while not self.core.not_modified:
            time.sleep(0.1)
        # What a start leaves to do besides, such as the first look, is no part of a poll.
        while self._busy() > 0.2:
            time.sleep(1)
        before, cpu = self.core.not_modified, self.gateway.cpu()
        time.sleep(10)
        polls = self.core.not_modified - before
        self.core.streaming = True
        return (self.gateway.cpu() - cpu) / max(1, polls)

    def _busy(self) -> float:
        """The share of a processor that the agent takes in the next two seconds."""
        cpu = self.gateway.cpu()
        time.sleep(2)
        return (self.gateway.cpu() - cpu) / 2

    def grants(self, number: int, grants: int) -> tuple[list[float], list[BenchPeer]]:
        """Push so many grants to an agent that holds ``number`` peers."""
        everybody = self.population.first(number + grants)
        waiting = everybody[number:]
        self.begin(everybody[:number], without=waiting)
        pusher = Pusher(self.gateway)
        took = []
        for peer in waiting:
            data = {"public_key": peer.public_key, "session": session(peer, LASTS)}
            took.append(pusher.push("session_granted", data))
        return took, waiting

    def grant(self) -> Figure:
        """One grant among 10,000, and ``wg set`` as a process."""
        number = self.count(10_000)
        ours, waiting = self.grants(number, self.count(200))
        theirs = []
        with plain(self.population) as (name, key):
            conf = write_setconf(self.gateway.folder, key, self.population.first(number))
            sh("wg", "setconf", name, conf)
            for peer in waiting[:50]:
                argv = ("wg", "set", name, "peer", peer.public_key, "preshared-key", "/dev/stdin")
                ips = ("allowed-ips", ",".join(peer.allowed_ips))
                theirs.append(timed(*argv, *ips, stdin=peer.preshared_key))
        return ratio(ours, theirs, peers=number, p99_s=round(percentile(ours, 99), 5))

    def grant_scaling(self) -> Figure:
        """The slowest of a hundred grants at 100,000 peers and at 1,000."""
        grants = self.count(300)
        many, _ = self.grants(self.count(100_000), grants)
        few, _ = self.grants(self.count(1000), grants)
        p99 = percentile(many, 99), percentile(few, 99)
        raw = {"p99_many_s": p99[0], "p99_few_s": p99[1], "grants": grants}
        raw |= {"median_many_s": statistics.median(many), "median_few_s": statistics.median(few)}
        return Figure(p99[0] / p99[1], raw)

    def expiry(self) -> Figure:
        """Sessions that end one after another among 10,000; core hears of an end once it is in the kernel."""
        number, ends = self.count(10_000), max(20, int(100 * self.scale))
        everybody = self.population.first(number + ends)
        self.begin(everybody[:number], without=everybody[number:])
        pusher, due = Pusher(self.gateway), {}
        first = time.time() + 0.1 * ends + 5
        for order, peer in enumerate(everybody[number:]):
            granted = session(peer, 0)
            due[granted["id"]] = at = round(first + 0.25 * order, 3)
            granted["expires_at"] = bench_peers.when(at)
            pusher.push("session_granted", {"public_key": peer.public_key, "session": granted})
        late: dict[str, float] = {}
        end = time.monotonic() + PATIENCE
        while len(late) < ends and time.monotonic() < end:
            time.sleep(0.5)
            for told in self.core.told("session-ends"):
                for ended in told.body["ends"]:
                    if ended["session_id"] in due:
                        late.setdefault(ended["session_id"], told.wall - due[ended["session_id"]])
        lags = list(late.values())
        raw = {"ends": len(lags), "median_s": statistics.median(lags), "earliest_s": min(lags)}
        return Figure(percentile(lags, 99), raw)

    def mass_expiry(self) -> dict[str, Figure]:
        """10,000 sessions due at once, while another interface is read and this one is looked at.

        So it is while the reference removes as many.
        """
        peers = self.population.first(self.count(10_000))
        alone, theirs = self._removals(peers, watched=False), self._removals(peers, watched=True)
        self.begin([])
        with self._watched(self.gateway.interface) as (bystander, onlooker):
            lasts = 40.0 + 200.0 * len(peers) / 10_000
            due = time.monotonic() + lasts
            self.serve(peers, lasts)
            took = self.pull()
            time.sleep(max(0.0, due - time.monotonic()))
            while (removed := onlooker.removed(0, due - took)) is None:
                if time.monotonic() > due + PATIENCE:
                    raise TimeoutError("the peers are not all removed")
                time.sleep(0.2)
            cut = onlooker.cut(0, removed)
            # The agent counts from when it asked for the list, and so ends sessions early by that.
            began = due - took
            reads = None if bystander is None else bystander.between(min(began, cut - 1), removed)
        raw = {"cut_after_due_s": cut - due, "removed_after_due_s": removed - due}
        raw |= {"reference_s": theirs, "reference_unwatched_s": alone}
        late = max(0.0, cut - due)
        figures = {"mass_expiry_10k": Figure(late / theirs, raw | {"peers": len(peers)})}
        if reads is not None:
            raw = {"reads": reads.reads, "overslept_s": reads.overslept}
            figures["stall_10k"] = Figure(reads.longest, raw)
        return figures

    @contextmanager
    def _watched(self, interface: str) -> Iterator[tuple[Bystander | None, Onlooker]]:
        with ExitStack() as stack:
            here = Here("")
            kernel = asyncio.run(find_backend(interface)) == "kernel"
            bystander = stack.enter_context(Bystander(here)) if kernel else None
            yield bystander, stack.enter_context(Onlooker(here, interface))

    def _removals(self, peers: Peers, *, watched: bool) -> float:
        """Removing them all over netlink, in messages of 128."""
        with plain(self.population) as (name, key), ExitStack() as stack:
            sh("wg", "setconf", name, write_setconf(self.gateway.folder, key, peers))
            if watched:
                stack.enter_context(self._watched(name))
            keys = [PublicKey(parse_public_key(peer.public_key)) for peer in peers]

            # The agent's own messages are smaller, for others' sake.
            usual, netlink.MAX_REMOVALS = netlink.MAX_REMOVALS, WHOLE  # type: ignore[misc]

            async def remove() -> float:
                backend = await find_backend(name)
                assert backend is not None
                device = open_device(name, backend)
                began = time.monotonic()
                for at in range(0, len(keys), WHOLE):
                    await device.apply([RemovePeer(public_key) for public_key in keys[at : at + WHOLE]])
                took = time.monotonic() - began
                await device.close()
                return took

            try:
                return asyncio.run(remove())
            finally:
                netlink.MAX_REMOVALS = usual  # type: ignore[misc]

    def stats_tick(self) -> Figure:
        """Looks at 10,000 peers of which 1 % have moved since the last one, and ``wg show dump``."""
        peers = self.population.first(self.count(10_000))
        self.begin(peers, interval=_LOOK_EVERY)
        name, theirs, ours = self.gateway.interface, [], []
        looked, moved = self._looks(), peers
        for run in range(1, 9):
            # Asking the agent costs it time, too: not while it looks.
            end = time.monotonic() + 120
            while (now := self._looks())[0] == looked[0] and time.monotonic() < end:
                time.sleep(0.2)
            moved = peers[run::100]
            argv = [
                word
                for p in moved
                for word in ("peer", p.public_key, "endpoint", f"192.0.2.{run}:{4000 + run}")
            ]
            sh("wg", "set", name, *argv)
            theirs.append(timed("wg", "show", name, "dump"))
            time.sleep(_LOOK_EVERY + 1)
            looked = self._looks()
            if looked[0] == now[0] + 1:
                ours.append(looked[1] - now[1])
        return ratio(ours[1:], theirs[1:], peers=len(peers), moved=len(moved))

    def _looks(self) -> tuple[float, float]:
        return tuple(self.gateway.metric(f"wg_agent_observation_seconds_{part}") for part in ("count", "sum"))  # type: ignore[return-value]

    def adopt(self) -> Figure:
        """From a fork that has imported everything to READY, with 10,000 peers there and core up."""
        peers = self.population.first(self.count(10_000))
        self.begin(peers)
        ours, alone, theirs = [], [], []
        for _ in range(5):
            theirs.append(timed("wg", "show", self.gateway.interface, "dump"))
            self.gateway.kill()
            ours.append(self.gateway.start())
            self.core.wait_stream()
        for _ in range(3):
            self.gateway.kill()
            self.core.stop()
            alone.append(self.gateway.start())
            self.core.start()
        imports = timed(sys.executable, "-c", "import agent.__main__, agent.daemon")
        return ratio(alone, theirs, peers=len(peers), with_core_s=ours, imports_s=round(imports, 3))

    def pyroute2(self) -> float:
        """Seconds that pyroute2's own class takes to set 1,000 peers, one message each."""
        peers = self.population.first(self.count(1000))
        with plain(self.population) as (name, _):
            wireguard = WireGuard()
            began = time.monotonic()
            for peer in peers:
                one = {
                    "public_key": peer.public_key,
                    "preshared_key": peer.preshared_key,
                    "allowed_ips": list(peer.allowed_ips),
                }
                wireguard.set(name, peer=one)
            took = time.monotonic() - began
            wireguard.close()
        return took


def measure(bench: Bench) -> Iterator[dict[str, Figure]]:
    """Every figure, the quick ones first."""
    figures: list[tuple[str, Callable[[], Figure | dict[str, Figure]]]] = [
        ("cold_sync_10k", lambda: bench.cold_sync(10_000, 5)),
        ("resync_10k", lambda: bench.resync(10_000, 5)),
        ("grant_10k", bench.grant),
        ("expiry_p99_10k", bench.expiry),
        ("mass_expiry_10k", bench.mass_expiry),
        ("stats_tick_10k", bench.stats_tick),
        ("adopt_10k", bench.adopt),
        ("cold_sync_50k", lambda: bench.cold_sync(50_000, 1)),
        ("resync_50k", lambda: bench.resync(50_000, 2)),
        ("grant_p99_scaling", bench.grant_scaling),
    ]
    only = os.environ.get("BENCH_ONLY", "").split()
    for name, work in figures:
        if only and name not in only:
            continue
        began = time.monotonic()
        try:
            seen = work()
        except Exception as error:  # noqa: BLE001 a bench measures what it can
            traceback.print_exc()
            seen = Figure(None, {"why": f"{type(error).__name__}: {error}"})
        yield seen if isinstance(seen, dict) else {name: seen}
        print(f"{name}: {time.monotonic() - began:.0f} s of measuring", flush=True)


@contextmanager
def _bench(seed: int, scale: float) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder)
        path.chmod(0o700)
        with Gateway(path) as gateway:
            yield Bench(gateway, Population(seed), scale)


def main() -> None:
    path, seed, scale = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    figures: dict[str, Figure] = {}
    with _bench(seed, scale) as bench:
        for seen in measure(bench):
            figures |= seen
            # What is there is kept should the rest not come about.
            save(figures, path)
            for name, figure in seen.items():
                print(name, figure.value, dict(figure.raw), flush=True)


if __name__ == "__main__":
    main()
