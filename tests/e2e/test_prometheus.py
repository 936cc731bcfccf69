import json
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.scenarios import connect
from tests.support.site import Site, until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]


def query(site: Site, expression: str) -> dict[str, float]:
    """The values of an instant query, by public key or reason or the empty string."""
    url = f"http://127.0.0.1:9090/api/v1/query?query={quote(expression)}"
    fetch = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=10).read().decode())"
    done = site.gateway.run("python3", "-c", fetch, check=False)
    if done.returncode:
        return {}
    rows = json.loads(done.stdout)["data"]["result"]
    return {
        row["metric"].get("public_key", row["metric"].get("reason", "")): float(row["value"][1])
        for row in rows
    }


def test_a_real_prometheus_scrapes_the_agent(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        connect(site, client)
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\n"
            "scrape_configs: [{job_name: gateways, static_configs: [{targets: ['127.0.0.1:9586']}]}]\n"
        )
        prometheus = site.gateway.popen(
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            "--web.listen-address=127.0.0.1:9090",
            "--log.level=error",
        )
        try:
            until(lambda: query(site, 'up{job="gateways"} == 1'), 30, "a scrape")
            received = until(lambda: query(site, "wireguard_received_bytes_total > 0"), 15)
            handshake = query(site, "wireguard_latest_handshake_seconds")
            assert received.keys() == {client.public_key} == handshake.keys()
            assert abs(handshake[client.public_key] - time.time()) < 120
            assert query(site, "wg_agent_core_connected") == {"": 1.0}
            assert query(site, "wg_agent_sessions_active") == {"": 1.0}
            assert query(site, 'wg_agent_peers{state="up"}') == {"": 1.0}
            site.end(client)
            until(lambda: query(site, "wg_agent_session_ends_total > 0") == {"operator": 1.0}, 15)
            until(lambda: query(site, "wg_agent_sessions_active") == {"": 0.0}, 15)
        finally:
            prometheus.terminate()
            prometheus.wait(10)
