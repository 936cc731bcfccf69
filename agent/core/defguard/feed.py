"""Hands what core tells on one connection to the inbox, and what there is to report to core.

Shared by both generations: they differ in who connects to whom and in the messages, not in this.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import structlog

from agent import clock
from agent.acl import Acl
from agent.core.defguard.messages import (
    AclPut,
    Configuration,
    LocationPut,
    PeerGone,
    PeerPut,
    Update,
)
from agent.core.defguard.picture import Picture
from agent.encoding import format_key
from agent.errors import AgentError, GuardError, InvalidMessage
from agent.model import Change, Now, PeerStats, SessionPolicy, Snapshot
from agent.ports import AccessRules, Inbox, Outcome, Reports, Verdict

STATS_LIMIT: Final = 1_000
T = TypeVar("T")
U = TypeVar("U")
PUT: Final = 5.0
"""Seconds that nftables may take over access rules: revocations wait for them."""
_PULSE: Final = 5.0
"""Seconds between two looks at whether core is still there."""
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Terms:
    """What the configuration says of a Defguard location: who it is, and what core does not tell."""

    location: str
    mfa_required: bool = False
    policy: SessionPolicy = field(default_factory=SessionPolicy)


@dataclass(frozen=True, slots=True)
class Report:
    """One peer's report, in the fields that both generations have."""

    public_key: str
    endpoint: str
    upload: int
    download: int
    keepalive_interval: int
    latest_handshake: float
    allowed_ips: str


class Feed:
    """One connection's worth of core. ``read_clock`` is the host's clock."""

    def __init__(
        self,
        terms: Terms,
        inbox: Inbox,
        reports: Reports,
        acl: AccessRules,
        read_clock: Callable[[], Now] = clock.read,
    ) -> None:
        self._inbox = inbox
        self._reports = reports
        self._acl = acl
        self._clock = read_clock
        self._kept = ""
        self._failure = ""
        self._due: tuple[Acl | None, InvalidMessage | None] | None = None
        """Access rules that are not in force, and why if they can't be read."""
        # A new epoch has every live peer reported again, which core needs of a new connection.
        epoch = f"defguard-{secrets.token_hex(8)}"
        self._picture = Picture(epoch, terms.location, mfa_required=terms.mfa_required, policy=terms.policy)

    async def whole(self, told: Configuration) -> None:
        """Take in a whole configuration; returns once it is in the kernel. Raises InvalidMessage."""
        self._inbox.pull_wanted.clear()
        # Nobody is let in before the rules that hold for them; who has to go goes in any case.
        await self._put(told.acl, told.acl_fault)
        await self._submit(self._picture.whole(told, self._clock()))

    async def nobody(self) -> None:
        """There is no location any more: everybody goes, and what holds for them."""
        await self._submit(self._picture.nothing(self._clock()))
        await self._inbox.dismantle()
        await self._acl.put(None)

    async def updates(self, told: Sequence[Update | InvalidMessage]) -> bool:
        """Take in what came together, in its order; returns whether only the whole can help now."""
        now, updates, due = self._clock(), _last_of_each(told), self._due
        changes = self._revoked(updates, now)
        await self._hand_over(changes)
        for update in updates:
            if isinstance(update, InvalidMessage):
                self._inbox.core_sent_rubbish(update)
                self._inbox.pull_wanted.set()
                continue
            if isinstance(update, AclPut):
                await self._hand_over(changes)
                await self._put(update.acl, update.fault)
                changes += self._released()
                continue
            if isinstance(update, LocationPut) and self._picture.is_whole(update.configuration):
                await self._hand_over(changes)
                await self._put(update.configuration.acl, update.configuration.acl_fault)
            taken = self._picture.take(update, now)
            if isinstance(taken, Snapshot):
                await self._hand_over(changes)
                await self._submit(taken)
            else:
                changes += taken
        await self._hand_over(changes)
        if due is not None and self._due is due:
            await self._put(*due)
            await self._hand_over(list(self._released()))
        return self._picture.in_doubt or self._inbox.pull_wanted.is_set()

    def last_words(self, told: Sequence[object]) -> None:
        """Revoke what was told on a connection that is over, waiting for nothing; the next tells the rest."""
        revoked = self._revoked(_last_of_each(told), self._clock())
        if revoked:
            future = self._inbox.submit(tuple(revoked), clock.monotonic())
            # What becomes of it is seen at the next whole.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _revoked(self, updates: Sequence[object], now: Now) -> list[Change]:
        """Return who is to go, for whom nobody waits."""
        changes: list[Change] = []
        for update in updates:
            if isinstance(update, PeerGone):
                taken = self._picture.take(update, now)
                changes += () if isinstance(taken, Snapshot) else taken
        return changes

    async def _put(self, acl: Acl | None, fault: InvalidMessage | None = None) -> None:
        """Have these access rules in force; while they are not, nobody new is let in, and they are due."""
        failure: AgentError | None = fault
        if failure is None:
            try:
                async with asyncio.timeout(PUT):
                    await self._acl.put(acl)
            except TimeoutError:
                failure = GuardError("nftables does not answer", "see whether `nft list ruleset` does")
            except GuardError as error:
                failure = error
        elif self._due is None or self._due[1] is not fault:
            self._inbox.core_sent_rubbish(failure)
        holds = self._inbox.holds
        self._picture.barred = (lambda _: False) if failure is None else lambda peer: not holds(peer)
        if failure is not None:
            if str(failure) != self._failure:
                _log.error("nobody new is let in: core's access rules are not in force", error=str(failure))
            self._failure, self._due = str(failure), (acl, fault)
        elif self._due is not None:
            _log.info("core's access rules are in force")
            self._failure, self._due = "", None

    def _released(self) -> tuple[Change, ...]:
        """Return what lets in who had to wait for access rules; a whole that is told next says so itself."""
        return () if self._due is not None else self._picture.release()

    async def _hand_over(self, changes: list[Change]) -> None:
        if changes:
            taken = tuple(changes)
            changes.clear()
            await self._submit(taken)

    async def _submit(self, message: Snapshot | tuple[Change, ...]) -> None:
        future = self._inbox.submit(message, clock.monotonic())
        try:
            outcome: Outcome = await asyncio.shield(future)
        except InvalidMessage:
            raise
        except AgentError as error:
            # It is held, and tried again at each tick.
            _log.warning("what core told is not in force yet", error=str(error))
            return
        if outcome.verdict in {Verdict.PULL, Verdict.NO_STATE}:
            self._inbox.pull_wanted.set()

    # What core wants to know.

    async def settled(self) -> None:
        """Take note of what Defguard has no word for: revisions in force, and ends of sessions."""
        applied = self._reports.applied()
        if applied is not None:
            self._reports.applied_accepted(applied)
        try:
            while ends := self._reports.ends(STATS_LIMIT):
                await self._reports.ends_accepted(ends)
            self._kept = ""
        except AgentError as error:
            if str(error) != self._kept:
                _log.warning("ends of sessions are kept for later", error=str(error))
            self._kept = str(error)

    def stats(self) -> Iterator[Report]:
        """Yield the reports that are due, of peers that have shaken hands and whose address is known.

        Core takes nothing else: the first generation closes the stream over an endpoint that is none. A
        report counts as delivered once the next is asked for.
        """
        while (report := self._reports.stats(STATS_LIMIT)) is not None:
            for peer in report.peers:
                if peer.latest_handshake and peer.endpoint is not None:
                    yield self._report(peer)
            self._reports.stats_accepted(report)

    def _report(self, peer: PeerStats) -> Report:
        listed = self._picture.peers.get(peer.public_key)
        return Report(
            public_key=format_key(peer.public_key),
            endpoint=str(peer.endpoint),
            upload=peer.tx_bytes,
            download=peer.rx_bytes,
            keepalive_interval=0 if listed is None else listed.persistent_keepalive,
            latest_handshake=peer.latest_handshake,
            allowed_ips="" if listed is None else ",".join(map(str, listed.allowed_ips)),
        )


