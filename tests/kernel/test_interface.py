import time

import pytest

from agent.model import AddPeer, Prefix, PublicKey
from agent.wireguard.interface import (
    Backend,
    Ensured,
    bring_up,
    ensure_interface,
    open_device,
    remove_interface,
)
from agent.wireguard.kernel import kernel_has_wireguard
from tests.contract.inside import inside
from tests.contract.interface_behaviours import BEHAVIOURS, Behaviour, run
from tests.support.netns import Network, interface_name

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("check", BEHAVIOURS, ids=lambda check: check.__name__)
def test_a_kernel_interface(check: Behaviour) -> None:
    with Network() as net:
        space = net.namespace("gateway")
        inside(space, run(check, space, Backend.KERNEL))


def test_the_kernel_is_chosen_where_it_has_wireguard() -> None:
    with Network() as net:
        space = net.namespace("gateway")
        name = interface_name()
        assert inside(space, kernel_has_wireguard()) is True
        assert inside(space, ensure_interface(name)) == Ensured(Backend.KERNEL, created=True)
        assert inside(space, remove_interface(name)) is True


def test_removing_an_interface_does_not_wait_for_each_of_its_peers() -> None:
    """Deleting the link with 2,000 peers on it takes the kernel about 34 s."""

    async def main() -> float:
        name = interface_name()
        await ensure_interface(name)
        await bring_up(name)
        device = open_device(name, Backend.KERNEL)
        await device.apply(
            [
                AddPeer(
                    PublicKey(bytes([1, i >> 8, i & 255, *bytes(29)])),
                    None,
                    (Prefix(bytes([10, 1, i >> 8, i & 255]), 32),),
                )
                for i in range(2000)
            ]
        )
        await device.close()
        start = time.monotonic()
        await remove_interface(name)
        return time.monotonic() - start

    with Network() as net:
        assert inside(net.namespace("gateway"), main()) < 10
