"""The sandbox's core beside a test: what its operator does to it, and the devices that it knows."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from agent.sandbox.admin import AdminClient
from agent.sandbox.core import Core
from agent.sandbox.service import CoreService, make_config
from agent.sandbox.sessions import Session
from tests.support.client import Client

T = TypeVar("T")


class CoreThread:
    """The sandbox core on a loop of its own."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time, **members: object) -> None:
        socket = folder / "core.sock"
        settings: dict[str, Any] = {
            "sessions": {"lifetime": 3600},
            "heartbeat": 1,
            "applied_timeout": 60,
            **members,
        }
        self.service = CoreService(make_config(folder, listen=f"unix:{socket}", **settings), clock=clock)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="core", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float = 120.0) -> T:
        """Run a coroutine on the core's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def do(self, work: Callable[[Core], T]) -> T:
        """Run a function on the core's loop, which owns its database."""

        async def run() -> T:
            return work(self.service.core)

        return self.call(run())

    @property
    def admin(self) -> AdminClient:
        return self.service.admin

    def register(self, names: Sequence[str], **members: object) -> list[Client]:
        """Register devices at the location; ``members`` are of each."""
        keys = {format_key(public_key(key)): key for key in (clamp(os.urandom(32)) for _ in names)}
        wanted = [
            {"location": "hq", "name": name, "public_key": key, **members}
            for name, key in zip(names, keys, strict=True)
        ]
        self.call(self.admin.add_devices(wanted), timeout=600)
        devices = {d.public_key: d for d in self.do(lambda core: core.directory.devices("hq"))}
        return [Client(devices[key].name, private, devices[key]) for key, private in keys.items()]

    def grant(self, client: Client, lifetime: float = 0) -> tuple[Session, str]:
        """Grant a session; returns it and its PSK in base64, once all agents have it in the kernel."""

        async def grant() -> Session:
            core = self.service.core
            location = core.directory.location("hq")
            return await core.grant(client.device, location, "totp", lifetime=lifetime)

        session = self.call(grant())
        client.sessions.append(session.id)
        assert session.preshared_key is not None
        return session, format_key(session.preshared_key)

    def start(self) -> None:
        self.call(self.service.start())

    def kill(self) -> None:
        self.call(self.service.kill())

    def close(self) -> None:
        self.call(self.service.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
