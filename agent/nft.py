"""Talking to nftables: elements directly, commands by libnftables in this process or by the program ``nft``.

In the process a command takes a fraction of a millisecond; starting the program takes tens. All of it blocks,
and acts in the network namespace of the thread that makes the first call.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, Protocol, TypeVar

from agent.errors import GuardError
from agent.nftelements import (
    NETLINK_NETFILTER,
    ElementChange,
    ElementListing,
    ListingInterruptedError,
    listing_request,
    outcome,
    transaction,
)

T = TypeVar("T")

INSTALL: Final = "install nftables (apt install nftables, dnf install nftables)"
_LIBRARY: Final = "libnftables.so.1"
_PROGRAM: Final = "nft"
_PROGRAM_TIMEOUT: Final = 120.0
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10  # linux/netlink.h: an error does not bring the message back
_SEND_BUFFER: Final = 1 << 18
_RECEIVE: Final = 1 << 16
_SILENCE: Final = 120.0
"""Seconds after which the kernel counts as hanging."""
_TERSE: Final = 1 << 11  # NFT_CTX_OUTPUT_TERSE, nftables/libnftables.h
_SHOWN: Final = 300
_ATTEMPTS: Final = 10
_CLOSING: Final = 2.0
"""Seconds that a call under way may take when nftables is let go of."""


class NftError(GuardError):
    """nftables refused a transaction: nothing of it is in force."""


class Nft(Protocol):
    """The two ways to nftables; not for two threads at once."""

    port: int | None
    """The netlink port that changes of elements come from; None before the first."""

    def run(self, commands: str, *, dry_run: bool = False) -> str:
        """Carry out all commands in one transaction and return what they print, without elements.

        ``dry_run`` has the kernel judge and discard it all. Raises NftError with the first thing that
        nftables said.
        """

    def read(self, table: str, name: str) -> dict[bytes, float | None]:
        """Return the elements of a set in an inet table, each with the seconds that are left of it.

        None where nothing is said of that. Raises NftError.
        """

    def write(self, table: str, changes: Iterable[ElementChange]) -> None:
        """Change elements of an inet table in one transaction; after an NftError nothing is changed."""

    def close(self) -> None:
        """Let go of what is open; nothing happens a second time."""


class Elements:
    """Changes of elements, over a netlink socket of their own."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._sequence = 1
        self.port: int | None = None
        """The netlink port that the last changes came from."""

    def write(self, table: str, changes: Iterable[ElementChange]) -> None:
        """As ``Nft.write``."""
        data, last = transaction(table, changes, self._sequence)
        if last < self._sequence:
            return
        first, self._sequence = self._sequence, last + 1 if last < 1 << 31 else 1
        try:
            error = self._exchange(data, first, last)
        except OSError as failure:
            # What of an answer is still to come must not meet a later call.
            self.close()
            raise NftError(f"nftables: {failure.strerror or 'no answer'}") from None
        if error:
            raise NftError(f"nftables: {os.strerror(error)}")

    def read(self, table: str, name: str) -> dict[bytes, float | None]:
        """As ``Nft.read``."""
        for _ in range(_ATTEMPTS):
            self._sequence += 1
            listing = ElementListing(self._sequence)
            try:
                self._open().send(listing_request(table, name, self._sequence))
                while (error := listing.feed(self._open().recv(_RECEIVE))) is None:
                    pass
            except ListingInterruptedError:
                self.close()
                continue
            except OSError as failure:
                self.close()
                raise NftError(f"nftables: {failure.strerror or 'no answer'}") from None
            except ValueError as failure:
                self.close()
                raise NftError(f"nftables lists elements that can't be read: {failure}") from None
            if error:
                raise NftError(f"nftables: {os.strerror(error)}")
            return listing.elements
        raise NftError(f"the set {name} changed under each of {_ATTEMPTS} attempts to read it")

    def close(self) -> None:
        """Close the socket; the next call opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
            self._socket.bind((0, 0))
            self.port = self._socket.getsockname()[0]
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.settimeout(_SILENCE)
        return self._socket

    def _exchange(self, data: bytes, first: int, last: int) -> int:
        with_kernel = self._open()
        # The kernel takes a transaction in one piece or not at all, and twice its size is accounted for.
        room = max(_SEND_BUFFER, 2 * len(data))
        try:
            with_kernel.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, room)
        except PermissionError:
            # In a user namespace there is only what net.core.wmem_max grants everybody.
            with_kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        with_kernel.send(data)
        while (error := outcome(with_kernel.recv(_RECEIVE), first, last)) is None:
            pass
        return error


class Library(Elements):
    """libnftables in this process; raises GuardError where it can't be had."""

    def __init__(self) -> None:
        super().__init__()
        try:
            # libnftables ends the whole process if it can't open its socket: see first.
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER).close()
        except OSError as error:
            raise GuardError(
                f"no netlink socket of netfilter's can be opened: {error.strerror}",
                "the kernel needs CONFIG_NF_TABLES; a unit needs AF_NETLINK in RestrictAddressFamilies",
            ) from None
        try:
            lib = ctypes.CDLL(_LIBRARY)
        except OSError:
            raise GuardError(f"{_LIBRARY} is not there", INSTALL) from None
        lib.nft_ctx_new.argtypes, lib.nft_ctx_new.restype = [ctypes.c_uint32], ctypes.c_void_p
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
            getattr(lib, name).argtypes = [ctypes.c_void_p]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(lib, name).argtypes = [ctypes.c_void_p]
            getattr(lib, name).restype = ctypes.c_char_p
        lib.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        lib.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        lib.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._lib = lib
        self._context: int | None = None

    def run(self, commands: str, *, dry_run: bool = False) -> str:
        """As ``Nft.run``. The context's socket is opened by the first call, in its thread's namespace."""
        lib = self._lib
        if self._context is None:
            self._context = lib.nft_ctx_new(0)
            if not self._context:
                raise GuardError("libnftables can't be started", "is the machine out of memory?")
            lib.nft_ctx_buffer_output(self._context)
            lib.nft_ctx_buffer_error(self._context)
        lib.nft_ctx_output_set_flags(self._context, _TERSE)
        lib.nft_ctx_set_dry_run(self._context, dry_run)
        status = lib.nft_run_cmd_from_buffer(self._context, commands.encode("ascii"))
        printed: bytes = lib.nft_ctx_get_output_buffer(self._context) or b""
        said: bytes = lib.nft_ctx_get_error_buffer(self._context) or b""
        if status:
            raise NftError(_first(said.decode(errors="replace")))
        return printed.decode(errors="replace")

    def close(self) -> None:
        """Free the context and the socket; nothing happens a second time."""
        super().close()
        if self._context is not None:
            self._lib.nft_ctx_free(self._context)
            self._context = None


