"""A userspace WireGuard device (wireguard-go, boringtun) behind its UAPI socket, and its start."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from agent.curve25519 import public_key
from agent.errors import DeviceError
from agent.model import DeviceConfig, ObservedDevice, Operation, PublicKey
from agent.wireguard import uapi
from agent.wireguard.device import difference

# Where implementations put their sockets, for all network namespaces alike (wireguard-tools,
# ipc-uapi-unix.h).
SOCKETS: Final = Path("/var/run/wireguard")

_ANSWER_TIMEOUT: Final = 30.0
_START_TIMEOUT: Final = 15.0
_ASK_AGAIN: Final = 3.0
_POLL: Final = 0.02
_CHUNK: Final = 1 << 18
_LARGE: Final = 1 << 20
# Programs that did not put themselves into the background: a handle that goes warns about them.
_IN_FRONT: Final[list[subprocess.Popen[bytes]]] = []


class UserspaceDevice:
    """A WireGuard device of a running userspace implementation; one request at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = asyncio.Lock()
        self._identity: tuple[bytes, PublicKey] | None = None

    @property
    def name(self) -> str:
        """The interface's name."""
        return self._name

    async def read(self) -> ObservedDevice:
        """Return the whole interface; raises DeviceError."""
        async with self._lock:
            answer = await self._request(uapi.GET)
        if len(answer) < _LARGE:
            config, peers = uapi.decode(answer)
        else:
            config, peers = await asyncio.to_thread(uapi.decode, answer)
        return ObservedDevice(
            self._name,
            self._public_key(config.private_key),
            config.listen_port or 0,
            config.fwmark or 0,
            peers,
        )

    async def apply(self, operations: Sequence[Operation]) -> None:
        """Carry out the operations in their order, many in a request.

        Raises DeviceError at the first request that is refused: those before it are in force, and
        so are its own operations before the faulty one.
        """
        async with self._lock:
            for request in uapi.encode_operations(operations, os.urandom):
                await self._request(request)

    async def configure(self, config: DeviceConfig) -> None:
        """Set what is not None and differs from what the device has; raises DeviceError."""
        async with self._lock:
            needed = difference(config, uapi.decode(await self._request(uapi.GET)).config)
            if needed != DeviceConfig():
                await self._request(uapi.encode_config(needed))

    async def close(self) -> None:
        """Nothing is held between calls."""

    def _public_key(self, private_key: bytes | None) -> PublicKey | None:
        """Return the public key, which the protocol does not tell; computed once for a key."""
        if private_key is None:
            return None
        if self._identity is None or self._identity[0] != private_key:
            self._identity = private_key, public_key(private_key)
        return self._identity[1]

    async def _request(self, request: bytes) -> bytes:
        """Return the answer, on a connection of its own: not all programs take a second request."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                answer = await _exchange(socket_path(self._name), request)
        except TimeoutError:
            raise DeviceError(
                f"{self._name}: the userspace WireGuard did not answer in {_ANSWER_TIMEOUT:.0f} s",
                "it hangs: restart it",
                errno=errno.ETIMEDOUT,
            ) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise DeviceError(
                f"{self._name}: no userspace WireGuard runs for this interface",
                "the agent starts one when it starts",
                errno=errno.ENODEV,
            ) from None
        except OSError as error:
            raise DeviceError(
                f"{self._name}: the userspace WireGuard can't be talked to: {error.strerror}",
                "run the agent as the user that the program runs as" if error.errno == errno.EACCES else "",
                errno=error.errno or errno.EIO,
            ) from None
        code = uapi.decode_errno(answer)
        if code:
            raise DeviceError(
                f"{self._name}: the userspace WireGuard said no: {os.strerror(code)}",
                "another program uses the port: choose another interface.listen_port"
                if code == errno.EADDRINUSE
                else "",
                errno=code,
            )
        return answer


async def _exchange(path: Path, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path, limit=_CHUNK)
    try:
        writer.write(request)
        answer = bytearray()
        while not answer.endswith(b"\n\n"):
            chunk = await reader.read(_CHUNK)
            if not chunk:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            answer += chunk
        return bytes(answer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def socket_path(name: str) -> Path:
    """Return where the implementation that serves ``name`` listens."""
    return SOCKETS / f"{name}.sock"


async def answers(name: str) -> bool:
    """Return whether an implementation listens for ``name``."""
    try:
        _, writer = await asyncio.open_unix_connection(socket_path(name))
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def start(name: str, program: str) -> bool:
    """Start ``program NAME``, which makes the interface, and wait until it answers.

    It outlives the agent: it gets a session of its own, and under systemd a unit of its own, since
    ending the agent's unit would end it too. An agent that may start no units asks for one by the file
    that ``$USERSPACE_REQUEST`` names: wg-agent-userspace@.path watches it. Returns whether it got what it
    needs to outlive the agent.
    Raises DeviceError: ENOENT if there is no such program, EEXIST if one answers to the name already.
    """
    path = shutil.which(program)
    if path is None:
        raise DeviceError(
            f"the kernel has no WireGuard, and there is no program {program!r}",
            "install wireguard-go, or a kernel with WireGuard, or set interface.userspace_program",
            errno=errno.ENOENT,
        )
    if await answers(name):
        raise DeviceError(
            f"a userspace WireGuard runs for an interface {name} that is not here",
            "it is in another network namespace, and both would use one socket: "
            "choose another interface.name",
            errno=errno.EEXIST,
        )
    in_unit = "INVOCATION_ID" in os.environ
    # systemd starts it in its own network namespace, which has to be ours.
    if in_unit and _shares_network_with_init():
        if request := os.environ.get("USERSPACE_REQUEST"):
            await _ask_for_unit(name, Path(request))
            return True
        if await _start_unit(name, path):
            return True
    with tempfile.TemporaryFile() as errors:
        process = _spawn(path, name, errors)
        if await _wait_until_answers(name, process):
            await _let_go(process)
            return not in_unit
        errors.seek(0)
        said = errors.read(4096).decode(errors="replace").strip().splitlines()
    raise DeviceError(
        f"{program} did not start for {name}" + (f": {said[-1].strip()}" if said else ""),
        _start_hint(name, program),
        errno=errno.EIO,
    )


def _start_hint(name: str, program: str) -> str:
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun: load the module tun, or give the container the device"
    return f"run `{program} --foreground {name}` by hand to see why"


async def _ask_for_unit(name: str, request: Path) -> None:
    """Have systemd start the program; raises DeviceError if it does not answer in time."""
    try:
        # More than once: systemd misses a file whose folder is made while it begins to watch for it.
        for _ in range(max(1, int(_START_TIMEOUT / _ASK_AGAIN))):
            await asyncio.to_thread(_write_request, request, name)
            if await _wait_until_answers(name, None, _ASK_AGAIN):
                return
    except OSError as error:
        raise DeviceError(
            f"a userspace WireGuard for {name} can't be asked for: {request}: {error.strerror}",
            "$USERSPACE_REQUEST is the agent's unit's: a file in its runtime folder",
            errno=error.errno or errno.EIO,
        ) from None
    unit = f"wg-agent-userspace@{name}"
    raise DeviceError(
        f"{unit}.service does not run, or does not answer",
        f"see systemctl status {unit}.path {unit}.service",
        errno=errno.EIO,
    )


def _write_request(request: Path, name: str) -> None:
    # Where the unit has the program put its socket.
    (request.parent / "wireguard").mkdir(mode=0o700, exist_ok=True)
    request.write_text(f"{name}\n")


async def _start_unit(name: str, path: str) -> bool:
    """Start the program as a unit of its own; whether that worked."""
    systemd_run = shutil.which("systemd-run")
    if systemd_run is None:
        return False
    process = await asyncio.create_subprocess_exec(
        *(systemd_run, "--quiet", "--collect", f"--unit=wg-agent-userspace-{name}"),
        *("--property=Type=forking", path, name),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return await process.wait() == 0 and await _wait_until_answers(name, None)


def _shares_network_with_init() -> bool:
    try:
        return Path("/proc/thread-self/ns/net").readlink() == Path("/proc/1/ns/net").readlink()
    except OSError:  # needs a privilege; a unit is nearly always in init's
        return True


def _spawn(path: str, name: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    # A plain Popen: asyncio's kills a program that is still running when its handle goes.
    return subprocess.Popen(
        [path, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        cwd="/",
        env={"PATH": os.environ.get("PATH", os.defpath)},  # the agent's holds its secrets
        start_new_session=True,
    )


async def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Reap a program that puts itself into the background; one that stays in front is kept."""
    for _ in range(int(1 / _POLL)):
        if process.poll() is not None:
            return
        await asyncio.sleep(_POLL)
    _IN_FRONT.append(process)


async def _wait_until_answers(
    name: str, process: subprocess.Popen[bytes] | None, limit: float = _START_TIMEOUT
) -> bool:
    """Wait until the implementation answers; False when it failed or ``limit`` seconds are up."""
    for _ in range(int(limit / _POLL)):
        if await answers(name):
            return True
        # With 0 it has put itself into the background.
        if process is not None and process.poll() not in {None, 0}:
            return False
        await asyncio.sleep(_POLL)
    if process is not None and process.poll() is None:
        process.kill()
        process.wait()
    return False
