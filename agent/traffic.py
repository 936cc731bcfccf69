"""What each peer has sent and received since it was first seen here (rule 21).

The kernel counts from zero whenever a peer is added or the interface is made anew; the totals kept
here only grow, whatever happened to either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from agent.model import Endpoint, ObservedPeer, PublicKey


class Traffic(NamedTuple):
    """One peer's totals in bytes, with the kernel's counters when they were last looked at.

    ``rx_bytes`` is what was received from the peer. ``latest_handshake`` (Unix seconds, 0: never) and
    ``endpoint`` are the last that were seen; they stay when the peer goes.
    """

    rx_bytes: int = 0
    tx_bytes: int = 0
    kernel_rx: int = 0
    kernel_tx: int = 0
    latest_handshake: float = 0.0
    endpoint: Endpoint | None = None


_NOTHING = Traffic()
# What no traffic reaches and a faulty implementation may claim: more can't be journalled or told.
_MOST = (1 << 63) - 1
_LATEST = 200_000_000_000.0


class TrafficBook:
    """The traffic of all peers, and which of them core has not been told of."""

    def __init__(self) -> None:
        self._book: dict[PublicKey, Traffic] = {}
        self._unreported: dict[PublicKey, None] = {}
        self.looked_at: float | None = None
        """Boot time of the last look; None before the first."""
        self._span: float | None = None
        """Seconds between the last two looks."""
        self._gains: dict[PublicKey, tuple[int, int]] = {}
        """What the last look found received and sent since the one before, of those who have changed."""

    def restore(self, rows: Iterable[tuple[PublicKey, Traffic]]) -> None:
        """Start from what the journal holds."""
        self._book.update(rows)

    def get(self, key: PublicKey) -> Traffic:
        """A peer's traffic; all zero for one that was never seen."""
        return self._book.get(key, _NOTHING)

    def many(self, keys: Iterable[PublicKey]) -> list[Traffic]:
        """The same of many."""
        held = self._book.get
        return [held(key, _NOTHING) for key in keys]

    def added(self, key: PublicKey) -> None:
        """The peer was put on the interface afresh: the kernel counts from zero."""
        held = self._book.get(key)
        if held is not None and (held.kernel_rx or held.kernel_tx):
            self._book[key] = held._replace(kernel_rx=0, kernel_tx=0)

    def interface_made(self) -> None:
        """The interface was made anew: the kernel counts from zero for everyone."""
        for key in list(self._book):
            self.added(key)

    def look(self, boot: float) -> None:
        """Begin a look at boot time ``boot``: what ``observe`` takes in from here on belongs to it."""
        self._span = None if self.looked_at is None else boot - self.looked_at
        self.looked_at = boot
        self._gains = {}

    def rates(self, key: PublicKey) -> tuple[float, float] | None:
        """Bytes a second received from a peer and sent to it, between the last two looks.

        None if there were not two looks: how long what the first one found had taken is not known.
        """
        if not self._span or self._span < 0:
            return None
        received, sent = self._gains.get(key, (0, 0))
        return received / self._span, sent / self._span

    def observe(self, observed: ObservedPeer) -> int | None:
        """Take in one look at a peer; return the bytes received since the last, None if nothing changed."""
        key = observed.public_key
        held = self._book.get(key, _NOTHING)
        rx, tx = min(observed.rx_bytes, _MOST), min(observed.tx_bytes, _MOST)
        handshake = observed.latest_handshake or held.latest_handshake
        if not 0.0 <= handshake < _LATEST:
            handshake = held.latest_handshake
        endpoint = observed.endpoint or held.endpoint
        if (
            rx == held.kernel_rx
            and tx == held.kernel_tx
            and handshake == held.latest_handshake
            and endpoint == held.endpoint
        ):
            return None
        received = rx - held.kernel_rx if rx >= held.kernel_rx else rx
        sent = tx - held.kernel_tx if tx >= held.kernel_tx else tx
        self._book[key] = Traffic(
            min(held.rx_bytes + received, _MOST),
            min(held.tx_bytes + sent, _MOST),
            rx,
            tx,
            handshake,
            endpoint,
        )
        self._gains[key] = received, sent
        self._unreported[key] = None
        return received

    def due(self, limit: int, listed: Collection[PublicKey]) -> list[PublicKey]:
        """Up to ``limit`` listed peers that changed since core last took a report of them."""
        keys: list[PublicKey] = []
        for key in list(self._unreported):
            if key not in listed:
                del self._unreported[key]
            elif len(keys) < limit:
                keys.append(key)
            else:
                break
        return keys

    def reported(
        self,
        key: PublicKey,
        rx_bytes: int,
        tx_bytes: int,
        latest_handshake: float,
        endpoint: Endpoint | None,
    ) -> None:
        """Core took this report; the peer is due again only if it has changed meanwhile."""
        held = self.get(key)
        told = (rx_bytes, tx_bytes, latest_handshake, endpoint)
        if told == (held.rx_bytes, held.tx_bytes, held.latest_handshake, held.endpoint):
            self._unreported.pop(key, None)

    def report_all(self) -> None:
        """Everybody is due again (after a new epoch)."""
        self._unreported = {key: None for key, held in self._book.items() if held != _NOTHING}
