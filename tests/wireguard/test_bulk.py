import asyncio
import errno
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from agent.wireguard.bulk import BulkSocket

NO_FAMILY = 0x3FFF


def answer(sequence: int, code: int = 0) -> bytes:
    """An acknowledgement, or a refusal."""
    return struct.pack("=IHHIIi16x", 36, 2, 0, sequence, 0, -code)


@pytest.fixture
def bulk() -> Iterator[BulkSocket]:
    made = BulkSocket(NO_FAMILY)
    yield made
    made.close()


@pytest.fixture
def kernel(bulk: BulkSocket) -> Iterator[socket.socket]:
    """Stands in for the kernel, for what a real one can't be made to do."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bulk._socket.close()
    bulk._socket = ours
    ours.settimeout(5)
    with theirs:
        yield theirs


def send(bulk: BulkSocket, *bodies: bytes) -> None:
    asyncio.run(bulk.set_device(bodies))


def test_the_kernels_refusal_is_its_errno_and_nothing_is_sent_after_it(bulk: BulkSocket) -> None:
    asked = []

    def bodies() -> Iterator[bytes]:
        for number in range(3):
            asked.append(number)
            yield b""

    with pytest.raises(NetlinkError) as caught:
        asyncio.run(bulk.set_device(bodies()))
    assert caught.value.code == errno.ENOENT
    assert asked == [0]


def test_messages_go_one_after_another_each_once_the_last_is_acknowledged(
    bulk: BulkSocket, kernel: socket.socket
) -> None:
    got: list[bytes] = []

    def work() -> None:
        for sequence in (1, 2):
            got.append(kernel.recv(1 << 16))
            kernel.settimeout(0.05)
            with pytest.raises(TimeoutError):
                kernel.recv(1 << 16)
            kernel.settimeout(5)
            # What was meant for an earlier request is passed over.
            kernel.send(answer(99, errno.EPERM))
            kernel.send(answer(sequence))

    thread = threading.Thread(target=work)
    thread.start()
    send(bulk, b"one!", b"two!")
    thread.join(10)
    heads = [struct.unpack("=IHHIIBBH", message[:20]) for message in got]
    assert heads == [(24, NO_FAMILY, 5, 1, 0, 1, 1, 0), (24, NO_FAMILY, 5, 2, 0, 1, 1, 0)]
    assert [message[20:] for message in got] == [b"one!", b"two!"]


def test_a_kernel_that_does_not_answer_is_given_up(bulk: BulkSocket, kernel: socket.socket) -> None:
    bulk._socket.settimeout(0.05)
    with pytest.raises(OSError, match="timed out") as caught:
        send(bulk, b"body")
    assert caught.value.errno == errno.ETIMEDOUT


def test_the_loop_goes_on_meanwhile_and_who_cancels_waits_until_all_is_through(
    bulk: BulkSocket, kernel: socket.socket
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(bulk.set_device((b"body",)))
        await loop.run_in_executor(None, kernel.recv, 1 << 16)
        for cancel in (task.cancel, task.cancel):
            cancel()
            await asyncio.sleep(0.05)
            assert not task.done()
        kernel.send(answer(1))
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    asyncio.run(main())
