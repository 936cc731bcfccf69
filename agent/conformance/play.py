"""The changes that core is made to make, in their order, and what is looked at after each."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from typing import Final

from agent.conformance.answers import Step
from agent.conformance.asking import Asker, until
from agent.conformance.exercise import CANNOT, Exercise
from agent.conformance.history import STEPS
from agent.conformance.stream import judge_after_resync, judge_resync
from agent.core.messages import parse_position
from agent.core.stream import ServerEvent
from agent.encoding import format_key, parse_public_key
from agent.errors import ConfigError, InvalidMessage
from agent.fence import Position
from agent.model import PublicKey

_BACK: Final = 60.0
"""Seconds that core may take to come back."""
_TAKEN: Final = 5.0
"""Seconds within which an end that was reported shows in the state."""


class Play:
    """Has core make changes to two devices of the play's own."""

    def __init__(self, asker: Asker, exercise: Exercise, *, has_stream: bool) -> None:
        self._asker = asker
        self._ledger = asker.ledger
        self._follower = asker.follower
        self._exercise = exercise
        self._has_stream = has_stream
        self._start: Position | None = None
        self._seen = 0
        self._one, self._other = (format_key(secrets.token_bytes(32)) for _ in range(2))
        self._listed: set[str] = set()

    async def changes(self) -> None:
        """Everything but restarts."""
        self._start = self._follower.position
        self._seen = len(self._follower.history)
        if not await self._do("upsert", self._one):
            return
        for action in ("grant", "renew", "replace", "revoke"):
            await self._do(action, self._one)
        if await self._do("grant", self._one):
            await self._report_end()
        if await self._do("upsert", self._other):
            await self._do("move", self._one, self._other)
            await self._do("remove", self._other)
        await self._do("remove", self._one)
        await self._do("location")

    async def again(self) -> None:
        """Ask for all that was sent during the changes once more."""
        if self._has_stream and self._start is not None:
            sent = [item for item in self._follower.history[self._seen :] if isinstance(item, ServerEvent)]
            if known := _after(sent, self._start):
                await self._asker.replay(self._start, known)

    async def restarts(self) -> None:
        """Core stops and starts, with its data and then with a history that begins anew."""
        await self._restart()
        await self._new_history()

    @property
    def left(self) -> list[str]:
        """The play's keys that core may list."""
        return sorted(self._listed)

    async def undo(self) -> None:
        """Remove what the play has had core list, however it ended; what can't be removed is ``left``."""
        # A task of its own: in one that is being cancelled time limits don't work.
        await asyncio.create_task(self._remove_all())

    async def _remove_all(self) -> None:
        for key in self.left:
            with contextlib.suppress(ConfigError):
                await self._change("remove", key)

    async def _change(self, action: str, *keys: str) -> bool:
        """Run the program, and keep in mind which keys may be listed; as ``Exercise``."""
        if action == "upsert":
            self._listed.update(keys)
        done = await self._exercise(action, *keys)
        if action == ("remove" if done else "upsert"):
            self._listed.difference_update(keys)
        return done

    async def _do(self, action: str, *keys: str, back: float = 10.0) -> bool:
        """Have core make a change, and look at the state and the stream; False if it can't be made."""
        self._follower.history.append(Step(action, keys))
        clause = STEPS.get(action)
        try:
            done = await self._change(action, *keys)
        except BaseException:
            if clause:
                self._ledger.skipped(clause, f"not reached: {action} did not come to a good end")
            raise
        if not done:
            if clause:
                self._ledger.skipped(clause, f"{action}: the program can't do that (it ended with {CANNOT})")
            return False
        there = await self._asker.settle(has_stream=self._has_stream, after=action, seconds=back)
        if there and self._has_stream:
            # What happens between two streams is looked at by asking for it again, and there alone.
            await until(lambda: self._follower.is_open, back)
        return there

    async def _report_end(self) -> None:
        """Report the session's end as a gateway does, twice, and look whether core lists it still."""
        key = parse_public_key(self._one)
        session_id = self._session_of(key)
        if session_id is None:
            self._ledger.skipped("ends.taken", "the state shows no session after grant")
            return
        reporter = self._asker.reporter()
        for clause in ("ends.accepted", "ends.idempotent"):
            answer = await self._asker.ask("POST", "session-ends", reporter.ends(session_id, key))
            self._ledger.judged(clause, answer.status == 202, f"the end of {session_id}: {answer}")
        gone = False
        for _ in range(int(_TAKEN / 0.5)):
            await self._asker.settle(has_stream=self._has_stream, after="a session's end")
            if gone := self._session_of(key) != session_id:
                break
            await until(lambda: False, 0.5)
        self._ledger.judged("ends.taken", gone, f"{session_id} is {'gone' if gone else 'still listed'}")

    def _session_of(self, key: PublicKey) -> str | None:
        snapshot = self._follower.snapshot
        for peer in () if snapshot is None else snapshot.peers:
            if peer.public_key == key:
                return None if peer.session is None else peer.session.id
        return None

    async def _restart(self) -> None:
        before = self._pulled()
        if not await self._do("restart", back=_BACK) or before is None:
            self._ledger.skipped(
                "restart.continues", f"the program can't restart core (it ended with {CANNOT})"
            )
            return
        after = self._pulled()
        if after is None or after.epoch != before.epoch:
            self._ledger.skipped("restart.continues", f"core took another epoch: {before}, then {after}")
        elif after.revision < before.revision:
            self._ledger.skipped("restart.continues", "see state.never-back")
        else:
            self._ledger.passed("restart.continues", f"{before}, then {after}")
        # The stream that is open again goes on where the first one ended.
        if self._one not in self._listed and await self._do("upsert", self._one):
            await self._do("remove", self._one)

    async def _new_history(self) -> None:
        before = self._follower.position
        opened = len(self._follower.records)
        if not await self._do("new-history", back=_BACK) or before is None:
            self._ledger.skipped("restart.new-epoch", f"the program can't do that (it ended with {CANNOT})")
            return
        after = self._pulled()
        if after is not None:
            good = after.epoch != before.epoch
            self._ledger.judged("restart.new-epoch", good, f"{before}, then {after}")
            if good and self._has_stream:
                await self._do("location")
                # One that was opened while core went down may have had no time to say anything.
                for record in self._follower.records[opened:]:
                    if (
                        record.events
                        and record.asked == str(before)
                        and judge_resync(record, "stream.resync-other-epoch", None, self._ledger)
                    ):
                        judge_after_resync(record, self._ledger)

    def _pulled(self) -> Position | None:
        snapshot = self._follower.snapshot
        return None if snapshot is None else Position(snapshot.epoch, snapshot.revision)


def _after(events: Sequence[ServerEvent], start: Position) -> list[ServerEvent]:
    """The events whose revisions come after ``start``."""
    found = []
    for event in events:
        try:
            epoch, revision = parse_position(event.id)
        except InvalidMessage:
            continue
        if event.type != "resync" and epoch == start.epoch and revision > start.revision:
            found.append(event)
    return found
