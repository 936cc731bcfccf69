"""What the adapters and the reconciler know of each other.

Adapters never import one another: sources of events are given an ``Inbox``, senders of reports a
``Reports``, the operator's socket an ``Operator``; ``intake``, ``reporting`` and ``desk`` implement them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agent.acl import Acl
from agent.fence import Position, Verdict
from agent.guard import Admission, GuardContents
from agent.model import (
    Change,
    Identity,
    InterfaceAddress,
    InterfaceSettings,
    Peer,
    PeerStats,
    Prefix,
    PublicKey,
    RefusedPeer,
    SessionEnd,
    Snapshot,
)
from agent.plan import Drift
from agent.wireguard.device import Device

__all__ = [
    "AccessRules",
    "Applied",
    "Guard",
    "Inbox",
    "Link",
    "Operator",
    "Outcome",
    "Position",
    "Reports",
    "StatsReport",
    "Verdict",
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a delivered message, given once the kernel has acknowledged what came of it.

    ``refused`` is the whole current list; ``position`` is what is held afterwards, None before the
    first state.
    """

    verdict: Verdict
    position: Position | None
    refused: tuple[RefusedPeer, ...] = ()


class Inbox(Protocol):
    """Where the sources of events put them: the reconciler's queue."""

    pull_wanted: asyncio.Event
    """Set when only GET state can help; whoever pulls clears it before the request."""

    @property
    def position(self) -> Position | None:
        """What is held now; None before the first pull of this process."""

    def holds(self, peer: Peer) -> bool:
        """Whether this peer is listed and let in already, by the session that its entry shows."""

    def submit(self, message: Snapshot | Sequence[Change], received_at: float) -> asyncio.Future[Outcome]:
        """Queue a snapshot, or changes in their order; ``received_at`` is ``time.monotonic()``.

        The future ends with the outcome once the kernel holds it, or with an AgentError.
        """

    async def dismantle(self) -> None:
        """Remove the interface, since core has deleted this gateway; raises DeviceError.

        A state without anybody comes before, and the next one makes the interface anew.
        """

    def heard(self) -> None:
        """Bytes came from core just now (any answer, any byte of the stream)."""

    def core_answered(self) -> None:
        """The last exchange with core succeeded (a pull, a poll, life on the stream)."""

    def core_failed(self, error: Exception) -> None:
        """The last exchange with core failed; counts as unreachable until the next success."""

    def core_sent_rubbish(self, error: Exception) -> None:
        """Core sent something invalid, which was refused whole (wg_agent_core_invalid_total)."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A revision is in the kernel; ``applied_at`` in core's time, ``refused`` the whole current list."""

    epoch: str
    revision: int
    applied_at: float
    refused: tuple[RefusedPeer, ...]


@dataclass(frozen=True, slots=True)
class StatsReport:
    """Peers that changed since the last accepted report; at most the asked-for number of them."""

    epoch: str
    revision: int
    sent_at: float
    peers: tuple[PeerStats, ...]


class Reports(Protocol):
    """What there is to tell core; each kind is given again until it was accepted."""

    async def pending(self) -> None:
        """Return when there is something to send."""

    def applied(self) -> Applied | None:
        """The newest revision in the kernel that core has not acknowledged."""

    def applied_accepted(self, applied: Applied) -> None:
        """Core took it."""

    def stats(self, limit: int) -> StatsReport | None:
        """Up to ``limit`` changed peers, None if there is nothing to report or before the first state."""

    def stats_accepted(self, report: StatsReport) -> None:
        """Core took it: these peers are due again only when they have changed since."""

    def ends(self, limit: int) -> tuple[SessionEnd, ...]:
        """Up to ``limit`` session ends that core has not acknowledged, oldest first."""

    async def ends_accepted(self, ends: Sequence[SessionEnd]) -> None:
        """Core took them; returns once the journal has forgotten them."""


