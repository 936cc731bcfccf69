"""The names of the agent's metrics, as /metrics has them, and those that an expression asks for."""

import asyncio
import functools
import re

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from agent.encoding import parse_prefix
from agent.metrics import Metrics, PeerSeries
from agent.model import Peer, PublicKey
from agent.traffic import Traffic

_NAME = re.compile(r"\b(?:wg_agent|wireguard|process)_\w+|\bup\b(?=[{ ])")


@functools.cache
def families() -> tuple[Metric, ...]:
    """All that /metrics can hold."""
    peer = Peer(PublicKey(bytes(31) + b"\1"), (parse_prefix("10.8.0.5/32"),), "anna-laptop")
    metrics = Metrics("wg0", "1", lambda: [PeerSeries(peer, Traffic())])
    metrics.set_starts({})
    metrics.set_certificates({"core.ca": 1.0})
    metrics.set_token_expiry("core.token", 1.0)
    text = asyncio.run(metrics.render()).decode()
    return tuple(text_string_to_metric_families(text))


def metric_names() -> set[str]:
    """The names of all samples."""
    return {sample.name for family in families() for sample in family.samples}


def names_in(expression: str) -> set[str]:
    """The metrics that an expression of PromQL asks for."""
    return set(_NAME.findall(expression))
