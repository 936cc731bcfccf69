"""The walk through the core API: what is asked in which order, and what is kept for the judges."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from functools import partial
from typing import Final

from agent import clock
from agent.conformance.answers import Answer, StreamRecord
from agent.conformance.asking import Asker, background, is_resync, until
from agent.conformance.clauses import CLAUSES
from agent.conformance.connection import (
    judge_conditional,
    judge_method,
    judge_reached,
    judge_redirects,
    judge_refusal,
    judge_running_clock,
    judge_unknown_path,
    near_misses,
)
from agent.conformance.exercise import Exercise
from agent.conformance.history import judge_history
from agent.conformance.play import Play
from agent.conformance.reports import cut_gzip, judge_bad, judge_good
from agent.conformance.state import Reading, read_state
from agent.conformance.stream import (
    HEARTBEAT,
    LATE,
    has_no_stream,
    judge_after_resync,
    judge_events,
    judge_heartbeat,
    judge_opening,
    judge_resync,
)
from agent.conformance.verdicts import Ledger
from agent.conformance.wire import Wire
from agent.errors import AgentError
from agent.fence import Position

_CLOCK_SPACING: Final = 2.2
"""Seconds between two looks at server_time: more than what whole seconds can hide."""
_FAR: Final = 1_000_000
_PATHS: Final = {"state": "GET", "applied": "POST", "stats": "POST", "session-ends": "POST"}
"""What every core has; whether there are changes to ask for is another question."""
_WRONG_METHODS: Final = (("POST", "state"), ("GET", "applied"), ("GET", "stats"), ("GET", "session-ends"))
_QUIET: Final = 2.0
"""Seconds within which a stream from the current position must not send anything that is not new."""
_HEARTBEATS: Final = 2 * (HEARTBEAT + LATE) + 1
_TAKES_CHANGES: Final = ("change.", "session.", "restart.", "ends.taken", "stream.complete")


class Walk:
    """One walk; ``run`` fills the ledger."""

    def __init__(self, wire: Wire, token: str, ledger: Ledger) -> None:
        self._asker = Asker(wire, ledger)
        self._ledger = ledger
        self._follower = self._asker.follower
        self._token = token
        self._polled = False
        self._play: Play | None = None

    @property
    def left(self) -> list[str]:
        """Public keys of the exercise's that may be listed still, for want of a way to remove them."""
        return [] if self._play is None else self._play.left

    async def run(self, *, watch: float = 0.0, exercise: Exercise | None = None) -> None:
        """Ask everything; ``watch`` is in seconds.

        Raises ConfigError if the exercise's program fails, and CoreUnavailable if core goes away. Also
        then, and if it is cancelled, the ledger has what was found before, and says of all else that it
        was not reached.
        """
        try:
            await self._all(watch, exercise)
        except BaseException as error:
            why = error.message if isinstance(error, AgentError) else "the check was interrupted"
            self._skip("", f"not reached: {why}")
            raise
        finally:
            if self._asker.answers:
                judge_redirects(self._asker.answers, self._ledger)

    async def _all(self, watch: float, exercise: Exercise | None) -> None:
        first = await self._asker.ask("GET", "state")
        if judge_reached(first, self._ledger):
            reading = read_state(first, self._ledger)
            await self._authorization(_PATHS, reading.position)
            if reading.position is None:
                self._skip("", "the state's epoch and revision can't be read")
            else:
                self._follower.take(reading)
                await self._from(reading.position, first, reading, watch, exercise)
        else:
            self._skip("", "there is no state to go by")

    async def _from(
        self, held: Position, first: Answer, reading: Reading, watch: float, exercise: Exercise | None
    ) -> None:
        """Everything that takes a position to begin with; no two streams are open at a time."""
        has_stream = await self._open(held)
        if not self._polled:
            await self._authorization({"changes": "GET"}, held)
        if exercise is not None:
            self._play = Play(self._asker, exercise, has_stream=has_stream)
        try:
            await self._through(first, reading, held, watch, self._play, has_stream=has_stream)
        finally:
            self._judge(has_stream)
            if self._play is not None:
                await self._play.undo()
        for clause in _TAKES_CHANGES if exercise is None else ():
            self._skip(clause, "not seen: it takes changes, made by --exercise or during --watch")

    async def _through(
        self,
        first: Answer,
        reading: Reading,
        held: Position,
        watch: float,
        play: Play | None,
        *,
        has_stream: bool,
    ) -> None:
        # The agent's own way of coming back from another history, and all that needs no change meanwhile.
        async with background(self._follower.run(Position("no-" + held.epoch[:32], held.revision))):
            await self._conditions()
            await self._reports()
            await self._strictness()
            await self._clock(first, reading)
            if has_stream:
                await self._other_epoch()
        await self._follower.catch_up()
        try:
            async with background(self._follower.run()):
                await until(self._is_answered, _QUIET)
                if play is not None:
                    await play.changes()
                elif watch:
                    await asyncio.sleep(watch)
                    await self._asker.settle(has_stream=has_stream, after="the watch")
        finally:
            # Before the restarts: while core is down nothing is accepted.
            for answer in self._follower.applied:
                seen = f"a revision of the stream: {answer}"
                self._ledger.judged("applied.accepted", answer.status == 202, seen)
        if play is not None:
            await play.again()
            await self._follower.catch_up()
            async with background(self._follower.run()):
                await play.restarts()

    def _skip(self, prefix: str, why: str) -> None:
        """Say why clauses were not judged, where they were not."""
        for clause in CLAUSES:
            if clause.startswith(prefix):
                self._ledger.skipped(clause, why)

    async def _authorization(self, paths: Mapping[str, str], held: Position | None) -> None:
        # Such as core would take with the token, so that nothing but the token decides.
        bodies = {report.path: report.body for report in self._asker.reporter().good() if not report.gzip}
        wrong = [secrets.token_urlsafe(24), *near_misses(self._token)]
        tries = [("auth.missing-token", None), *(("auth.wrong-token", f"Bearer {token}") for token in wrong)]
        for path, method in paths.items():
            content = bodies.get(path)
            headers = {"Last-Event-ID": str(held)} if path == "changes" else {}
            for clause, value in tries:
                answer = await self._asker.ask(
                    method, path, content, headers=headers, authorization=value, read=False
                )
                judge_refusal(clause, f"{method} {path}", answer, self._ledger)

    async def _open(self, held: Position) -> bool:
        """Ask from a revision that is not there yet and from an older one; False if there is no stream."""
        record = StreamRecord(f"{held.epoch}:{held.revision + _FAR}", clock.monotonic())
        before = await self._follower.pull()
        async with self._asker.listening(record):
            await until(lambda: record.head is not None or record.ended is not None, HEARTBEAT)
            if has_no_stream(record):
                self._polled = True
                for prefix in ("stream.", "change."):
                    self._skip(prefix, f"core has no stream ({record.head}), and is polled")
                return False
            if record.head is None:
                record.fault = f"no headers within {HEARTBEAT:.0f} s"
            if not judge_opening(record, self._ledger):
                return False
            await until(lambda: record.ended is not None or bool(record.events))
        bounds = await self._bounds(before)
        judge_resync(record, "stream.resync-future", bounds, self._ledger)
        if held.revision:
            await self._asker.replay(Position(held.epoch, held.revision - 1), [])
        else:
            self._ledger.skipped("stream.resume", "there is no revision before the current one yet")
        return True

    async def _bounds(self, before: Position | None) -> tuple[Position, Position] | None:
        """Core's positions before and now, if they are of one epoch."""
        after = await self._follower.pull()
        if before is None or after is None or before.epoch != after.epoch:
            return None
        return before, after

    async def _other_epoch(self) -> None:
        """Judge the stream that was opened from another epoch: resync, what follows, and heartbeats."""
        record = self._follower.records[0]
        await until(partial(self._heartbeats, record), _HEARTBEATS)
        judge_resync(record, "stream.resync-other-epoch", None, self._ledger)
        if is_resync(record):
            judge_after_resync(record, self._ledger)

    def _heartbeats(self, record: StreamRecord) -> bool:
        return judge_heartbeat(record, clock.monotonic(), self._ledger)

    def _is_answered(self) -> bool:
        """Whether the newest stream has shown what it begins with."""
        record = self._follower.records[-1] if self._follower.records else None
        return record is not None and record.current and (bool(record.events) or record.ended is not None)

    async def _conditions(self) -> None:
        """Ask with If-None-Match, and again if the state has changed meanwhile."""
        for clause, form in (
            ("state.not-modified", '"{}"'),
            ("state.not-modified", 'W/"{}"'),
            ("state.not-modified", '"another", W/"{}"'),
            ("state.modified", '"{}0"'),
            ("state.modified", '"0{}"'),
        ):
            for _ in range(3):
                before = await self._follower.pull()
                answer = await self._asker.ask("GET", "state", headers={"If-None-Match": form.format(before)})
                after = await self._follower.pull()
                if before is not None and before == after:
                    judge_conditional(clause, form, answer, self._ledger)
                    break
            else:
                self._ledger.skipped(clause, "the state changes all the time, or can't be had")

    async def _reports(self) -> None:
        for report in self._asker.reporter().good():
            answer = await self._asker.ask("POST", report.path, report.content, headers=report.headers)
            judge_good(report, answer, self._ledger)

    async def _strictness(self) -> None:
        for report in self._asker.reporter().bad():
            answer = await self._asker.ask("POST", report.path, report.content)
            judge_bad(report.clause, report.what, answer, self._ledger)
        for report in self._asker.reporter().good():
            if report.gzip:
                answer = await self._asker.ask("POST", report.path, cut_gzip(report), headers=report.headers)
                what = f"{report.path} with gzip that is cut"
                judge_bad("json.malformed-request", what, answer, self._ledger)
        answer = await self._asker.ask("GET", f"conformance-{secrets.token_hex(4)}", read=False)
        judge_unknown_path(answer, self._ledger)
        for method, path in _WRONG_METHODS:
            content = b"{}" if method == "POST" else None
            answer = await self._asker.ask(method, path, content, read=False)
            judge_method(f"{method} {path}", answer, self._ledger)
        answer = await self._asker.ask("GET", "state")
        self._ledger.judged("errors.goes-on", answer.status == 200, f"GET state afterwards: {answer}")

    async def _clock(self, first: Answer, reading: Reading) -> None:
        await asyncio.sleep(max(0.0, first.sent + _CLOCK_SPACING - clock.read().boot))
        second = await self._asker.ask("GET", "state")
        later = read_state(second, self._ledger) if second.status == 200 and not second.error else Reading()
        judge_running_clock((first, reading.server_time), (second, later.server_time), self._ledger)

    def _judge(self, has_stream: bool) -> None:
        if has_stream:
            for record in self._follower.records:
                if record.is_open:
                    judge_events(record, self._ledger)
        judge_history(self._follower.history, self._ledger)
