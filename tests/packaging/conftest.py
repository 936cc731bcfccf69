from pathlib import Path

import pytest

from tests.support import package


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package."""
    return package.build()


@pytest.fixture(scope="session")
def tree(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files and control files, unpacked."""
    return package.unpack(deb, tmp_path_factory.mktemp("package") / "tree")
