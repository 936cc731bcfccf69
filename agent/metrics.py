"""What Prometheus sees: the agent's own metrics, and three series for every peer.

The per-peer series have the names and labels of prometheus_wireguard_exporter, so that dashboards
made for it work. They are rendered by hand, with the labels kept from one scrape to the next: the
client library takes ten times as long, and a gateway may have 100,000 peers.
"""

from __future__ import annotations

import asyncio
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.encoding import format_key
from agent.lives import After
from agent.model import EndReason, Peer, Refusal
from agent.plan import DriftKind
from agent.traffic import Traffic

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
PEER_STATES: Final = ("up", "waiting", "refused")

# Seconds. An apply is milliseconds natively and seconds for a cold start with 100,000 peers.
_APPLY: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PUSH: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_EXPIRY: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 15, 60)

_SERIES: Final = (
    ("wireguard_sent_bytes_total", "counter", "Bytes sent to the peer.", "traffic.tx_bytes"),
    ("wireguard_received_bytes_total", "counter", "Bytes received from the peer.", "traffic.rx_bytes"),
    (
        "wireguard_latest_handshake_seconds",
        "gauge",
        "Unix time of the latest handshake, 0 for never.",
        "traffic.latest_handshake",
    ),
)
"""Name, type and help of each series, and the member of ``PeerSeries`` that it shows."""
_PIECE: Final = 250
_SPECIAL: Final = re.compile(r'[\\"\n]')
_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class PeerSeries(NamedTuple):
    """One peer for /metrics, and its traffic as the server sees it."""

    peer: Peer
    traffic: Traffic


class _Counted(Collector):
    """What is counted elsewhere: sessions by the books, starts by the journal, which outlives the process."""

    def __init__(self) -> None:
        self.grants = 0
        self.starts: Mapping[str, int] | None = None

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "wg_agent_session_grants", "Sessions that core has granted and the agent has let in.", self.grants
        )
        starts = CounterMetricFamily(
            "wg_agent_starts",
            "Starts of the agent since its journal was made, by what they came after.",
            labels=("after",),
        )
        # Without the journal no series at all: to Prometheus a 0 on the way is that many starts at once.
        if self.starts is not None:
            for after in After:
                starts.add_metric((after.value,), self.starts.get(after.value, 0))
        yield starts


