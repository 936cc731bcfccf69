"""What systemd and the probes are told of the agent: that it works, and whether it is ready."""

from __future__ import annotations

from typing import Final

from agent import clock
from agent.reconciler import Reconciler
from agent.systemd import Notifier

STALLED: Final = 10.0
"""Seconds without a tick through the reconciler after which the agent counts as stalled."""
_PING_EVERY: Final = 2.0
"""Seconds between two words to systemd's watchdog, which wants one in 30."""


class Health:
    """The health of an agent around one reconciler; ``alive`` and ``ticked`` are for those who work."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._notifier = Notifier()
        self._alive_at = clock.monotonic()
        self._pinged_at = -_PING_EVERY
        self._started = False
        self._stopping = False
        self._shown = ""

    def alive(self) -> None:
        """Work goes on."""
        self._alive_at = clock.monotonic()
        if self._alive_at - self._pinged_at >= _PING_EVERY:
            self._pinged_at = self._alive_at
            self._notifier.watchdog()

    def ticked(self) -> None:
        """A tick has passed through the reconciler: systemd's status line may be another now."""
        self.alive()
        line = self._line()
        if self._started and line != self._shown and not self._stopping:
            self._notifier.status(line)
            self._shown = line

    async def become_ready(self) -> None:
        """READY after the first state is in the kernel, or after adoption if core can't be had."""
        await self._reconciler.inbox.settled.wait()
        self._started = True
        self._notifier.ready(self._line())

    def reloading(self) -> None:
        """A reload has begun."""
        if self._started:
            self._notifier.reloading()

    def reloaded(self) -> None:
        """It is over; before the start is done systemd would take that for the start's end."""
        if self._started:
            self._notifier.ready(self._line())

    def stopping(self, status: str = "") -> None:
        """The agent is going down; ``status`` is the last line, and empty leaves the one before."""
        self._stopping = True
        self._notifier.stopping(status)

    def close(self) -> None:
        """Nothing more is to be told."""
        self._notifier.close()

    # Who asks.

    def is_healthy(self) -> bool:
        """Whether ticks get through."""
        return clock.monotonic() - self._alive_at < STALLED

    def is_ready(self) -> tuple[bool, str]:
        """Whether the agent does all that it is for, and if not, why."""
        reconciler, inbox = self._reconciler, self._reconciler.inbox
        if not self._started:
            return False, "starting"
        if fault := self._overstay():
            return False, fault
        if not inbox.core_connected:
            return False, f"core is unreachable: {inbox.core_error}"
        if not reconciler.keeper.up:
            return False, "the interface is down"
        return True, ""

    def _overstay(self) -> str:
        """Who has to go and is still on the interface; empty if nobody is."""
        if self._reconciler.expiry_late:
            return "sessions past their deadline are still on the interface"
        if count := self._reconciler.overstaying:
            return f"peers that have to go are still on the interface: {count}"
        return ""

    def _line(self) -> str:
        reconciler = self._reconciler
        core = "core connected" if reconciler.inbox.core_connected else "core unreachable"
        peers = len(reconciler.writer.mirror.peers)
        line = f"{core}, {peers} peers up, {len(reconciler.state.sessions)} sessions"
        faults = filter(None, (self._overstay(), self._reconciler.fault))
        return "; ".join((line, *faults))
