"""One session: when it ends, and whether its peer shows life.

A deadline is kept on two clocks and the earlier one counts: boot time cannot be stepped, the wall
clock survives a reboot. It is anchored once, when the session (or another ``expires_at``) is first
seen, so that no later step of any clock can lengthen it (rule 9).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from msgspec import Struct
from msgspec.structs import replace

from agent.model import EndReason, Grant, Now, PresharedKey, PublicKey, SessionPolicy

HANDSHAKE_LIFETIME = 180.0
"""Seconds after a handshake during which WireGuard still takes data under its keys (REJECT_AFTER_TIME)."""
_PART = 128
"""Once one in so many deadlines has come at once, looking at all costs less than taking one after another."""


class Deadline(Struct, frozen=True, gc=False):
    """A moment on both clocks; ``boot`` is None when it was anchored under another boot."""

    boot: float | None
    wall: float

    def passed(self, now: Now) -> bool:
        """Whether either clock has reached it."""
        return now.wall >= self.wall or (self.boot is not None and now.boot >= self.boot)

    def remaining(self, now: Now) -> float:
        """Seconds left on the clock that has fewer; negative once passed."""
        left = self.wall - now.wall
        return left if self.boot is None else min(left, self.boot - now.boot)

    def earlier_by(self, seconds: float) -> Deadline:
        """The same deadline moved forward, on the clocks it was anchored to."""
        return Deadline(None if self.boot is None else self.boot - seconds, self.wall - seconds)


def anchor(ends_at: float, core_time: float, now: Now) -> Deadline:
    """Return the deadline of a session that ends at ``ends_at`` by core's clock, now at ``core_time``."""
    remainder = ends_at - core_time
    return Deadline(now.boot + remainder, now.wall + remainder)


@dataclass(frozen=True, slots=True)
class CoreClock:
    """Core's time, from a pull: ``server_time`` at boot time ``requested_at``."""

    server_time: float
    requested_at: float

    def at(self, now: Now) -> float:
        """Core's time now; ahead of the truth by at most the request's duration."""
        return self.server_time + now.boot - self.requested_at


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The stricter of core's and the configuration's limits, in seconds.

    ``idle_timeout`` and ``connect_timeout`` are None where core judges liveness.
    """

    max_lifetime: float
    idle_timeout: float | None
    connect_timeout: float | None


@dataclass(frozen=True, slots=True)
class Limits:
    """The configuration's own ceilings in seconds."""

    max_lifetime: float = 86400.0
    idle_timeout: float = 300.0
    connect_timeout: float = 180.0

    def with_policy(self, policy: SessionPolicy) -> Ceilings:
        """The stricter of these and core's."""

        def stricter(own: float, cores: float | None) -> float:
            return own if cores is None else min(own, cores)

        judged_here = policy.liveness == "gateway"
        return Ceilings(
            stricter(self.max_lifetime, policy.max_lifetime),
            stricter(self.idle_timeout, policy.idle_timeout) if judged_here else None,
            stricter(self.connect_timeout, policy.connect_timeout) if judged_here else None,
        )


class Session(Struct, frozen=True, gc=False):
    """A session that has not ended.

    ``preshared_key`` is None until core names it again after a restart that could not read it back
    from the interface; ``journalled_digest`` knows it meanwhile, and ``former_digest`` the one before the
    last renewal, which the interface still holds if the agent died in the middle of that. ``ends_at`` is
    the hard end in core's time under the ceilings of the day it was anchored, ``deadline`` the same on
    the host's clocks.
    ``in_use`` tells whether the peer is on the interface because of it: one granted to a peer that
    needs none is only held. ``base_rx`` and ``base_tx`` are the peer's counters when it began.
    """

    id: str
    public_key: PublicKey
    preshared_key: PresharedKey | None
    granted_at: float
    expires_at: float
    ends_at: float
    deadline: Deadline
    in_use: bool
    base_rx: int
    base_tx: int
    former_digest: bytes | None = None
    journalled_digest: bytes | None = None

    @property
    def psk_digest(self) -> bytes:
        """SHA-256 of the PSK; empty where not even that is known, which is no PSK's."""
        return self.journalled_digest or b"" if self.preshared_key is None else self.preshared_key.digest()

    def core_time(self, now: Now) -> float:
        """Core's time as this session's anchor tells it, for when core itself can't be asked."""
        return self.ends_at - self.deadline.remaining(now)

    def renewed(self, grant: Grant, max_lifetime: float, core_time: float, now: Now) -> Session:
        """The session after the same id was granted again: the deadline moves only if ``expires_at`` did.

        One that was anchored under another boot gains a boot deadline beside the wall's.
        """
        if self._is_of(grant):
            return self
        before, digest = self.psk_digest, grant.preshared_key.digest()
        session = replace(
            self,
            preshared_key=grant.preshared_key,
            former_digest=self.former_digest if digest == before else before,
            journalled_digest=None,
        )
        if grant.expires_at == self.expires_at:
            if self.deadline.boot is None:
                boot = anchor(self.ends_at, core_time, now).boot
                return replace(session, deadline=Deadline(boot, self.deadline.wall))
            return session
        ends_at = hard_end(grant, self.granted_at, max_lifetime, core_time)
        return replace(
            session,
            expires_at=grant.expires_at,
            ends_at=ends_at,
            deadline=anchor(ends_at, core_time, now),
        )

    def _is_of(self, grant: Grant) -> bool:
        """Whether this grant brings nothing new, as nearly all of a list that is pulled again."""
        return (
            grant.expires_at == self.expires_at
            and grant.preshared_key == self.preshared_key
            and self.deadline.boot is not None
        )

    def lowered(self, max_lifetime: float) -> Session:
        """The session under these ceilings: earlier where they are stricter, never later."""
        ends_at = min(self.ends_at, self.granted_at + max_lifetime)
        if ends_at == self.ends_at:
            return self
        return replace(self, ends_at=ends_at, deadline=self.deadline.earlier_by(self.ends_at - ends_at))


