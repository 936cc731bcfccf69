"""Every query of the dashboard, put to a real Prometheus that has scraped the real agent."""

import shutil
from pathlib import Path

import pytest

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

    assert offered == {"interface": [interface], "instance": ["127.0.0.1:9586"]}
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
