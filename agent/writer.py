"""Carries plans out on the device, and keeps the mirror by what the device has acknowledged.

Ending many peers at once happens in two steps (rule 8): one batch makes them useless, which is cheap
and keeps the deadline; removing them, which waits for the kernel and holds the network lock, follows
a few at a time between other work. How many are a few, the kernel itself tells (``Pace``).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from agent import clock
from agent.errors import DeviceError
from agent.model import AddPeer, CutPeer, Operation, PublicKey, RemovePeer
from agent.patience import note
from agent.plan import CUT, FOUND, Mirror, Plan
from agent.wireguard.device import Device

HANDFUL: Final = 8
"""Peers that are removed outright; more are cut first and removed at most this many at a time."""
TURN: Final = 0.02
"""Seconds that removals in one message are to take: so long nobody else gets the kernel's network lock."""
SLICE: Final = 512
"""Operations between two looks at the clock: deadlines do not wait for a long plan to end."""
FEW: Final = 32
"""The same for operations that are sent one by one."""
OF_THE_INTERFACE: Final = frozenset({errno.ENODEV, errno.ETIMEDOUT})
"""What is no one peer's fault: it would be the same with the next."""


class Pace:
    """How many peers to remove in one message: it begins with one, and what that took decides.

    A removal takes the kernel from 0.1 ms to 40 ms, by its settings (``rcu_normal``).
    """

    def __init__(self) -> None:
        self.count = 1

    def took(self, count: int, seconds: float) -> None:
        """So many removals took so long."""
        room = int(TURN * count / seconds) if seconds > 0 else HANDFUL
        self.count = max(1, min(room, 2 * self.count, HANDFUL))


class Writer:
    """The only hand on the interface."""

    def __init__(
        self,
        device: Callable[[], Device],
        added: Callable[[PublicKey], None],
        monotonic: Callable[[], float] = clock.monotonic,
    ) -> None:
        """``added`` is told of each peer that is on the interface afresh; ``monotonic`` gives seconds."""
        self.mirror = Mirror()
        self.to_reap: dict[PublicKey, None] = {}
        """Peers that were cut and are still to be removed, oldest first."""
        self.behind = False
        """Whether the mirror may be behind the device: something failed, and how much of it was done is not
        known. What a look finds then is no drift."""
        self._device = device
        self._added = added
        self._monotonic = monotonic
        self._reaping = Pace()

    async def carry_out(self, plan: Plan, between: Callable[[], Awaitable[bool]]) -> bool:
        """Apply a plan: removes, then updates, then adds.

        ``between`` is awaited after each slice; once it returns False the rest is left for another
        plan, and so does this. Raises DeviceError; the mirror is then behind the device.
        """
        for operations in self._steps(plan):
            removing = bool(operations) and isinstance(operations[0], RemovePeer)
            pace, done = Pace(), 0
            while done < len(operations):
                some = operations[done : done + (pace.count if removing else SLICE)]
                await self.apply(some, plan.tenures, pace if removing else None)
                done += len(some)
                if not await between():
                    return False
        return True

    async def apply(
        self, operations: Sequence[Operation], tenures: dict[PublicKey, int], pace: Pace | None = None
    ) -> None:
        """Apply operations as they are, and take them into the mirror once acknowledged.

        ``pace`` learns how long they took.
        """
        started = self._monotonic()
        await self._device().apply(operations)
        took = self._monotonic() - started
        if len(operations) <= HANDFUL:
            note("the interface", took)
        if pace is not None:
            pace.took(len(operations), took)
        acknowledge, to_reap = self.mirror.acknowledge, self.to_reap
        for operation in operations:
            key = operation.public_key
            acknowledge(operation, tenures.get(key, FOUND))
            if isinstance(operation, CutPeer):
                to_reap[key] = None
            elif isinstance(operation, AddPeer):
                to_reap.pop(key, None)
                self._added(key)
            elif isinstance(operation, RemovePeer):
                to_reap.pop(key, None)

    async def let_go(self, keys: Iterable[PublicKey]) -> dict[PublicKey, DeviceError]:
        """Remove these peers, or cut them if they are many; whom the device refuses holds back no other.

        Returns the refused; where the interface is gone, or does not answer, all that are left.
        """
        going = [key for key in keys if key not in self.to_reap]
        many = len(going) > HANDFUL
        operations: list[Operation] = [CutPeer(key) if many else RemovePeer(key) for key in going]
        return await self._each(operations, SLICE if many else 1)

    async def _each(self, operations: Sequence[Operation], size: int) -> dict[PublicKey, DeviceError]:
        """Apply them, ``size`` at a time, one by one where that fails; return whom the device refuses.

        Where the interface is gone, or does not answer, these are all who are left.
        """
        refused: dict[PublicKey, DeviceError] = {}
        for at in range(0, len(operations), size):
            some = operations[at : at + size]
            try:
                await self.apply(some, {})
            except DeviceError as error:
                if error.errno in OF_THE_INTERFACE:
                    return refused | {left.public_key: error for left in operations[at:]}
                refused |= await self._each(some, 1) if size > 1 else {some[0].public_key: error}
        return refused

    async def reap(self) -> bool:
        """Remove a few of the peers that were cut; return whether to go on at once.

        One that the device will not remove goes to the end of the line and waits for another time.
        Raises DeviceError if the interface is gone or does not answer.
        """
        some = [RemovePeer(key) for key in islice(self.to_reap, self._reaping.count)]
        if not some:
            # Until the next time the kernel's settings may be other ones.
            self._reaping = Pace()
            return False
        try:
            await self.apply(some, {}, self._reaping)
        except DeviceError as error:
            if error.errno in OF_THE_INTERFACE:
                raise
            for key in await self._each(some, 1):
                self.to_reap.pop(key)
                self.to_reap[key] = None
            return False
        return bool(self.to_reap)

    async def read_again(self) -> set[PublicKey]:
        """Have the mirror as the device is; return who has to be planned for anew. Raises DeviceError."""
        _, again = self.mirror.observe(await self._device().read())
        return again

    def reconsider(self) -> None:
        """After the mirror was read afresh: what is cut and still there is to be reaped, no other."""
        held = self.mirror.peers
        self.to_reap = {key: None for key, peer in held.items() if peer.tenure == CUT}

    async def one_by_one(
        self, plan: Plan, between: Callable[[], Awaitable[bool]]
    ) -> tuple[dict[PublicKey, tuple[Operation, DeviceError]], bool]:
        """Apply each operation by itself; return what the device would not do, by peer, and whether all
        was tried.

        A peer that could not be removed is not added over what it is: its old keys would live on. Raises
        DeviceError if the interface is gone or does not answer.
        """
        refused: dict[PublicKey, tuple[Operation, DeviceError]] = {}
        for number, operation in enumerate(plan, 1):
            if operation.public_key in refused:
                continue
            try:
                await self.apply([operation], plan.tenures)
            except DeviceError as error:
                if error.errno in OF_THE_INTERFACE:
                    raise
                refused[operation.public_key] = operation, error
            if number % FEW == 0 and not await between():
                return refused, False
        return refused, True

    def _steps(self, plan: Plan) -> Iterator[Sequence[Operation]]:
        returning = plan.tenures.keys()
        going = [remove for remove in plan.removes if remove.public_key not in self.to_reap]
        if len(going) > HANDFUL:
            yield [CutPeer(remove.public_key) for remove in going]
        else:
            yield [remove for remove in going if remove.public_key not in returning]
        # Only once these are off the interface are they added to it again.
        yield [remove for remove in plan.removes if remove.public_key in returning]
        yield plan.updates
        yield plan.adds
