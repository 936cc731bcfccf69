"""Takes off the interface who has to go, whatever else is under way (rules 8 and 16)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection

from agent.errors import DeviceError
from agent.model import DesiredPeer, Now, PublicKey, RemovePeer
from agent.plan import CUT, FOUND
from agent.state import State
from agent.warden import Warden
from agent.writer import HANDFUL, OF_THE_INTERFACE, Writer


class Removals:
    """Who has to go and is still on the interface, and what came of taking them off it.

    All else that these peers need (the guard's elements, another session) is left to the next plan.
    """

    def __init__(
        self, *, state: State, writer: Writer, read_clock: Callable[[], Now], warden: Warden | None
    ) -> None:
        self.stuck: set[PublicKey] = set()
        """Peers that the device did not remove: tried again, each by itself, at each step."""
        self.going: set[PublicKey] = set()
        """Who is being removed by the plan under way."""
        self._state = state
        self._writer = writer
        self._clock = read_clock
        self._warden = warden
        self._left: DeviceError | None = None
        """A failure amid something else, which the next plan has to begin with."""
        self._not_let_go: set[PublicKey] = set()
        """Whom the device did not remove then: that is not tried again before."""

    async def let_go(self) -> None:
        """Take off the interface who has to go; what fails is left to the next plan."""
        going = self._due() - self._not_let_go
        if not going:
            return
        if self._warden is not None and not self._warden.busy:
            await self._warden.before_removes(self._writer.mirror.peers)
        await self._let_go(going)

    async def cut_expired(self) -> bool:
        """Cut whose deadline has passed, where they are many, before the state has ended them.

        Return whether all of them went, so that it is known how late. The rest is left to the next plan.
        """
        held = self._writer.mirror.peers
        expiring = {key for key in self._state.expiring(self._clock()) if key in held}
        going = expiring - self._not_let_go - self.stuck
        if len(going) <= HANDFUL:
            return False
        return await self._let_go(going) and going == expiring

    async def _let_go(self, going: Collection[PublicKey]) -> bool:
        refused = await self._writer.let_go(going)
        self._not_let_go |= refused.keys()
        self._left = next(iter(refused.values()), self._left)
        self._writer.behind |= bool(refused)
        return not refused

    def overstaying(self, *, broken: bool) -> int:
        """How many have to go and are on the interface as they were, because the device refuses.

        ``broken``: it does not follow at all, so whoever else is due is kept on it, too.
        """
        held = self._writer.mirror.peers
        kept = self.late() if broken else self.stuck
        return sum(key in held and held[key].tenure != CUT for key in kept)

    def late(self) -> set[PublicKey]:
        """Who has to go and is still on the interface."""
        return self.stuck | self._due()

    def _due(self) -> set[PublicKey]:
        now = self._clock()
        return {key for key in (self._state.dirty | self.going) - self.stuck if self._has_to_go(key, now)}

    def _has_to_go(self, key: PublicKey, now: Now) -> bool:
        """Whether the interface has the peer for a session, or another reason, that is over."""
        held = self._writer.mirror.peers.get(key)
        if held is None or held.tenure == CUT:
            return False
        want = self._state.wanted(key, now)
        return want is None or (isinstance(want, DesiredPeer) and held.tenure not in {want.tenure, FOUND})

    def raise_what_was_left(self) -> None:
        """A plan begins with what has failed since the last one: raises DeviceError if something has."""
        if self._left is not None:
            error, self._left = self._left, None
            self._not_let_go.clear()
            raise error

    async def retry_stuck(self) -> None:
        """Try again, each by itself, those whom the device did not remove.

        Raises DeviceError if the interface is gone or does not answer.
        """
        for key in list(self.stuck):
            try:
                await self._writer.apply([RemovePeer(key)], {})
            except DeviceError as error:
                if error.errno == errno.ENODEV:
                    self.stuck.clear()
                if error.errno in OF_THE_INTERFACE:
                    raise
            else:
                self.stuck.discard(key)
                self._state.dirty.add(key)

    def forget(self) -> None:
        """There is no interface any more, nor anybody on it."""
        self.stuck.clear()
        self._not_let_go.clear()
        self._left = None
