"""Which gateways are there, and whether they have confirmed a revision.

In memory only: after a restart of core it fills again with the gateways' first requests.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from agent.sandbox.errors import Refusal

# An agent whose core has no stream polls every 30 s by default; one with a stream is gone without it.
_POLLING_WINDOW: Final = 75.0
_RECONNECTING: Final = 5.0


@dataclass(slots=True)
class Presence:
    """What is known of one gateway; times in Unix seconds.

    ``streams`` counts its open change streams, ``streamed`` says that it has had one.
    """

    location_id: int
    since: float
    last_seen: float
    streams: int = 0
    streamed: bool = False

    def stream_opened(self) -> None:
        """Note a stream."""
        self.streams += 1
        self.streamed = True

    def stream_closed(self) -> None:
        """Note the end of a stream."""
        self.streams -= 1


@dataclass(slots=True, eq=False)
class _Wait:
    public_key: str
    epoch: str
    revision: int
    pending: set[str]
    done: asyncio.Future[None]
    confirmed: bool = False


@dataclass(slots=True)
class Gateways:
    """The gateways' presence and the grants that wait for them."""

    present: dict[str, Presence] = field(default_factory=dict)
    _waits: dict[int, set[_Wait]] = field(default_factory=dict)

    def seen(self, name: str, location_id: int, now: float) -> Presence:
        """Note a request of a gateway."""
        held = self.present.get(name)
        if held is None or held.location_id != location_id or not _is_there(held, now):
            held = Presence(location_id, since=now, last_seen=now)
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

    def reporting_since(self, location_id: int, now: float) -> float | None:
        """Return since when all of a location's gateways that are there have been; None if none is."""
        times = [self.present[name].since for name in self.connected(location_id, now)]
        return max(times, default=None)

    async def wait_applied(
        self,
        location_id: int,
        public_key: str,
        epoch: str,
        revision: int,
        *,
        now: float,
        timeout: float,  # noqa: ASYNC109 (the limit is part of what the answer says)
    ) -> None:
        """Return once the gateways that are there have a revision in their kernels.

        When none is there, the first to confirm decides; when one of several stays silent, the
        others do after the ``timeout``. Raises Refusal if one refuses the peer, or if nobody
        answers within ``timeout`` seconds.
        """
        wait = _Wait(
            public_key,
            epoch,
            revision,
            self.connected(location_id, now),
            asyncio.get_running_loop().create_future(),
        )
        waits = self._waits.setdefault(location_id, set())
        waits.add(wait)
        try:
            async with asyncio.timeout(timeout):
                await wait.done
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
            wait.confirmed = True
            wait.pending.discard(name)
            if not wait.pending:
                wait.done.set_result(None)


def _is_there(held: Presence, now: float) -> bool:
    window = _RECONNECTING if held.streamed else _POLLING_WINDOW
    return held.streams > 0 or now - held.last_seen < window
