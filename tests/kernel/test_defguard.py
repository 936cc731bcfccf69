from pathlib import Path

import pytest

from tests.e2e.defguard_scenario import a_users_day
from tests.support.defguard_site import DefguardSite


@pytest.mark.timeout(900)
@pytest.mark.parametrize("generation", [1, 2])
def test_the_agent_takes_the_place_of_defguards_gateway(tmp_path: Path, generation: int) -> None:
    with DefguardSite(tmp_path, generation) as site:
        a_users_day(site)
