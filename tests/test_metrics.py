from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.encoding import format_key
from agent.lives import After
from agent.metrics import CONTENT_TYPE, Metrics, PeerSeries, render_peers
from agent.model import EndReason, Peer, Prefix, PublicKey, Refusal
from agent.plan import DriftKind
from agent.traffic import Traffic


def key(number: int) -> PublicKey:
    return PublicKey(number.to_bytes(32, "big"))


def peer(number: int, name: str = "alice") -> PeerSeries:
    v4 = Prefix(bytes([10, 0, number >> 8 & 255, number & 255]), 32)
    v6 = Prefix(bytes.fromhex("fd00") + bytes(12) + number.to_bytes(2, "big"), 128)
    traffic = Traffic(1000 + number, 2000 + number, latest_handshake=1_732_417_200.123)
    return PeerSeries(Peer(key(number), (v4, v6), name), traffic)


def moved(series: PeerSeries, **members: Any) -> PeerSeries:
    return series._replace(traffic=series.traffic._replace(**members))


def text(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode()


def parsed(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    series: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series.setdefault(sample.name, {})[tuple(sample.labels.items())] = sample.value
    return series


def rendered(metrics: Metrics) -> str:
    return asyncio.run(metrics.render()).decode()


def test_peers_have_the_exporters_names_and_labels() -> None:
    series = parsed(rendered(Metrics("wg0", "0.1.0", lambda: [peer(5)])))

    labels = (
        ("interface", "wg0"),
        ("public_key", format_key(key(5))),
        ("allowed_ips", "10.0.0.5/32,fd00::5/128"),
        ("friendly_name", "alice"),
    )
    assert series["wireguard_sent_bytes_total"] == {labels: 2005}
    assert series["wireguard_received_bytes_total"] == {labels: 1005}
    assert series["wireguard_latest_handshake_seconds"] == {labels: 1_732_417_200.123}


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\\nb", "a\nb", "{}", "é", 'x",y="z', ""])
def test_a_name_cannot_break_out_of_its_label(name: str) -> None:
    families = list(text_string_to_metric_families(text(render_peers("wg0", [peer(1, name)]))))

    assert [f.samples[0].labels["friendly_name"] for f in families] == [name] * 3
    assert [len(f.samples) for f in families] == [1, 1, 1]


def test_a_scrape_shows_what_changed_since_the_last() -> None:
    text(render_peers("wg0", [peer(1), peer(2)]))

    second = text(render_peers("wg0", [moved(peer(1, "bob"), rx_bytes=7), peer(3)]))

    received = parsed(second)["wireguard_received_bytes_total"]
    assert {dict(labels)["public_key"] for labels in received} == {
        format_key(key(1)),
        format_key(key(3)),
    }
    assert 7 in received.values()
    assert "alice" in second
    assert 'friendly_name="bob"' in second


def test_every_peer_has_its_own_numbers_however_many_there_are() -> None:
    many = [moved(peer(n, f"n{n}"), latest_handshake=float(n)) for n in range(2500)]
    series = parsed(text(render_peers("wg0", many)))
    for name, of in (
        ("wireguard_sent_bytes_total", lambda n: 2000 + n),
        ("wireguard_received_bytes_total", lambda n: 1000 + n),
        ("wireguard_latest_handshake_seconds", float),
    ):
        shown = {dict(labels)["friendly_name"]: value for labels, value in series[name].items()}
        assert shown == {f"n{n}": of(n) for n in range(2500)}


def test_per_peer_series_can_be_switched_off_at_any_time() -> None:
    metrics = Metrics("wg0", "0.1.0", lambda: [peer(1)])
    assert "wireguard_" in rendered(metrics)

    metrics.per_peer = False

    assert "wireguard_" not in rendered(metrics)
    assert "wg_agent_core_connected" in rendered(metrics)


def test_the_agents_metrics_have_their_fixed_names() -> None:
    metrics = Metrics("wg0", "0.1.0")
    metrics.core_connected.set(1)
    metrics.last_sync.set(1e9)
    metrics.applied_revision.set(42)
    metrics.session_ends.labels(EndReason.IDLE).inc()
    metrics.drift.labels("peer_added").inc()
    metrics.set_peers({"up": 3, "waiting": 2})
    metrics.set_refused({Refusal.PREFIX_CLAIMED: 2})
    metrics.expiry_lag_seconds.observe(0.02)
    series = parsed(rendered(metrics))

    assert series["wg_agent_core_connected"] == {(): 1}
    assert series["wg_agent_last_sync_timestamp_seconds"] == {(): 1e9}
    assert series["wg_agent_applied_revision"] == {(): 42}
    drift = {dict(labels)["kind"]: value for labels, value in series["wg_agent_drift_total"].items()}
    assert drift == {kind.value: float(kind is DriftKind.PEER_ADDED) for kind in DriftKind}
    assert series["wg_agent_peers"] == {
        (("state", "up"),): 3,
        (("state", "waiting"),): 2,
        (("state", "refused"),): 0,
    }
    assert series["wg_agent_refused_peers"][("reason", "prefix_claimed"),] == 2
    assert series["wg_agent_build_info"] == {(("interface", "wg0"), ("version", "0.1.0")): 1}
    assert series["wg_agent_expiry_lag_seconds_count"] == {(): 1}
    for name in (
        "wg_agent_sessions_active",
        "wg_agent_core_invalid_total",
        "wg_agent_reap_backlog",
        "wg_agent_clock_skew_seconds",
        "wg_agent_apply_seconds_count",
        "wg_agent_push_to_kernel_seconds_count",
        "process_resident_memory_bytes",
    ):
        assert name in series


def test_every_reason_for_an_end_is_there_from_the_start() -> None:
    ends = parsed(rendered(Metrics("wg0", "0.1.0")))["wg_agent_session_ends_total"]

    assert ends == {(("reason", reason.value),): 0 for reason in EndReason}


def test_every_kind_of_start_is_there_and_the_journals_count_goes_on() -> None:
    metrics = Metrics("wg0", "0.1.0")
    metrics.set_starts({})
    before = parsed(rendered(metrics))["wg_agent_starts_total"]
    metrics.set_starts({"crash": 3, "stop": 1})
    after = parsed(rendered(metrics))["wg_agent_starts_total"]

    assert before == {(("after", kind.value),): 0 for kind in After}
    assert after == before | {(("after", "crash"),): 3, (("after", "stop"),): 1}


def test_starts_that_are_not_known_have_no_series() -> None:
    metrics = Metrics("wg0", "0.1.0")
    assert "wg_agent_starts_total{" not in rendered(metrics)
    metrics.set_starts({"crash": 3})
    assert 'wg_agent_starts_total{after="crash"} 3.0' in rendered(metrics)
    metrics.set_starts(None)
    assert "wg_agent_starts_total{" not in rendered(metrics)


def test_certificates_that_are_gone_are_not_shown() -> None:
    metrics = Metrics("wg0", "0.1.0")
    metrics.set_certificates({"core.ca": 2e9, "defguard.core": 1.9e9})
    metrics.set_certificates({"core.ca": 2e9})
    series = parsed(rendered(metrics))

    assert series["wg_agent_certificate_expiry_timestamp_seconds"] == {(("certificate", "core.ca"),): 2e9}


def test_a_token_without_an_end_has_no_series() -> None:
    metrics = Metrics("wg0", "0.1.0")
    assert "wg_agent_token_expiry_timestamp_seconds{" not in rendered(metrics)

    metrics.set_token_expiry("core.token", 2e9)

    series = parsed(rendered(metrics))["wg_agent_token_expiry_timestamp_seconds"]
    assert series == {(("token", "core.token"),): 2e9}


def test_what_does_not_work_is_named() -> None:
    metrics = Metrics("wg0", "0.1.0")
    metrics.set_faults(guard=True)

    assert parsed(rendered(metrics))["wg_agent_fault"] == {
        (("part", "device"),): 0,
        (("part", "guard"),): 1,
        (("part", "journal"),): 0,
    }


def test_a_refusal_that_is_over_goes_back_to_zero() -> None:
    metrics = Metrics("wg0", "0.1.0")
    metrics.set_refused({Refusal.OWN_KEY: 1})
    metrics.set_refused({})

    assert set(parsed(rendered(metrics))["wg_agent_refused_peers"].values()) == {0}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (prometheus)")
@pytest.mark.parametrize("per_peer", [True, False])
def test_promtool_finds_no_fault(*, per_peer: bool) -> None:
    metrics = Metrics("wg0", "0.1.0", lambda: [peer(1), peer(2, 'a"\\')], per_peer=per_peer)
    metrics.drift.labels("peer_added").inc()
    metrics.set_certificates({"core.ca": 2e9, "push.tls_cert": 1.9e9})
    metrics.set_token_expiry("core.token", 2e9)

    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=asyncio.run(metrics.render()),
        capture_output=True,
        check=False,
    )

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_content_type_is_that_of_the_text_format() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_scrapes_at_the_same_time_do_not_mix() -> None:
    metrics = Metrics("wg0", "0.1.0", lambda: [peer(n) for n in range(200)])

    async def scrape() -> list[bytes]:
        return await asyncio.gather(*(metrics.render() for _ in range(5)))

    for body in asyncio.run(scrape()):
        assert len(parsed(body.decode())["wireguard_sent_bytes_total"]) == 200


def test_ten_thousand_peers_cost_little_and_do_not_hold_the_loop() -> None:
    peers = [peer(n) for n in range(10_000)]
    metrics = Metrics("wg0", "0.1.0", lambda: peers)

    async def scrape() -> tuple[float, float]:
        await metrics.render()
        before, worst, last = time.process_time(), 0.0, time.perf_counter()
        rendering = asyncio.create_task(metrics.render())
        while not rendering.done():
            await asyncio.sleep(0.001)
            worst, last = max(worst, time.perf_counter() - last), time.perf_counter()
        return time.process_time() - before, worst

    best_cost, best_wait = map(min, zip(*[asyncio.run(scrape()) for _ in range(5)], strict=True))

    assert best_cost < 0.15  # 0.01 to 0.04 on an idle host
    assert best_wait < 0.1
