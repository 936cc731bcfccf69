"""A core of ours with something in it, its exercise, and a walk through it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.conformance.clauses import CLAUSES
from agent.conformance.exercise import Exercise
from agent.conformance.verdicts import Ledger, Mark
from agent.conformance.walk import Walk
from agent.conformance.wire import Wire
from agent.core.endpoint import TlsFiles
from agent.sandbox.exercise import Exerciser
from agent.sandbox.service import CoreService, running_core
from tests.sandbox.parts import new_key

HEARTBEAT = 0.4
LOCATION: dict[str, Any] = {
    "addresses": ["10.8.0.1/24", "fd00:8::1/64"],
    "listen_port": 51820,
    "endpoint": "127.0.0.1:51820",
    "server_public_key": new_key(),
}


@dataclass
class Site:
    """A running core; called as an exercise it makes the changes, restarts included."""

    service: CoreService
    exerciser: Exerciser

    async def __call__(self, action: str, *keys: str) -> bool:
        match action:
            case "restart":
                await self.service.kill()
                await self.service.start()
            case "new-history":
                await self.service.kill()
                for file in Path(self.service.config.database).parent.glob("core.db*"):
                    file.unlink()
                await self.service.start()
                await self.service.admin.add_location("hq", **LOCATION)
            case _:
                return await self.exerciser(action, *keys)
        return True


@asynccontextmanager
async def site(**members: Any) -> AsyncIterator[Site]:
    """A core with a user's device, a site router, and a session."""
    with tempfile.TemporaryDirectory() as folder:
        async with running_core(Path(folder), **{"heartbeat": HEARTBEAT, **members}) as service:
            admin = service.admin
            await admin.add_location("hq", **LOCATION)
            token = service.config.admin.token or ""
            exerciser = Exerciser(service.url, token, "hq")
            laptop = new_key()
            await exerciser("upsert", laptop)
            core = service.core
            device = core.directory.device_by_key(laptop)
            assert device is not None
            core.sessions.grant(device, core.directory.location("hq"), "totp", core.clock())
            await admin.add_device("hq", "router", new_key(), mfa_exempt=True, allowed_ips=["192.168.7.0/24"])
            try:
                yield Site(service, exerciser)
            finally:
                await exerciser.close()


async def walk(url: str, token: str, exercise: Exercise | None = None, *, watch: float = 0.0) -> Ledger:
    ledger = Ledger([token])
    wire = Wire(url, token, TlsFiles())
    try:
        await Walk(wire, token, ledger).run(watch=watch, exercise=exercise)
    finally:
        await wire.close()
    return ledger


def marked(ledger: Ledger, mark: Mark) -> dict[str, str]:
    """The clauses with this mark, and what was seen."""
    verdicts = {clause: ledger.verdict(clause) for clause in CLAUSES}
    return {clause: found.seen for clause, found in verdicts.items() if found.mark is mark}
