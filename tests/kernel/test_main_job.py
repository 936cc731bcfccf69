from pathlib import Path

import pytest

from tests.support.scenarios import the_main_job
from tests.support.site import Site


@pytest.mark.timeout(900)
def test_5000_peers_arrive_and_one_is_granted_renewed_revoked_and_expires(tmp_path: Path) -> None:
    # Nobody uses the strangers' sessions: they must outlast a test that takes minutes under emulation.
    patient = "[sessions]\nconnect_timeout = 3600"
    location: dict[str, object] = {"connect_timeout": 3600}
    with Site(tmp_path, stats_interval=10, location=location, agent=patient) as site:
        the_main_job(site, strangers=5000)
