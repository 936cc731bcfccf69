import asyncio
import errno
import logging
import struct
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from agent.errors import DeviceError
from agent.model import AddPeer, PresharedKey, PublicKey
from agent.wireguard import kernel, netlink
from agent.wireguard.kernel import KernelDevice, _Marshal, _Request
from tests.wireguard.attributes import attribute

FAMILY, DONE, ERROR = 32, 3, 2
MULTI, INTERRUPTED = 2, 0x10


def message(kind: int, flags: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 300, 0) + payload


def parse(*messages: bytes) -> tuple[_Marshal, list[Any]]:
    marshal = _Marshal()
    return marshal, list(marshal.parse(b"".join(messages), 300))


def test_an_interrupted_dump_is_noticed_on_any_of_its_messages() -> None:
    part = struct.pack("=BBH", 0, 1, 0) + attribute(6, b"\1\0")
    end = struct.pack("=i", 0)
    assert not parse(message(FAMILY, MULTI, part), message(DONE, MULTI, end))[0].interrupted
    flagged = MULTI | INTERRUPTED
    assert parse(message(FAMILY, flagged, part), message(DONE, MULTI, end))[0].interrupted
    assert parse(message(FAMILY, MULTI, part), message(DONE, flagged, end))[0].interrupted


def test_an_error_that_a_dump_ends_with_is_noticed() -> None:
    end = message(DONE, MULTI, struct.pack("=i", -errno.EMSGSIZE))
    (reply,) = parse(end)[1]
    assert isinstance(reply["header"]["error"], NetlinkError)
    assert reply["header"]["error"].code == errno.EMSGSIZE


def test_a_refusal_is_an_error_and_an_acknowledgement_is_none() -> None:
    echo = bytes(16)
    refused = message(ERROR, 0, struct.pack("=i", -errno.ENODEV) + echo)
    (reply,) = parse(refused)[1]
    assert reply["header"]["error"].code == errno.ENODEV
    (reply,) = parse(message(ERROR, 0, struct.pack("=i", 0) + echo))[1]
    assert reply["header"]["error"] is None


def test_bodies_are_handed_on_as_they_came_and_show_in_no_log() -> None:
    body = attribute(3, b"secret" * 6)
    (reply,) = parse(message(FAMILY, MULTI, struct.pack("=BBH", 0, 1, 0) + body))[1]
    assert reply.body == body
    assert "secret" not in repr(reply) + str(reply)
    request = _Request(1, body)
    assert "secret" not in repr(request) + str(request)


class Kernel:
    """Stands in for the socket: what a real kernel can't be made to answer."""

    def __init__(self, outcomes: list[bool | Exception]) -> None:
        self.marshal = _Marshal()
        self.outcomes = outcomes
        self.requests = 0
        self.closed = 0

    async def request(self, command: int, flags: int, body: bytes, take: Callable[[bytes], object]) -> None:
        self.requests += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        self.marshal.interrupted = outcome
        take(attribute(6, struct.pack("=H", self.requests)))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], KernelDevice]:
    def make(fake: Kernel) -> KernelDevice:
        async def open_socket(name: str) -> Kernel:
            return fake

        monkeypatch.setattr(kernel, "_open_socket", open_socket)
        return KernelDevice("wg0")

    return make


def test_an_interrupted_dump_is_read_again(device: Callable[[Kernel], KernelDevice]) -> None:
    fake = Kernel([True, True, False])
    seen = asyncio.run(device(fake).read())
    assert seen.listen_port == 3
    assert fake.closed == 0


def test_a_dump_that_is_always_interrupted_is_given_up(
    device: Callable[[Kernel], KernelDevice],
) -> None:
    fake = Kernel([True] * 1000)
    with pytest.raises(DeviceError, match="changed under each") as caught:
        asyncio.run(device(fake).read())
    assert caught.value.errno == errno.EINTR
    assert fake.requests == 10


@pytest.mark.parametrize(
    ("error", "code", "hint", "closed"),
    [
        (NetlinkError(errno.EPERM), errno.EPERM, "CAP_NET_ADMIN", 0),
        (NetlinkError(errno.ENODEV), errno.ENODEV, "no such interface", 0),
        (OSError(errno.ENOBUFS, "no buffers"), errno.ENOBUFS, "memory", 1),
        (OSError(errno.ETIMEDOUT, "timed out"), errno.ETIMEDOUT, "look at its log", 1),
        (OSError("?"), errno.EIO, "", 1),
    ],
)
def test_an_error_says_what_to_do_and_one_of_the_socket_ends_it(
    device: Callable[[Kernel], KernelDevice], error: Exception, code: int, hint: str, closed: int
) -> None:
    fake = Kernel([error])
    operations = [AddPeer(PublicKey(b"k" * 32), PresharedKey(b"p" * 32), ())]
    with pytest.raises(DeviceError) as caught:
        asyncio.run(device(fake).apply(operations))
    assert caught.value.errno == code
    assert hint in caught.value.hint
    assert "wg0" in caught.value.message
    assert fake.closed == closed


def test_an_error_of_the_socket_reaches_everyone_who_waits() -> None:
    async def main() -> None:
        socket = kernel._Socket()
        try:
            await socket.setup_endpoint()
            socket.msg_queue.ensure_tag(300)
            socket.protocol.error_received(OSError(errno.ENOBUFS, "no buffers"))
            data = await asyncio.wait_for(socket.local.msg_queue.get(300), 1)
            (reply,) = socket.marshal.parse(data, 300)
            assert reply["header"]["error"].code == errno.ENOBUFS
        finally:
            socket.close()

    asyncio.run(main())


def test_looking_for_wireguard_writes_to_no_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netlink, "FAMILY", "no-such-thing")
    with caplog.at_level(logging.INFO):
        assert asyncio.run(kernel.kernel_has_wireguard()) is False
    assert caplog.records == []