class Program(Elements):
    """The program ``nft``; raises GuardError where it is not installed."""

    def __init__(self) -> None:
        super().__init__()
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        program = shutil.which(_PROGRAM, path=path)
        if program is None:
            raise GuardError(f"the program {_PROGRAM} is not there", INSTALL)
        self._program = program

    def run(self, commands: str, *, dry_run: bool = False) -> str:
        """As ``Nft.run``, within two minutes."""
        flags = ["-t", *(["-c"] if dry_run else [])]
        try:
            done = subprocess.run(
                [self._program, *flags, "-f", "-"],
                input=commands.encode("ascii"),
                capture_output=True,
                check=False,
                timeout=_PROGRAM_TIMEOUT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NftError(f"{self._program} did not run: {error}") from None
        if done.returncode:
            raise NftError(_first(done.stderr.decode(errors="replace")))
        return done.stdout.decode(errors="replace")


def open_nft() -> Library | Program:
    """Return what there is, the library first; raises GuardError where neither can be had."""
    try:
        return Library()
    except GuardError as lacking:
        try:
            return Program()
        except GuardError:
            raise lacking from None


class Worker:
    """The thread in which one user of nftables does its work, one call after another.

    It starts in the namespace of the first caller, and sockets are opened in it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "nftables", initializer=_take_no_signals)

    async def do(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, or raise what it raises; begun, it is done to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self, nft: Nft | None) -> None:
        """End the thread, having closed ``nft`` in it; a call that is not answered is not waited for."""
        if nft is not None:
            wait({self._pool.submit(nft.close)}, _CLOSING)
        self._pool.shutdown(wait=False)


def _take_no_signals() -> None:
    """Leave signals to the other threads.

    One that interrupts libnftables while it waits for the kernel makes it report a failure, though the
    transaction may be in force.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def _first(said: str) -> str:
    for line in said.splitlines():
        if "rror: " in line:
            return f"nftables: {line.partition('rror: ')[2][:_SHOWN]}"
    return f"nftables: {said.strip()[:_SHOWN] or 'no reason given'}"
