from collections.abc import Iterator

import pytest

from tests.support.ledger import FULL
from tests.support.mass_end import KEPT_CHANGES, Crowd
from tests.support.site import Site


@pytest.fixture(scope="session")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """A site with many strangers; tests share it, since making it takes half a minute under emulation."""
    folder = tmp_path_factory.mktemp("crowd")
    crowd = Crowd(folder, 2000 if FULL else 500)
    with crowd.site:
        crowd.begin()
        yield crowd


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site of nobody yet; tests share it, each with clients of its own."""
    patient: dict[str, object] = {"idle_timeout": 7200, "connect_timeout": 7200, "max_lifetime": 86_400}
    with Site(
        tmp_path_factory.mktemp("site"),
        forked=True,
        agent="[sessions]\nagent_lease = 30\nidle_timeout = 7200\nconnect_timeout = 7200",
        core={"changelog": KEPT_CHANGES},
        location=patient,
    ) as site:
        site.start_agent(timeout=120)
        yield site
