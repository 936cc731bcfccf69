from pathlib import Path

import pytest

from tests.support.scenarios import the_main_job
from tests.support.site import Site

pytestmark = [pytest.mark.netns, pytest.mark.userspace]


def test_peers_arrive_and_one_is_granted_renewed_revoked_and_expires(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        the_main_job(site, strangers=100)
