"""Looks at a running agent from outside: its own pages, how long they take, its memory."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.fault_proxy import inside
from tests.support.netns import Namespace


class Pages:
    """The agent's own HTTP, asked from inside the gateway's namespace."""

    def __init__(self, space: Namespace, port: int = 9586) -> None:
        self._space = space
        self._port = port

    def get(self, path: str, timeout: float = 30.0) -> tuple[int, str]:
        """Status and body of a page, on a connection of its own."""
        address = ("127.0.0.1", self._port)
        connection = http.client.HTTPConnection(*address, timeout=timeout)
        connection.sock = inside(self._space, lambda: socket.create_connection(address, timeout))
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The value of one series."""
        lines = self.get("/metrics")[1].splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).rpartition(" ")[2])


class Watch:
    """Asks for /healthz all the time: how long the agent's loop takes to answer, and with what."""

    def __init__(self, space: Namespace, *, every: float = 0.05) -> None:
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0
        self._pages = Pages(space)
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="healthz", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(40)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            began = time.monotonic()
            try:
                status, _ = self._pages.get("/healthz")
            except OSError:
                status = 0
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.statuses[status] += 1


def memory(pid: int) -> tuple[float, float]:
    """A process's resident memory in MiB: now, and at most since ``forget_peak``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {
        line.split(":")[0]: float(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))
    }
    return kib["VmRSS"] / 1024, kib["VmHWM"] / 1024


def forget_peak(pid: int) -> None:
    """Let the peak begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
