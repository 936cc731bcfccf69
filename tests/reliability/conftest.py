from collections.abc import Iterator

import pytest

from tests.support.ledger import FULL
from tests.support.mass_end import Crowd


@pytest.fixture(scope="session")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """A site with many strangers; tests share it, since making it takes half a minute under emulation."""
    folder = tmp_path_factory.mktemp("crowd")
    crowd = Crowd(folder, 2000 if FULL else 500)
    with crowd.site:
        crowd.begin()
        yield crowd
