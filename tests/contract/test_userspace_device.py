import pytest

from agent.wireguard.interface import Backend
from tests.contract.device_behaviours import BEHAVIOURS, Behaviour, run
from tests.contract.inside import inside
from tests.support.netns import Network

pytestmark = pytest.mark.userspace


@pytest.mark.parametrize("check", BEHAVIOURS, ids=lambda check: check.__name__)
def test_a_userspace_device(check: Behaviour) -> None:
    with Network() as net:
        space = net.namespace("gateway")
        inside(space, run(check, space, Backend.USERSPACE))
