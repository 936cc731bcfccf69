"""A client that pings all the time, what it may receive, and the judgement of what it did receive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from tests.support.client import Client
from tests.support.netns import Pinger

SILENCE: Final = 1.0
"""Seconds without a reply that count as silence; single losses are counted by their numbers."""


@dataclass
class Held:
    """The session that a client uses, as core granted it last.

    ``expires_at`` is in core's time. The agent anchored the deadline on its wall clock while that was
    stepped by ``stepped_low`` to ``stepped_high`` seconds: a range where a step fell beside the grant.
    It may end ``early`` seconds before that.
    """

    id: str
    psk: str
    expires_at: float
    stepped_low: float
    stepped_high: float
    early: float

    def may_be_anchored(self, stepped: float) -> None:
        """The agent may have got to it while its wall clock was stepped by so much."""
        self.stepped_low = min(self.stepped_low, stepped)
        self.stepped_high = max(self.stepped_high, stepped)


@dataclass
class Watched:
    """One client; times are monotonic seconds.

    ``sure`` are the times in which nothing was done to it that could cost it a packet, ``off`` those in
    which it had no business on the VPN. Between them is what can't be said to the millisecond.
    """

    client: Client
    pings: Pinger
    held: Held | None = None
    connected_with: str = ""
    sure_since: float | None = None
    off_since: float | None = None
    sure: list[tuple[float, float]] = field(default_factory=list)
    off: list[tuple[float, float]] = field(default_factory=list)

    def admitted(self, at: float) -> None:
        """It may be on the VPN from now on."""
        if self.off_since is not None:
            self.off.append((self.off_since, max(self.off_since, at)))
        self.off_since = None

    def disturbed(self, at: float) -> None:
        """Something is done to it from now on."""
        if self.sure_since is not None and at > self.sure_since:
            self.sure.append((self.sure_since, at))
        self.sure_since = None

    def ended(self, at: float) -> None:
        """It has no business on the VPN from now on."""
        if self.off_since is None:
            self.off_since = at

    def finish(self, at: float) -> None:
        """The run is over."""
        self.disturbed(at)
        self.admitted(at)


@dataclass(frozen=True, slots=True)
class Judgement:
    """``overrun``: the latest reply past an end in seconds, ``ends`` how many there were.

    ``lost``: requests without a reply in the times in which nothing was done to their client, out of
    ``sure`` seconds. ``faults`` says in words what was wrong, and ``when`` from when to when (monotonic).
    """

    overrun: float
    ends: int
    lost: int
    sure: float
    faults: tuple[str, ...]
    when: tuple[tuple[float, float], ...]


def judge(clients: Iterable[Watched], slack: float) -> Judgement:
    """Judge a run that has ended: nobody's reply came more than ``slack`` past the end, nobody missed one."""
    overrun, ends, lost, sure = float("-inf"), 0, 0, 0.0
    faults: list[str] = []
    when: list[tuple[float, float]] = []
    for watched in clients:
        name, replies = watched.client.name, watched.pings.replies()
        for since, until in watched.off:
            late = [at for _, at in replies if since < at < until]
            ends += 1
            overrun = max(overrun, late[-1] - since if late else 0.0)
            if late and late[-1] > since + slack:
                past = f"up to {late[-1] - since:.2f} s past its end at {since:.1f}"
                faults.append(f"{name} had {len(late)} replies {past}")
                when.append((since, late[-1]))
        for since, until in watched.sure:
            within = [(number, at) for number, at in replies if since <= at <= until]
            missing = within[-1][0] - within[0][0] + 1 - len(within) if within else 0
            last = within[-1][1] if within else since
            sure += until - since
            lost += max(0, missing)
            if missing > 0:
                faults.append(f"{name} lost {missing} packets in {until - since:.1f} s, up to {until:.1f}")
                when.append((since, until))
            if until - last > SILENCE:
                faults.append(f"{name} was not answered for {until - last:.1f} s, up to {until:.1f}")
                when.append((last, until))
    return Judgement(overrun, ends, lost, sure, tuple(faults), tuple(when))
