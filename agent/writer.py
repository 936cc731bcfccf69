"""Carries plans out on the device, and keeps the mirror by what the device has acknowledged.

Ending many peers at once happens in two steps (rule 8): one batch makes them useless, which is cheap
and keeps the deadline; removing them, which waits for the kernel and holds the network lock, follows
a few at a time between other work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from agent.errors import DeviceError
from agent.model import CutPeer, Operation, PublicKey, RemovePeer
from agent.plan import CUT, FOUND, Mirror, Plan
from agent.wireguard.device import Device

HANDFUL: Final = 8
"""Peers that are removed outright; more are cut first and removed this many at a time."""
SLICE: Final = 512
"""Operations between two looks at the clock: deadlines do not wait for a long plan to end."""

_T = TypeVar("_T")


class Writer:
    """The only hand on the interface."""

    def __init__(self, device: Callable[[], Device]) -> None:
        self.mirror = Mirror()
        self.to_reap: dict[PublicKey, None] = {}
        """Peers that were cut and are still to be removed, oldest first."""
        self._device = device

    async def carry_out(self, plan: Plan, between: Callable[[], Awaitable[bool]]) -> bool:
        """Apply a plan: removes, then updates, then adds.

        ``between`` is awaited after each slice; once it returns False the rest is left for another
        plan, and so does this. Raises DeviceError; the mirror is then behind the device.
        """
        for operations in self._steps(plan):
            for some in _slices(operations, SLICE):
                await self.apply(some, plan.tenures)
                if not await between():
                    return False
        return True

    async def apply(self, operations: Sequence[Operation], tenures: dict[PublicKey, int]) -> None:
        """Apply operations as they are, and take them into the mirror once acknowledged."""
        await self._device().apply(operations)
        for operation in operations:
            self.mirror.acknowledge(operation, tenures.get(operation.public_key, FOUND))
            if isinstance(operation, RemovePeer):
                self.to_reap.pop(operation.public_key, None)
            elif isinstance(operation, CutPeer):
                self.to_reap[operation.public_key] = None

    async def reap(self) -> bool:
        """Remove a handful of the peers that were cut; return whether there are more."""
        some = [RemovePeer(key) for key in islice(self.to_reap, HANDFUL)]
        if some:
            await self.apply(some, {})
        return bool(self.to_reap)

    def reconsider(self) -> None:
        """After the mirror was read afresh: what is cut and still there is to be reaped, no other."""
        held = self.mirror.peers
        self.to_reap = {key: None for key, peer in held.items() if peer.tenure == CUT}

    async def one_by_one(self, plan: Plan) -> dict[PublicKey, DeviceError]:
        """Apply each operation by itself; return what the device would not do, by peer."""
        refused: dict[PublicKey, DeviceError] = {}
        for operation in plan:
            try:
                await self.apply([operation], plan.tenures)
            except DeviceError as error:
                refused[operation.public_key] = error
        return refused

    def _steps(self, plan: Plan) -> Iterator[Sequence[Operation]]:
        returning = plan.tenures.keys()
        for_good = [
            r for r in plan.removes if r.public_key not in returning and r.public_key not in self.to_reap
        ]
        if len(for_good) > HANDFUL:
            yield [CutPeer(r.public_key) for r in for_good]
        else:
            yield for_good
        yield [r for r in plan.removes if r.public_key in returning]
        yield plan.updates
        yield plan.adds


def _slices(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
