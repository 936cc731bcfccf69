"""Nobody is on the VPN past the end of their session, and nobody else loses a packet, whatever happens."""

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from tests.reliability.rounds import EARLY, Rounds
from tests.reliability.watched import judge
from tests.support.ledger import FULL, Seen
from tests.support.scenarios import SLACK
from tests.support.site import Site

PATIENT = "[sessions]\nidle_timeout = 7200\nconnect_timeout = 7200"
FAULT = "random events, crashes (SIGKILL at a random moment), hangs, steps of clocks"
HOLDS = "no reply later than the slack past a session's end; no ping lost by a peer nothing was done to"


def run(folder: Path, rounds: int, seen: Seen) -> None:
    rounds = int(os.environ.get("RELIABILITY_ROUNDS") or rounds)
    seed = int(os.environ.get("RELIABILITY_SEED") or random.SystemRandom().randrange(1_000_000))
    print(f"RELIABILITY_SEED={seed} gives this run again, but for the machine's timing")
    location: dict[str, object] = {"idle_timeout": 7200, "connect_timeout": 7200, "max_lifetime": 86400}
    with Site(folder, location=location, agent=PATIENT, forked=True) as site:
        *movers, router = site.add_clients(4)
        site.core.call(site.core.admin.change_device(router.device.id, mfa_exempt=True))
        site.start_agent()
        for client in (*movers, router):
            site.attach(client)
        run = Rounds(site, seed)
        try:
            run.watch(movers, router)
            run.run(rounds)
        finally:
            run.close()
    judgement = judge(run.watched, SLACK)
    did = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in run.did.most_common())
    seen(
        tried=rounds,
        overrun=judgement.overrun,
        lost=judgement.lost,
        note=f"seed {seed}: {judgement.ends} ends, {judgement.sure:.0f} s of undisturbed pings,"
        f" sessions meant to end up to {run.early:.1f} s early ({did})",
    )
    print(
        *(f"{line['timestamp']} {line['what']} took {line['seconds']} s" for line in site.logged("slow")),
        sep="\n",
    )
    if judgement.faults:
        print(*run.trace, *judgement.faults, *_logged(site.log, judgement.when), sep="\n")
    assert judgement.faults == ()
    assert run.early < 2 * EARLY
    assert judgement.ends >= rounds / 10
    assert judgement.sure > rounds


def _logged(log: Path, when: Sequence[tuple[float, float]]) -> Iterator[str]:
    """What the agent logged while something was wrong, each line with its monotonic time."""
    ahead = time.time() - time.monotonic()
    for text in log.read_text().splitlines():
        if text.startswith("{"):
            line = json.loads(text)
            at = datetime.fromisoformat(line.pop("timestamp")).timestamp() - ahead
            if any(since - 5 < at < until + 1 for since, until in when):
                yield f"{at:.2f} {line}"


@pytest.mark.netns
@pytest.mark.userspace
@pytest.mark.timeout(3600)
@pytest.mark.reliability(f"{FAULT}; userspace WireGuard", HOLDS)
def test_it_holds_whatever_happens_on_wireguard_go(tmp_path: Path, seen: Seen) -> None:
    run(tmp_path, 100 if FULL else 6, seen)


@pytest.mark.kernel
@pytest.mark.timeout(9000)
@pytest.mark.reliability(FAULT, HOLDS)
def test_it_holds_whatever_happens_on_the_kernel(tmp_path: Path, seen: Seen) -> None:
    run(tmp_path, 300 if FULL else 3, seen)
