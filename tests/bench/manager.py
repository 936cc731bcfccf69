"""The agent's word to its manager, taken as systemd does."""

import os
import socket
import threading
import time
from pathlib import Path


class Manager:
    """Listens where ``NOTIFY_SOCKET`` of this process and its children points, until it is closed."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        os.environ["NOTIFY_SOCKET"] = str(path)
        self._ready: list[float] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="manager", daemon=True)
        self._thread.start()

    def wait_ready(self, since: float, timeout: float) -> float | None:
        """When READY=1 came, after ``since``; None if it did not within so many seconds. Monotonic."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ready) and self._ready[-1] > since, timeout)
            return next((at for at in self._ready if at > since), None)

    def close(self) -> None:
        """Listen no longer."""
        os.environ.pop("NOTIFY_SOCKET", None)
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join(5)
        self._socket.close()

    def _listen(self) -> None:
        while message := self._socket.recv(65536):
            if b"READY=1" in message.split(b"\n"):
                with self._changed:
                    self._ready.append(time.monotonic())
                    self._changed.notify_all()
