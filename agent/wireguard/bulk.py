"""Many set messages in a row, in a thread: the loop goes on while the kernel takes them.

Each new peer costs the kernel a shared secret, and pyroute2 sends within the loop. Here Python prepares the
next peers meanwhile (``cold_sync_10k``).

Sources: linux/netlink.h, linux/genetlink.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from pyroute2.netlink.exceptions import NetlinkError

from agent.wireguard import netlink

_NETLINK_GENERIC: Final = 16
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10  # An acknowledgement does not bring the message back.
_REQUEST, _ACK, _ERROR = 0x1, 0x4, 2
_MESSAGE = struct.Struct("=IHHII")
_COMMAND = struct.Struct("=BBH")
_CODE = struct.Struct("=i")
_RECEIVE: Final = 1 << 14
_SEND_BUFFER: Final = 1 << 20
_SILENCE: Final = 30.0
"""Seconds after which an acknowledgement is given up. The kernel carries a message out before it has taken it
all: where it hangs in that, the thread does, and nobody can help it."""


class BulkSocket:
    """A blocking netlink socket of WireGuard's family, in the network namespace of whoever makes it.

    Its thread is its own: others may hang, in a resolver or a disk.
    """

    def __init__(self, family: int) -> None:
        self._family = family
        self._sequence = 0
        self._thread = ThreadPoolExecutor(1, "wireguard")
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.settimeout(_SILENCE)

    async def set_device(self, bodies: Iterable[bytes]) -> None:
        """Send SET_DEVICE messages one after another; return once all are acknowledged.

        ``bodies`` is walked in the thread. Raises NetlinkError at the first that the kernel refuses, OSError
        if the socket fails. Whoever cancels waits for the messages under way.
        """
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._send, bodies)
        try:
            await asyncio.shield(future)
        finally:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((future,))

    def close(self) -> None:
        """Close the socket; nothing may be under way."""
        self._thread.shutdown(wait=False)
        self._socket.close()

    def _send(self, bodies: Iterable[bytes]) -> None:
        for body in bodies:
            self._sequence += 1
            length = _MESSAGE.size + _COMMAND.size + len(body)
            head = _MESSAGE.pack(length, self._family, _REQUEST | _ACK, self._sequence, 0)
            command = _COMMAND.pack(netlink.SET_DEVICE, netlink.VERSION, 0)
            try:
                self._socket.send(b"".join((head, command, body)))
                while (code := self._outcome(self._socket.recv(_RECEIVE))) is None:
                    pass
            except TimeoutError:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
            if code:
                raise NetlinkError(code)

    def _outcome(self, data: bytes) -> int | None:
        """Return what a datagram says of the last message: 0 done, else the errno; None if nothing."""
        _, kind, _, sequence, _ = _MESSAGE.unpack_from(data)
        if kind != _ERROR or sequence != self._sequence:
            return None
        return -int(_CODE.unpack_from(data, _MESSAGE.size)[0])