class Link(Protocol):
    """The WireGuard interface as a whole: the link with its settings, and the device behind it.

    Every method may be repeated, changes only what differs and raises DeviceError.
    """

    addresses: tuple[InterfaceAddress, ...]
    """The addresses that the agent has put on the interface, now or in an earlier life."""

    listen_port: int | None
    """The port that ``configure`` set, None if it left the port alone; so for ``fwmark``."""
    fwmark: int | None

    @property
    def device(self) -> Device:
        """The device; not before ``ensure``."""

    async def ensure(self) -> bool:
        """Find the interface or make it, down; return whether it was made anew."""

    async def configure(self, settings: InterfaceSettings, identity: Identity | None) -> list[str]:
        """Set key, port, fwmark, MTU and addresses, core's values before the configuration's.

        ``identity`` is the key pair that core has handed out, if it has; it is kept for the next start.
        Returns what had to be changed, in words.
        """

    async def bring_up(self) -> bool:
        """Bring the interface up; return whether it is: the operator's commands may have to run first."""

    async def drift(self) -> Sequence[Drift]:
        """How the link differs from what ``configure`` and ``bring_up`` have last made of it.

        What the device itself shows (key, port, fwmark, peers) is not among it.
        """

    async def before_removal(self) -> None:
        """Run the operator's commands that come before the interface goes for good."""

    async def after_removal(self) -> None:
        """Run those that come after."""

    async def remove(self) -> None:
        """Remove the interface, if it is there; ``ensure`` makes it anew."""

    async def close(self) -> None:
        """Let go of the device; the interface stays."""


class Guard(Protocol):
    """The kernel's own guard over the interface (rules 11 to 13): it ends sessions without the agent.

    Every method may be repeated, is all or nothing, and raises GuardError. Order on a grant: element,
    then peer; on an end: peer, then element; when the link was made: table, then peers, then up.
    """

    async def read(self) -> GuardContents | None:
        """What our table holds now, with the seconds that are left; None if there is no table."""

    def untouched(self) -> bool:
        """Whether the table is as it was last read, but for what was changed here since.

        False where that is not known.
        """

    def mute(self) -> None:
        """Hear nothing of changes until ``unmute``: a long change of our own begins."""

    async def unmute(self) -> None:
        """It is over; raises GuardDrifted if the table is not whole any more."""

    async def raise_(
        self,
        admissions: Mapping[PublicKey, Admission],
        lease: float | None,
        there: Collection[PublicKey] = (),
    ) -> Mapping[PublicKey, str]:
        """Have the table, whole, and these peers admitted; return who could not be, and why.

        ``there``: who is admitted just so by a table that is there (``adopt_10k``).

        A missing table is made with them in it at once; one that is there is adopted, keeps its
        elements and loses no packet. Has to be called after the link was made (again): the chain at
        its ingress hook goes with it. ``lease`` as for ``renew_lease``.
        """

    async def lower(self) -> bool:
        """Remove the table; return whether it was there."""

    async def admit(self, admissions: Mapping[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        """Write these peers' elements anew; return who could not be admitted, and why.

        No packet of a peer that was admitted before is lost, and no peer holds back another. A peer
        that needs a session stays barred without one, also within an exempt peer's wider prefix.
        """

    async def dismiss(self, prefixes: Iterable[Prefix]) -> None:
        """Remove what there is of these prefixes, expired or not; before a new owner is admitted."""

    async def renew_lease(self, seconds: float | None) -> None:
        """Let sessions' traffic pass for so many seconds from now; None or 0: no lease is asked for."""

    async def disturbed(self) -> None:
        """Return once the table itself was changed since the last call, perhaps by us: read it."""

    def close(self) -> None:
        """Let go of nftables; the table stays."""


class AccessRules(Protocol):
    """Where core's access rules are put in force, beside the guard and without bearing on sessions."""

    async def put(self, acl: Acl | None) -> None:
        """Have these in force, or none (None): at once, and no packet passes that neither allows.

        Raises GuardError; what was in force before then stays.
        """


class Operator(Protocol):
    """What the operator's socket can ask of the daemon; answers are JSON-ready."""

    async def status(self) -> dict[str, Any]:
        """The document of ``wg-agent status --json``, made for this caller, who may take it apart."""

    async def plan(self) -> dict[str, Any]:
        """Read the interface and return what a reconcile would change now, changing nothing."""

    def explain(self, what: str) -> dict[str, Any]:
        """Why the peers that a key, an address or a name means are on the interface or not."""

    async def events(
        self, after: int | None, limit: int, wait: float, process: str | None = None, who: str | None = None
    ) -> dict[str, Any]:
        """The audit trail behind the occurrence of this number; None: its last ``limit``.

        If there is none, one is waited for, so many seconds at most; where many wait already, not at all.
        ``process`` is the one that counted: of another, the whole trail is behind any number. ``who`` is
        the only peer that matters, by its name or the beginning of its key. The answer has the ``last``
        number, ``missed`` (how many behind ``after`` are not known any more) and the ``process``.
        """

    async def end(self, keys: Sequence[PublicKey] | None) -> dict[str, Any]:
        """End the sessions of these peers (None: all); returns once they are off the interface."""
