from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.firewall.scene import Scene
from tests.firewall.stand import Stand
from tests.support.netns import Network


def _interface(request: pytest.FixtureRequest) -> str:
    """A test says the interface's name by an indirect parameter."""
    return str(getattr(request, "param", "wg0"))


@pytest.fixture
def stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with Network() as net, closing(Stand(net, _interface(request))) as stand:
        yield stand


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    with Network() as net, closing(Scene(net, tmp_path, _interface(request))) as scene:
        yield scene
