"""The kernel's WireGuard device: our codec over pyroute2's generic-netlink transport."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Final

from pyroute2.netlink import (
    CTRL_CMD_GETFAMILY,
    GENL_ID_CTRL,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    ctrlmsg,
    genlmsg,
)
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket
from pyroute2.netlink.marshal import Marshal
from pyroute2.netlink.nlsocket import AsyncNetlinkSocket

from agent.errors import DeviceError
from agent.model import DeviceConfig, ObservedDevice, Operation
from agent.observed import RawPeers
from agent.wireguard import netlink
from agent.wireguard.bulk import BulkSocket
from agent.wireguard.device import difference
from agent.wireguard.dump import Dump

# An interrupted dump of a device that changes all the time is given up after so many.
_DUMP_ATTEMPTS: Final = 10
# Requested of the kernel, which cuts a dump into parts of at most 32 KiB.
_RECEIVE_BUFFER: Final = 1 << 20
# Operations from which on they are sent in a thread: for fewer the way there and back costs more.
_BULK: Final = 32

_NLMSG_HEADER = struct.Struct("=IHHII")
_GENL_HEADER = struct.Struct("=BBH")
_HEADERS: Final = _NLMSG_HEADER.size + _GENL_HEADER.size
_ERROR = struct.Struct("=i")


class _Request(genlmsg):
    """A request whose body is bytes already; shows nothing of them in pyroute2's log."""

    def __init__(self, command: int, body: bytes) -> None:
        super().__init__()
        self._command = command
        self._body = body

    def encode(self) -> None:
        header = self["header"]
        self.length = _HEADERS + len(self._body)
        self.data = b"".join(
            (
                _NLMSG_HEADER.pack(
                    self.length,
                    header["type"],
                    header["flags"],
                    header["sequence_number"],
                    header["pid"],
                ),
                _GENL_HEADER.pack(self._command, netlink.VERSION, 0),
                self._body,
            )
        )

    def __repr__(self) -> str:
        return "<WireGuard request>"


class _Reply(dict[str, Any]):
    """What pyroute2's receive loop wants to see of a message; the body stays bytes, and unseen."""

    __slots__ = ("body",)

    def __init__(self, kind: int, flags: int, error: Exception | None, body: bytes) -> None:
        super().__init__(header={"type": kind, "flags": flags, "error": error})
        self.body = body

    def __repr__(self) -> str:
        return "<WireGuard reply>"


class _Marshal(Marshal):
    """Cuts what was received into messages and leaves decoding to our codec.

    pyroute2's own decoding of a peer takes milliseconds, drops NLM_F_DUMP_INTR and overlooks the
    error that a dump can end with.
    """

    interrupted = False

    def parse_one_message(
        self, key: int, flags: int, sequence_number: int, data: bytes, offset: int, length: int
    ) -> Any:
        if key == GENL_ID_CTRL:
            return super().parse_one_message(key, flags, sequence_number, data, offset, length)
        if flags & netlink.NLM_F_DUMP_INTR:
            self.interrupted = True
        error = None
        if key in {NLMSG_ERROR, NLMSG_DONE} and length >= _NLMSG_HEADER.size + _ERROR.size:
            (code,) = _ERROR.unpack_from(data, offset + _NLMSG_HEADER.size)
            error = NetlinkError(abs(code)) if code else None
        return _Reply(key, flags, error, data[offset + _HEADERS : offset + length])


class _Socket(AsyncGenericNetlinkSocket):
    marshal_class = _Marshal
    bulk: BulkSocket | None = None

    async def open(self) -> None:
        """Bind and find the family; raises NetlinkError ENOENT where the kernel has no WireGuard.

        Asking for the family makes the kernel load its module. pyroute2's own lookup would write
        to the root logger when there is none.
        """
        await AsyncNetlinkSocket.bind(self)
        self.marshal.msg_map[GENL_ID_CTRL] = ctrlmsg
        message = ctrlmsg()
        message["cmd"] = CTRL_CMD_GETFAMILY
        message["version"] = 1
        message["attrs"].append(["CTRL_ATTR_FAMILY_NAME", netlink.FAMILY])
        replies = await self.nlm_request(message, GENL_ID_CTRL, NLM_F_REQUEST)
        async with aclosing(replies):
            async for reply in replies:
                self._prid = reply.get_attr("CTRL_ATTR_FAMILY_ID")
        self.bulk = BulkSocket(self.prid)

    def close(self, code: int = errno.ECONNRESET) -> None:
        """Close both sockets."""
        if self.bulk is not None:
            self.bulk.close()
            self.bulk = None
        super().close(code)

    def enqueue(self, data: bytes, addr: object) -> None:
        """Hand on what was received.

        An error of the socket itself carries no sequence number: everyone who waits must hear of
        it, or waits for ever.
        """
        if self._error_event.is_set():
            for tag in tuple(self.msg_queue.queues):
                self.msg_queue.put_nowait(tag, data)
        else:
            super().enqueue(data, addr)

    async def request(self, command: int, flags: int, body: bytes, take: Callable[[bytes], object]) -> None:
        """Send one request; give ``take`` the body of each reply; return when it is answered."""
        replies = await self.nlm_request(_Request(command, body), self.prid, NLM_F_REQUEST | flags)
        async with aclosing(replies):
            async for reply in replies:
                # The acknowledgement is a reply too, without a body of ours.
                if reply["header"]["type"] == self.prid:
                    take(reply.body)


