"""What the service manager is told, over its datagram socket (sd_notify(3)); nothing without one."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

_log = structlog.get_logger(__name__)
_RESULT: Final = "service-result"


class Notifier:
    """Tells systemd how the agent is; every method is without effect outside of a notify unit."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ is an abstract socket; anything but that and a path (vsock) is not for a host.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "\0")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def ready(self, status: str = "") -> None:
        """Start-up is done, or a reload is; ``status`` as in ``status``."""
        self._send("READY=1", *_status(status))

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send(*_status(text))

    def reloading(self) -> None:
        """A reload has begun; ``ready`` ends it. The time is what Type=notify-reload asks for."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str = "") -> None:
        """The agent is going down."""
        self._send("STOPPING=1", *_status(status))

    def watchdog(self) -> None:
        """The agent works: to be sent more often than ``watchdog_interval``."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError as error:  # a full queue, or a manager that is being re-executed
            _log.warning("systemd was not told", what=lines[0], error=error.strerror)


def _status(text: str) -> tuple[str, ...]:
    return ("STATUS=" + " ".join(text.split()),) if text else ()


def take_service_result(runtime: Path) -> str:
    """Return what systemd said of the agent's last process, once; empty if it said nothing.

    The unit's ExecStopPost= leaves $SERVICE_RESULT (systemd.exec(5)) in the runtime folder.
    """
    path = runtime / _RESULT
    try:
        with path.open("rb") as file:
            result = file.read(64).decode("ascii", "replace").strip()
        path.unlink()
    except OSError:
        return ""
    return result


def watchdog_interval(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds after which systemd acts without a ``watchdog``, None if it does not.

    Source: sd_watchdog_enabled(3).
    """
    usec = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(usec) / 1e6
