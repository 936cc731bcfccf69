"""Which gateways are there, and whether they have confirmed a revision.

In memory only: after a restart of core it fills again with the gateways' first requests.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from agent.sandbox.errors import Refusal
from agent.sandbox.liveness import Witness

# An agent whose core has no stream polls every 30 s by default; one with a stream is gone without it.
_POLLING_WINDOW: Final = 75.0
_RECONNECTING: Final = 5.0
# Seconds between looks at who of those that are waited for is still there.
_LOOK: Final = 0.25
_NEVER: Final = -math.inf, -math.inf


@dataclass(slots=True)
class Presence:
    """What is known of one gateway; times in Unix seconds.

    ``left``: when it was last there before ``since``. ``streams`` counts its open change streams,
    ``streamed`` says that it has had one.
    """

    location_id: int
    left: float
    since: float
    last_seen: float
    streams: int = 0
    streamed: bool = False

    def stream_opened(self) -> None:
        """Note a stream."""
        self.streams += 1
        self.streamed = True

    def stream_closed(self, now: float) -> None:
        """Note the end of a stream."""
        self.streams -= 1
        self.last_seen = now


@dataclass(slots=True, eq=False)
class _Wait:
    public_key: str
    epoch: str
    revision: int
    pending: set[str]
    done: asyncio.Future[None]
    confirmed: bool = False

    def confirm(self, name: str) -> None:
        self.confirmed = True
        self.drop_all_but(self.pending - {name})

    def drop_all_but(self, names: set[str]) -> None:
        """Wait for none but these; what one of the others has confirmed is enough without them."""
        self.pending &= names
        if self.confirmed and not self.pending and not self.done.done():
            self.done.set_result(None)


@dataclass(slots=True)
class Gateways:
    """The gateways' presence and the grants that wait for them.

    ``started``: when core was, in Unix seconds. Who was there before that is not known.
    """

    started: float
    present: dict[str, Presence] = field(default_factory=dict)
    _waits: dict[int, set[_Wait]] = field(default_factory=dict)
    _reports: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)

    def reported(self, name: str, location_id: int) -> float:
        """Return up to when a gateway has told of all its peers; minus infinity if not since the start."""
        return self._reports.get((name, location_id), _NEVER)[1]

    def told(self, name: str, location_id: int, at: float) -> None:
        """Note that a gateway has told of all that had changed at a time."""
        last = self.reported(name, location_id)
        if at > last:
            self._reports[name, location_id] = last, at

    def seen(self, name: str, location_id: int, now: float) -> Presence:
        """Note a request of a gateway."""
        held = self.present.get(name)
        if held is None or held.location_id != location_id or not _is_there(held, now):
            left = self.started if held is None else held.last_seen
            held = Presence(location_id, left=left, since=now, last_seen=now)
            self.present[name] = held
        held.last_seen = now
        return held

    def connected(self, location_id: int, now: float) -> set[str]:
        """Return the names of a location's gateways that are there."""
        return {
            name
            for name, held in self.present.items()
            if held.location_id == location_id and _is_there(held, now)
        }

    def witnesses(self, names: Iterable[str], location_id: int, now: float) -> list[Witness]:
        """Return what each of a location's gateways can say of its clients."""
        found = []
        for name in names:
            held, settled = self.present.get(name), self._reports.get((name, location_id), _NEVER)[0]
            if held is None or held.location_id != location_id:
                found.append(Witness(self.started, None, settled))
            elif _is_there(held, now):
                found.append(Witness(held.left, held.since, settled))
            else:
                found.append(Witness(held.last_seen, None, settled))
        return found

    async def wait_applied(
        self,
        location_id: int,
        public_key: str,
        epoch: str,
        revision: int,
        *,
        clock: Callable[[], float],
        timeout: float,  # noqa: ASYNC109 (the limit is part of what the answer says)
    ) -> None:
        """Return once the gateways that are there have a revision in their kernels.

        When none is there, the first to confirm decides. One that leaves meanwhile is not waited for
        any longer; when one that is there stays silent, the others decide after the ``timeout``.
        Raises Refusal if one refuses the peer, or if nobody answers within ``timeout`` seconds.
        """
        wait = _Wait(
            public_key,
            epoch,
            revision,
            self.connected(location_id, clock()),
            asyncio.get_running_loop().create_future(),
        )
        waits = self._waits.setdefault(location_id, set())
        waits.add(wait)
        try:
            async with asyncio.timeout(timeout):
                while not (await asyncio.wait({wait.done}, timeout=_LOOK))[0]:
                    wait.drop_all_but(self.connected(location_id, clock()))
                wait.done.result()
        except TimeoutError:
            if not wait.confirmed:
                raise Refusal(
                    504,
                    "gateway_timeout",
                    f"No gateway confirmed the session within {timeout:g} s, so it was taken back."
                    " Try again with a new code.",
                ) from None
        finally:
            waits.discard(wait)

    def applied(
        self, name: str, location_id: int, epoch: str, revision: int, refused: dict[str, str]
    ) -> None:
        """Note that a gateway has a revision; ``refused`` maps public keys to reasons."""
        for wait in list(self._waits.get(location_id, ())):
            if wait.done.done() or wait.epoch != epoch or revision < wait.revision:
                continue
            reason = refused.get(wait.public_key)
            if reason is not None:
                wait.done.set_exception(
                    Refusal(
                        502,
                        "gateway_refused",
                        f"The gateway refused this device ({reason}); ask the administrator.",
                    )
                )
                continue
            wait.confirm(name)


def _is_there(held: Presence, now: float) -> bool:
    window = _RECONNECTING if held.streamed else _POLLING_WINDOW
    return held.streams > 0 or now - held.last_seen < window