class KernelDevice:
    """A WireGuard device of the kernel, in the network namespace of whoever makes the first call.

    One request at a time; needs CAP_NET_ADMIN.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = asyncio.Lock()
        self._socket: _Socket | None = None
        self._seen: RawPeers | None = None
        """The peers as they were read the last time."""

    @property
    def name(self) -> str:
        """The interface's name."""
        return self._name

    async def read(self) -> ObservedDevice:
        """Return the whole interface; raises DeviceError, EINTR if it kept changing meanwhile."""
        async with self._lock:
            return self._take(await self._dump())

    async def apply(self, operations: Sequence[Operation]) -> None:
        """Carry out the operations in their order, many in a message.

        Raises DeviceError at the first message that the kernel refuses: those before it are in
        force, and so are its own operations before the faulty one.
        """
        async with self._lock:
            bodies = netlink.encode_operations(self._name, operations, os.urandom)
            bulk = (await self._open()).bulk if len(operations) >= _BULK else None
            if bulk is not None:
                with self._faults():
                    await bulk.set_device(bodies)
                return
            for body in bodies:
                await self._set(body)

    async def configure(self, config: DeviceConfig) -> None:
        """Set what is not None and differs from what the device has; raises DeviceError."""
        async with self._lock:
            dump = await self._dump()
            # What is read next has most likely not moved since (``adopt_10k``).
            self._take(dump)
            needed = difference(config, dump.config())
            if needed != DeviceConfig():
                await self._set(netlink.encode_config(self._name, needed))

    async def close(self) -> None:
        """Close the socket; the interface stays. A later call opens another."""
        async with self._lock:
            self._drop()

    async def _dump(self) -> Dump:
        for _ in range(_DUMP_ATTEMPTS):
            # Taken in as it comes, so that a large device does not hold the loop for long.
            dump = Dump(self._seen)
            marshal = (await self._open()).marshal
            marshal.interrupted = False
            body = netlink.encode_name(self._name)
            await self._request(netlink.GET_DEVICE, NLM_F_DUMP, body, dump.feed)
            if not marshal.interrupted:
                return dump
        raise DeviceError(
            f"{self._name} changed under each of {_DUMP_ATTEMPTS} attempts to read it",
            "something else writes to the interface all the time: find it and stop it",
            errno=errno.EINTR,
        )

    def _take(self, dump: Dump) -> ObservedDevice:
        device = dump.device(self._name)
        if isinstance(device.peers, RawPeers):
            self._seen = device.peers
        return device

    async def _set(self, body: bytes) -> None:
        await self._request(netlink.SET_DEVICE, NLM_F_ACK, body, lambda _: None)

    async def _request(self, command: int, flags: int, body: bytes, take: Callable[[bytes], object]) -> None:
        socket = await self._open()
        with self._faults():
            await socket.request(command, flags, body, take)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except NetlinkError as error:
            raise _device_error(self._name, error.code) from None
        except OSError as error:
            self._drop()
            raise _device_error(self._name, error.errno or errno.EIO) from None
        except BaseException:
            # Left halfway, by cancellation or over a reply that can't be read: what is still to
            # come must not meet a later call.
            self._drop()
            raise

    async def _open(self) -> _Socket:
        if self._socket is None:
            self._socket = await _open_socket(self._name)
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


async def kernel_has_wireguard() -> bool:
    """Return whether the running kernel has WireGuard, after loading its module if it has one."""
    try:
        socket = await _open_socket("")
    except DeviceError:
        return False
    socket.close()
    return True


async def _open_socket(name: str) -> _Socket:
    socket = _Socket(rcvbuf=_RECEIVE_BUFFER)
    try:
        await socket.open()
    except NetlinkError as error:
        socket.close()
        code = errno.EOPNOTSUPP if error.code == errno.ENOENT else error.code
        raise _device_error(name, code) from None
    except OSError as error:
        socket.close()
        raise _device_error(name, error.errno or errno.EIO) from None
    except BaseException:
        socket.close()
        raise
    return socket


_HINTS: Final = {
    errno.ENODEV: "there is no such interface: the agent makes it when it starts",
    errno.EPERM: "the agent needs CAP_NET_ADMIN: run it as root or by its systemd unit",
    errno.EACCES: "the agent needs CAP_NET_ADMIN: run it as root or by its systemd unit",
    errno.EOPNOTSUPP: "the kernel has no WireGuard, or the interface is of another kind: "
    'load its module, or set interface.backend = "userspace"',
    errno.EADDRINUSE: "another program uses the port: choose another interface.listen_port",
    errno.ENOBUFS: "the kernel is short of memory for network buffers",
    errno.ENOMEM: "the kernel is short of memory",
    errno.ETIMEDOUT: "the kernel hangs over this interface: look at its log, restart the host if need be",
}


def _device_error(name: str, code: int) -> DeviceError:
    what = f"{name}: " if name else ""
    return DeviceError(
        f"{what}the kernel's WireGuard said no: {os.strerror(code)}",
        _HINTS.get(code, ""),
        errno=code,
    )
