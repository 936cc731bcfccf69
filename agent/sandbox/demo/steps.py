"""The steps of the demo, each a rule of the product put to the test on a real tunnel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from agent.encoding import parse_time
from agent.errors import AgentError
from agent.sandbox.demo.faults import NotRun, StepFailed
from agent.sandbox.demo.programs import Pinger, Program
from agent.sandbox.demo.stage import LOCATION, STATS_INTERVAL, Stage, parse_result

CUT_WITHIN: Final = 1.0
"""Seconds from a deadline, a revocation or a switch to the last reply."""
EARLY: Final = 1.0
"""Seconds that a session may end before its deadline: what core's time is uncertain by."""
_SILENCE: Final = 0.4
_POLL: Final = 0.05


@dataclass(slots=True)
class Facts:
    """What steps leave for later ones; times are Unix seconds, durations seconds."""

    admitting: bool = False
    agent_start: float = 0.0
    session: str = ""
    deadline: float = 0.0
    expired: str = ""


class Steps:
    """The steps over a stage. Each returns what it measured; StepFailed, NotRun else."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._facts = Facts()
        self._pinger: Pinger | None = None

    async def close(self) -> None:
        """End what goes on from one step to the next."""
        if self._pinger is not None:
            await self._pinger.stop()
            self._pinger = None

    async def start(self) -> str:
        """1: up without anybody let in. That the cable works shows that nothing else keeps pings out."""
        stage, began = self._stage, time.monotonic()
        stage.start_agent()
        peer = await self._peer(lambda status, _: status["core_connected"], 15, "the agent pulled no state")
        if not stage.gateway.is_up(stage.interface):
            raise StepFailed(f"{stage.interface} is not up", "agent")
        self._facts.agent_start = time.monotonic() - began
        if peer["state"] != "waiting":
            raise StepFailed(f"without a session the peer is {peer['state']}", "agent")
        self._facts.admitting = True
        client = stage.connect("none", wait=1)
        code = await client.ended(10)
        if code != 1 or parse_result(client)["connected"]:
            raise StepFailed("a client without a session got a handshake", "agent", "client")
        async with stage.ping(outside=True) as outside, stage.ping() as inside:
            await outside.reply()
            await outside.flowing(0.8)
        if inside.replies():
            raise StepFailed(f"{len(inside.replies())} pings were answered without a session", "agent")
        return f"up in {self._facts.agent_start:.2f} s; 0 of {inside.sent} pings answered"

    async def totp(self) -> str:
        """2: a wrong code is refused, the right one admits."""
        stage = self._admitting()
        wrong = stage.connect("totp")
        wrong.send(stage.totp_code(right=False))
        if await wrong.ended(15) == 0 or await stage.admin.sessions(live=True):
            raise StepFailed("a wrong code got a session", "core")
        if "code is wrong" not in (refusal := " ".join(stage.tail("client", 1))):
            raise StepFailed(f"the wrong code was answered with: {refusal}", "client", "core")
        async with stage.ping() as pinger:
            right = stage.connect("totp")
            right.send(stage.totp_code())
            return await self._admitted(right, pinger)

    async def reports(self) -> str:
        """3: what the tunnel did is at core and in the agent's metrics."""
        stage, began = self._stage, time.monotonic()
        self._need_session()
        async with stage.ping() as pinger:
            await pinger.reply()
            at_core = await self._stats_at_core(4 + 2 * STATS_INTERVAL)
            after = time.monotonic() - began
            handshake = await stage.metric("wireguard_latest_handshake_seconds", public_key=stage.device)
            received = await stage.metric("wireguard_received_bytes_total", public_key=stage.device)
            sent = await stage.metric("wireguard_sent_bytes_total", public_key=stage.device)
        if at_core["session_id"] != self._facts.session:
            raise StepFailed(f"core's statistics name the session {at_core['session_id']}", "agent")
        if handshake is None or abs(handshake - parse_time(at_core["latest_handshake"])) > 1:
            raise StepFailed(f"/metrics: the latest handshake is {handshake}", "agent")
        if not received or not sent or received < at_core["rx_bytes"] or sent < at_core["tx_bytes"]:
            raise StepFailed(f"/metrics: {received} bytes received, {sent} sent, less than at core", "agent")
        age = time.time() - handshake
        return f"at core after {after:.2f} s: handshake {age:.1f} s ago, rx {received:.0f} B, tx {sent:.0f} B"

    async def outage(self) -> str:
        """4: neither core's end nor the agent's is seen by a tunnel.

        First the session's end is moved close (in place, which may not lose a ping either), far
        enough for the agent to be back before it.
        """
        stage, facts = self._stage, self._facts
        self._need_session()
        pinger = self._pinger = stage.ping().start()
        await pinger.reply()
        lifetime = min(20.0, 4 + 3 * facts.agent_start)
        renewed = await stage.admin.renew(facts.session, lifetime)
        await self._peer(
            lambda _, peer: peer["expires_at"] == renewed["expires_at"],
            3,
            "the agent did not take the renewal",
        )
        core, agent = self._running(stage.core, "core"), self._running(stage.agent, "agent")
        await core.kill()
        facts.deadline = parse_time(renewed["expires_at"])
        await self._status_until(
            lambda status: not status["core_connected"], 5, "the agent did not miss core"
        )
        await pinger.flowing(0.5)
        facts.admitting = False
        await agent.kill()
        killed = time.monotonic()
        await pinger.flowing(0.5)
        stage.start_agent()
        while await stage.metric("wg_agent_sessions_active") != 1:
            if time.monotonic() - killed > 15:
                raise StepFailed("the agent did not take the session over", "agent")
            await asyncio.sleep(_POLL)
        back = time.monotonic() - killed
        facts.admitting = True
        await pinger.flowing(0.5)
        lost, answered = pinger.lost(), len(pinger.replies())
        if lost:
            raise StepFailed(f"{lost} of {answered + lost} pings were lost", "agent")
        return f"0 of {answered} pings lost; agent away for {back:.2f} s"

    async def deadline(self) -> str:
        """5: the deadline is kept without core."""
        facts, pinger = self._facts, self._pinger
        if not facts.deadline or pinger is None:
            raise NotRun("step 4 set no deadline")
        if pinger.last < time.time() - _SILENCE:
            raise StepFailed("pings had stopped before the deadline", "agent")
        await asyncio.sleep(max(0.0, facts.deadline + CUT_WITHIN + _SILENCE - time.time()))
        if self._stage.core is None or self._stage.core.running:
            raise StepFailed("core was running", "core")
        late = pinger.last - facts.deadline
        await self.close()
        if not -EARLY <= late <= CUT_WITHIN:
            raise StepFailed(f"the last reply came {late:+.3f} s from the deadline", "agent")
        facts.expired, facts.session = facts.session, ""
        return f"last reply {late * 1000:+.0f} ms from it"

    async def return_of_core(self) -> str:
        """6: core is told, admits again by e-mail, and revokes."""
        stage, facts = self._admitting(), self._facts
        await self.close()
        if stage.core is None or not stage.core.running:
            await stage.start_core()
        told = ""
        if facts.expired:
            began = time.monotonic()
            reason = await self._end_at_core(facts.expired, 20)
            told = f"told in {time.monotonic() - began:.2f} s; "
            if reason != "expired":
                raise StepFailed(f"the end was reported as {reason}", "agent")
        # Each kind of exchange with core comes back by itself, after a wait of its own.
        await self._status_until(lambda status: status["core_connected"], 20, "the agent did not find core")
        async with stage.ping() as pinger:
            mails = stage.mail_count
            client = stage.connect("email")
            client.send(await stage.mailed_code(mails))
            admitted = await self._admitted(client, pinger)
            await pinger.flowing(0.3)
            began_at = time.time()
            await stage.admin.revoke(facts.session)
            facts.session = ""
            cut = await self._cut(pinger, began_at, "the revocation")
        return f"{told}{admitted}; revoked: {cut}"

    async def switch(self) -> str:
        """7: without MFA the peer needs no session, with it again it does."""
        stage = self._admitting()
        if stage.core is None or not stage.core.running:
            raise NotRun("core is not running")
        off_at = time.time()
        await stage.admin.change_location(LOCATION, mfa_required=False)
        peer = await self._peer(lambda _, peer: peer["state"] == "up", 5, "the peer was not admitted")
        admitted = time.time() - off_at
        if peer["session_id"] is not None:
            raise StepFailed("the peer has a session", "agent")
        async with stage.ping() as pinger:
            if await stage.connect("none").ended(15):
                raise StepFailed("the client got no handshake", "agent", "client")
            await pinger.flowing(0.3)
            on_at = time.time()
            await stage.admin.change_location(LOCATION, mfa_required=True)
            cut = await self._cut(pinger, on_at, "the switch")
        return f"off: admitted after {admitted * 1000:.0f} ms; on: {cut}"

    async def _admitted(self, client: Program, pinger: Pinger) -> str:
        """Wait for a client that has sent its code; note its session."""
        stage = self._stage
        if await client.ended(15):
            raise StepFailed("the right code did not connect", "client", "core", "agent")
        session_id = parse_result(client)["session_id"]
        [session] = [held for held in await stage.admin.sessions(live=True) if held["id"] == session_id]
        granted = parse_time(session["granted_at"])
        first = await pinger.reply(since=granted)
        [gateway] = await stage.admin.gateways()
        live = parse_time(gateway["applied"]["applied_at"])
        self._facts.session = session_id
        return f"PSK live {_ms(live - granted)} after the grant, ping {_ms(first - granted)}"

    async def _cut(self, pinger: Pinger, since: float, what: str) -> str:
        """Wait until pings must have stopped; return how long after ``since`` the last one was answered."""
        await asyncio.sleep(max(0.0, since + CUT_WITHIN + _SILENCE - time.time()))
        after = pinger.last - since
        if after > CUT_WITHIN:
            raise StepFailed(f"pings were answered until {after:.3f} s after {what}", "agent")
        return f"cut after {_ms(max(after, 0.0))}"

    async def _status_until(
        self,
        holds: Callable[[dict[str, Any]], bool],
        within: float,
        otherwise: str,
    ) -> dict[str, Any]:
        end, fault = time.monotonic() + within, ""
        while True:
            if self._stage.agent is None or not self._stage.agent.running:
                raise StepFailed("the agent has ended", "agent")
            try:
                status = await self._stage.status()
            except AgentError as error:
                fault = f" ({error.message})"
            else:
                fault = f" (core: {status['core_error']})" if status["core_error"] else ""
                if holds(status):
                    return status
            if time.monotonic() > end:
                raise StepFailed(f"{otherwise} within {within:g} s{fault}", "agent")
            await asyncio.sleep(_POLL)

    async def _peer(
        self,
        holds: Callable[[dict[str, Any], dict[str, Any]], bool],
        within: float,
        otherwise: str,
    ) -> dict[str, Any]:
        """Return the device's entry in the agent's status once status and entry are as wanted."""

        def found(status: dict[str, Any]) -> dict[str, Any] | None:
            return next((p for p in status["peers"] if p["public_key"] == self._stage.device), None)

        def both(status: dict[str, Any]) -> bool:
            return (peer := found(status)) is not None and holds(status, peer)

        return found(await self._status_until(both, within, otherwise)) or {}

    async def _stats_at_core(self, within: float) -> dict[str, Any]:
        end = time.monotonic() + within
        while True:
            for held in await self._stage.admin.stats():
                shaken = held["public_key"] == self._stage.device and held["latest_handshake"]
                if shaken and held["rx_bytes"] and held["tx_bytes"]:
                    return held
            if time.monotonic() > end:
                raise StepFailed(f"core has no handshake and traffic after {within:g} s", "agent", "core")
            await asyncio.sleep(_POLL)

    async def _end_at_core(self, session_id: str, within: float) -> str:
        end = time.monotonic() + within
        while True:
            for held in await self._stage.admin.session_ends():
                if held["session_id"] == session_id:
                    return str(held["reason"])
            if time.monotonic() > end:
                raise StepFailed(f"the end was not reported within {within:g} s", "agent", "core")
            await asyncio.sleep(_POLL)

    def _admitting(self) -> Stage:
        if not self._facts.admitting:
            raise NotRun("there is no agent that could admit anybody")
        return self._stage

    def _need_session(self) -> None:
        if not self._facts.session:
            raise NotRun("there is no session")

    @staticmethod
    def _running(program: Program | None, name: str) -> Program:
        if program is None or not program.running:
            raise NotRun(f"{name} does not run")
        return program


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


@dataclass(frozen=True, slots=True)
class Step:
    """A step: what it shows, and ``run``, which returns what it measured. ``limit`` in seconds."""

    title: str
    run: Callable[[], Awaitable[str]]
    limit: float = 25.0


def all_steps(steps: Steps) -> list[Step]:
    """Return the steps in their order."""
    return [
        Step("agent starts, pulls, interface up; no ping without MFA", steps.start),
        Step("TOTP: wrong code refused, right one admits", steps.totp),
        Step("handshake and traffic at core and in /metrics", steps.reports),
        Step("core killed, agent killed and back: no ping lost", steps.outage),
        Step("deadline passes without core: ping fails within 1 s", steps.deadline),
        Step("core back, told; e-mailed code; revoked: cut in 1 s", steps.return_of_core),
        Step("MFA off: in without a session; on again: cut", steps.switch),
    ]