class Metrics:
    """The metrics of one agent; set them from the loop, ``render`` them for a scrape.

    ``peers`` returns the peers as they are, in a sequence that is never changed afterwards; it is
    called on the loop. ``per_peer`` may be switched at any time.
    """

    def __init__(
        self,
        interface: str,
        version: str,
        peers: Callable[[], Sequence[PeerSeries]] = tuple,
        *,
        per_peer: bool = True,
    ) -> None:
        # Series that only repeat when the process started; there is no way to ask for one registry.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.per_peer = per_peer
        self._peers = peers
        self._interface = interface
        self._one_at_a_time = asyncio.Lock()
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        build = Gauge(
            "wg_agent_build_info",
            "The running agent; always 1.",
            ("version", "interface"),
            registry=registry,
        )
        build.labels(version, interface).set(1)
        self.core_connected = Gauge(
            "wg_agent_core_connected",
            "1 while the last exchange with core succeeded.",
            registry=registry,
        )
        self.last_sync = Gauge(
            "wg_agent_last_sync_timestamp_seconds",
            "When core's state was last known to be in the kernel, in Unix time; 0 for never.",
            registry=registry,
        )
        self.applied_revision = Gauge(
            "wg_agent_applied_revision",
            "Core's revision that is in the kernel.",
            registry=registry,
        )
        self.interface_up = Gauge("wg_agent_interface_up", "1 while the interface is up.", registry=registry)
        self._faults = Gauge(
            "wg_agent_fault",
            "1 while something does not do what the agent wants of it: device, guard (nftables) or journal.",
            ("part",),
            registry=registry,
        )
        self._certificate_expiry = Gauge(
            "wg_agent_certificate_expiry_timestamp_seconds",
            "When a certificate that the agent has loaded expires, in Unix time.",
            ("certificate",),
            registry=registry,
        )
        self._token_expiry = Gauge(
            "wg_agent_token_expiry_timestamp_seconds",
            "When core's token says that it expires, in Unix time; only for one that says so (a JWT).",
            ("token",),
            registry=registry,
        )
        self._counted = _Counted()
        registry.register(self._counted)
        self.sessions_active = Gauge("wg_agent_sessions_active", "Live sessions.", registry=registry)
        self.session_ends = Counter(
            "wg_agent_session_ends_total",
            "Sessions ended, by reason.",
            ("reason",),
            registry=registry,
        )
        self._peer_count = Gauge(
            "wg_agent_peers",
            "Peers of core's list: up (on the interface), waiting (for a session) or refused.",
            ("state",),
            registry=registry,
        )
        self._refused = Gauge(
            "wg_agent_refused_peers",
            "Peers of core's list that are refused, by reason.",
            ("reason",),
            registry=registry,
        )
        self.drift = Counter(
            "wg_agent_drift_total",
            "Differences found on the interface that the agent had not made, by kind.",
            ("kind",),
            registry=registry,
        )
        self.core_invalid = Counter(
            "wg_agent_core_invalid_total",
            "Answers and events of core that were refused whole as invalid.",
            registry=registry,
        )
        self.reap_backlog = Gauge(
            "wg_agent_reap_backlog",
            "Peers that were made useless and are still to be removed.",
            registry=registry,
        )
        self.clock_skew = Gauge(
            "wg_agent_clock_skew_seconds",
            "This host's wall clock less core's clock.",
            registry=registry,
        )
        self.apply_seconds = Histogram(
            "wg_agent_apply_seconds",
            "Time to bring one plan into the kernel.",
            buckets=_APPLY,
            registry=registry,
        )
        self.observation_seconds = Histogram(
            "wg_agent_observation_seconds",
            "Time that a look at the interface takes: read, compare, repair the guard, journal.",
            buckets=_APPLY,
            registry=registry,
        )
        self.push_to_kernel_seconds = Histogram(
            "wg_agent_push_to_kernel_seconds",
            "Time from the arrival of a change to its acknowledgement by the kernel.",
            buckets=_PUSH,
            registry=registry,
        )
        self.expiry_lag_seconds = Histogram(
            "wg_agent_expiry_lag_seconds",
            "Time from a session's deadline to its peer being off the interface.",
            buckets=_EXPIRY,
            registry=registry,
        )
        self.overdue_seconds = Gauge(
            "wg_agent_overdue_seconds",
            "Time since the deadline of the session that should have left the interface first; 0 for none.",
            registry=registry,
        )
        self.set_faults()
        # A series that comes with its first 1 has no increase for Prometheus to see.
        for reason in EndReason:
            self.session_ends.labels(reason.value)
        for kind in DriftKind:
            self.drift.labels(kind.value)
        self.set_peers(dict.fromkeys(PEER_STATES, 0))
        self.set_refused({})

    def set_peers(self, by_state: Mapping[str, int]) -> None:
        """Set how many of core's peers are ``up``, ``waiting`` and ``refused``; absent means none."""
        for state in PEER_STATES:
            self._peer_count.labels(state).set(by_state.get(state, 0))

    def set_refused(self, by_reason: Mapping[Refusal, int]) -> None:
        """Set how many peers are refused for each reason; absent means none."""
        for reason in Refusal:
            self._refused.labels(reason.value).set(by_reason.get(reason, 0))

    def set_faults(self, *, device: bool = False, guard: bool = False, journal: bool = False) -> None:
        """Set what does not work at the moment."""
        for part, faulty in (("device", device), ("guard", guard), ("journal", journal)):
            self._faults.labels(part).set(faulty)

    def set_starts(self, starts: Mapping[str, int] | None) -> None:
        """Set how many starts there were, this one among them, by the value of ``After``; None: not known."""
        self._counted.starts = None if starts is None else dict(starts)

    def set_grants(self, grants: int) -> None:
        """Set how many sessions this process has let in."""
        self._counted.grants = grants

    def set_certificates(self, expires_at: Mapping[str, float]) -> None:
        """Set which certificates there are, and when each expires in Unix seconds."""
        self._certificate_expiry.clear()
        for name, at in expires_at.items():
            self._certificate_expiry.labels(name).set(at)

    def set_token_expiry(self, name: str, expires_at: float) -> None:
        """Set when a token expires, in Unix seconds."""
        self._token_expiry.labels(name).set(expires_at)

    async def render(self) -> bytes:
        """Return everything as Prometheus text, format 0.0.4 (``CONTENT_TYPE``).

        The work is done in a thread, one scrape at a time.
        """
        async with self._one_at_a_time:
            peers = self._peers() if self.per_peer else ()
            return await asyncio.to_thread(self._render, peers)

    def _render(self, peers: Sequence[PeerSeries]) -> bytes:
        own = generate_latest(self._registry)
        return b"".join((own, *render_peers(self._interface, peers))) if self.per_peer else own


def render_peers(interface: str, peers: Sequence[PeerSeries]) -> Iterator[bytes]:
    """Give the three series of every peer as Prometheus text, in pieces.

    Each piece is made by itself, since the whole takes three times its size to put together; and nothing is
    kept for the next scrape (``rss_10k``).
    """
    before_key = f'{{interface="{_escape(interface)}",public_key="'
    texts: list[list[bytes]] = [
        [f"# HELP {series} {about}\n# TYPE {series} {kind}\n".encode()] for series, kind, about, _ in _SERIES
    ]
    for at in range(0, len(peers), _PIECE):
        some = peers[at : at + _PIECE]
        labels = [before_key + _labels(peer) for peer, _ in some]
        for (series, _, _, member), pieces in zip(_SERIES, texts, strict=True):
            values = map(operator.attrgetter(member), some)
            lines = [f"{series}{of}{value}\n" for of, value in zip(labels, values, strict=True)]
            pieces.append("".join(lines).encode())
    return itertools.chain.from_iterable(texts)


def _labels(peer: Peer) -> str:
    allowed_ips = ",".join(map(str, peer.allowed_ips))
    return (
        f'{format_key(peer.public_key)}",allowed_ips="{allowed_ips}",friendly_name="{_escape(peer.name)}"}} '
    )


def _escape(value: str) -> str:
    return value.translate(_ESCAPES) if _SPECIAL.search(value) else value
