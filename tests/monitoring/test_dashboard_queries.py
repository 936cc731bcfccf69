"""Every query of the dashboard, put to a real Prometheus that has scraped the real agent."""

import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.pictures.dashboard import picture
from tests.support import dashboard
from tests.support.busy_site import busy_site
from tests.support.dashboard import Span

pytestmark = [pytest.mark.netns, pytest.mark.userspace, pytest.mark.timeout(300)]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")
def test_every_query_of_the_dashboard_has_data(tmp_path: Path) -> None:
    board = dashboard.load()
    with busy_site(tmp_path, pace=0.3) as busy:
        start, end = busy.play()
        span = Span(start, end, 1.0, busy.prometheus.interval)
        answers = list(dashboard.ask(board, busy.prometheus, span))
        offered = dashboard.variables(board, busy.prometheus)
        interface = busy.site.interface
        ends = busy.prometheus.instant('{__name__=~"wg_agent_(certificate|token)_expiry.*"} - time()', end)

    assert offered == {"interface": [interface], "instance": ["127.0.0.1:9586"]}
    kept = {name for one in ends for label, name in one.labels.items() if label in {"certificate", "token"}}
    assert kept == {"push.tls_cert", "core.token"}
    assert len(answers) == sum(len(panel["targets"]) for panel in dashboard.panels(board))
    empty = [(answer.panel["title"], answer.expression) for answer in answers if not answer.known]
    assert empty == []
    shown = {
        series.labels[label]
        for answer in answers
        for label in ("reason", "kind", "part", "state", "after", "alertname", "friendly_name")
        for series in answer.series
        if label in series.labels
    }
    assert shown >= {"expired", "revoked", "never_connected", "operator"}
    assert shown >= {"own_public_key", "peer_added", "device", "guard", "journal", "up", "waiting", "refused"}
    assert shown >= {"first", "crash", "WgAgentDrift", "WgAgentCoreInvalid", "WgAgentCrashed"}
    assert shown >= {"anna-laptop", "fay-laptop", "branch-router"}
    the_picture_shows_it(picture(board, answers, span), board)


def the_picture_shows_it(text: str, board: dict[str, Any]) -> None:
    """It has every panel and what the run did, and asks for nothing from elsewhere."""
    drawn = ET.fromstring(text)
    said = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {panel["title"] for panel in board["panels"]} <= said
    assert {"connected", "up", "fails", "fires", "revoked", "own_public_key", "anna-laptop"} <= said
    assert "No data" not in said
    assert re.findall(r"https?://|url\(|href|@import|data:", text) == ["http://"]  # the namespace's name