def hard_end(grant: Grant, began: float, max_lifetime: float, core_time: float) -> float:
    """Return the latest moment of a grant in core's time.

    A ``granted_at`` that is still to come counts as now: it can't put off the operator's ceiling.
    ``began`` is the session's own, which the grant need not name.
    """
    return min(grant.expires_at, min(began, core_time) + max_lifetime)


def begin(
    key: PublicKey,
    grant: Grant,
    *,
    max_lifetime: float,
    core_time: float,
    now: Now,
    in_use: bool,
    base: tuple[int, int],
) -> Session:
    """Return the session that a grant begins; ``base`` is the peer's (rx, tx) in bytes so far."""
    began = core_time if grant.granted_at is None else grant.granted_at
    ends_at = hard_end(grant, began, max_lifetime, core_time)
    return Session(
        id=grant.id,
        public_key=key,
        preshared_key=grant.preshared_key,
        granted_at=began,
        expires_at=grant.expires_at,
        ends_at=ends_at,
        deadline=anchor(ends_at, core_time, now),
        in_use=in_use,
        base_rx=base[0],
        base_tx=base[1],
    )


class Liveness(Struct, frozen=True, gc=False):
    """Signs of life during one stay of a peer on the interface; all times are boot time (rule 7).

    ``latest_handshake`` is the kernel's own stamp (Unix seconds), kept to see it change.
    """

    added_at: float
    latest_handshake: float = 0.0
    handshake_seen_at: float | None = None
    last_sign_at: float | None = None

    def observed(self, latest_handshake: float, rx_grew: bool, now: Now) -> Liveness:
        """The liveness after one look: a changed handshake is a sign, so is rx growing soon after one.

        A client without the PSK grows rx too, hence the bound by the handshake's own lifetime.
        """
        if latest_handshake and latest_handshake != self.latest_handshake:
            return Liveness(self.added_at, latest_handshake, now.boot, now.boot)
        if (
            rx_grew
            and self.handshake_seen_at is not None
            and now.boot - self.handshake_seen_at < HANDSHAKE_LIFETIME
        ):
            return replace(self, last_sign_at=now.boot)
        return self

    def lapses_at(self, ceilings: Ceilings) -> float:
        """When it lapses unless there is another sign of life, in boot time; infinity for never."""
        if self.last_sign_at is None:
            timeout, since = ceilings.connect_timeout, self.added_at
        else:
            timeout, since = ceilings.idle_timeout, max(self.last_sign_at, self.added_at)
        return math.inf if timeout is None else since + timeout

    def lapsed(self, ceilings: Ceilings, now: Now) -> EndReason | None:
        """Why the session is to end for lack of life, if it is; to be asked right after a look."""
        if now.boot < self.lapses_at(ceilings):
            return None
        return EndReason.NEVER_CONNECTED if self.last_sign_at is None else EndReason.IDLE


class _Due(Struct, frozen=True, order=True, gc=False):
    """A deadline on one clock; half the size of a tuple (``rss_100k``)."""

    at: float
    key: PublicKey


class DeadlineQueue:
    """The earliest deadline of many, on both clocks, at O(log n) a change.

    Entries are left behind when a session ends or its deadline moves; whoever asks checks what comes
    out against the session itself.
    """

    def __init__(self) -> None:
        self._boot: list[_Due] = []
        self._wall: list[_Due] = []

    def put(self, key: PublicKey, deadline: Deadline) -> None:
        """Add a deadline of this peer's session."""
        if deadline.boot is not None:
            heapq.heappush(self._boot, _Due(deadline.boot, key))
        heapq.heappush(self._wall, _Due(deadline.wall, key))

    def due(self, now: Now) -> set[PublicKey]:
        """Take out and return the peers that had a deadline by now, outdated ones among them."""
        return _take_due(self._boot, now.boot) | _take_due(self._wall, now.wall)

    def wait(self, now: Now) -> float | None:
        """Seconds to the earliest entry (0 if past), None if there is none."""
        waits = [
            heap[0].at - moment for heap, moment in ((self._boot, now.boot), (self._wall, now.wall)) if heap
        ]
        return max(0.0, min(waits)) if waits else None

    def __len__(self) -> int:
        return len(self._wall)

    def rebuild(self, deadlines: dict[PublicKey, Deadline]) -> None:
        """Start over from these, dropping what was left behind."""
        self._boot = [_Due(d.boot, k) for k, d in deadlines.items() if d.boot is not None]
        self._wall = [_Due(d.wall, k) for k, d in deadlines.items()]
        heapq.heapify(self._boot)
        heapq.heapify(self._wall)


def _take_due(heap: list[_Due], moment: float) -> set[PublicKey]:
    """Take what is due out of a heap: one by one, or all at once if that is a good part of it."""
    keys: set[PublicKey] = set()
    for _ in range(1 + len(heap) // _PART):
        if not heap or heap[0].at > moment:
            return keys
        keys.add(heapq.heappop(heap).key)
    keys |= {due.key for due in heap if due.at <= moment}
    heap[:] = [due for due in heap if due.at > moment]
    heapq.heapify(heap)
    return keys
