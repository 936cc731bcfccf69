import asyncio

import pytest

from agent.model import AddPeer, Prefix, PublicKey, RemovePeer
from agent.wireguard import kernel
from agent.wireguard.interface import ensure_interface, remove_interface
from agent.wireguard.kernel import KernelDevice
from tests.contract.inside import inside
from tests.support.netns import Network, interface_name

pytestmark = pytest.mark.kernel


def key(number: int) -> PublicKey:
    return PublicKey(bytes([1, number >> 8, number & 255, *bytes(29)]))


def test_a_dump_under_which_peers_are_removed_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted = 0
    request = kernel._Socket.request

    async def count(self: kernel._Socket, command: int, *args: object) -> None:
        nonlocal interrupted
        await request(self, command, *args)  # type: ignore[arg-type]
        interrupted += self.marshal.interrupted

    monkeypatch.setattr(kernel._Socket, "request", count)

    async def main() -> None:
        name = interface_name()
        await ensure_interface(name, "kernel")
        reader, writer = KernelDevice(name), KernelDevice(name)
        peers = 3000
        await writer.apply(
            [AddPeer(key(i), None, (Prefix(bytes([10, 1, i >> 8, i & 255]), 32),)) for i in range(peers)]
        )
        try:
            for i in range(20):
                read = asyncio.create_task(reader.read())
                # Parts are read one in a turn of the loop: the dump is under way now.
                for _ in range(4 + i % 5):
                    await asyncio.sleep(0)
                await writer.apply([RemovePeer(key(2 * i))])
                seen = await read
                gone = {key(2 * j) for j in range(i + 1)}
                assert set(seen.peers) == {key(j) for j in range(peers)} - gone
        finally:
            await reader.close()
            await writer.close()
            await remove_interface(name)

    with Network() as net:
        inside(net.namespace("gateway"), main())
    assert interrupted > 3