async def batches(
    queue: asyncio.Queue[T], inbox: Inbox, reporting: asyncio.Task[None], quiet: float
) -> AsyncGenerator[list[T], None]:
    """Yield what has come together, and an empty list every few seconds in which nothing has.

    Ends once only the whole can help: somebody wants it, or nothing has come for ``quiet`` seconds. Raises
    what ``reporting`` has failed with.
    """
    loop = asyncio.get_running_loop()
    heard_at = loop.time()
    getting = asyncio.create_task(queue.get())
    wanted = asyncio.create_task(inbox.pull_wanted.wait())
    try:
        while (left := heard_at + quiet - loop.time()) > 0 and not inbox.pull_wanted.is_set():
            await asyncio.wait(
                {getting, wanted, reporting},
                timeout=min(_PULSE, left),
                return_when=asyncio.FIRST_COMPLETED,
            )
            told: list[T] = []
            if getting.done():
                heard_at = loop.time()
                told.append(getting.result())
                while not queue.empty():
                    told.append(queue.get_nowait())
                getting = asyncio.create_task(queue.get())
            yield told
            if reporting.done():
                reporting.result()
    finally:
        wanted.cancel()
        if not getting.cancel() and not getting.cancelled():
            # It came just now: ``last_words`` is to see it.
            queue.put_nowait(getting.result())


def _last_of_each(told: Sequence[U]) -> list[U]:
    """Of what came together about one peer only the last counts: the others never were in force here.

    They may be older than the configuration, and a session that ended for one could not begin again.
    """
    last: dict[object, int] = {}
    for number, update in enumerate(told):
        if isinstance(update, PeerPut):
            last[update.peer.public_key] = number
        elif isinstance(update, PeerGone):
            last[update.public_key] = number
    kept = set(last.values())
    return [
        update
        for number, update in enumerate(told)
        if number in kept or not isinstance(update, PeerPut | PeerGone)
    ]
