"""A configuration in a folder, the command line as a process, and real servers beside it in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agent import clock
from agent.audit import Audit
from agent.control import bind_control, control_app
from agent.encoding import format_key
from agent.model import PublicKey
from agent.server import serve
from agent.state import State
from agent.trail import Kind, Subject, Trail
from tests.core.fakes import TOKEN, Core, core
from tests.support.builders import columns

T = TypeVar("T")
ALICE, BOB, NOBODY = (PublicKey(bytes([n]) * 32) for n in (1, 2, 3))
WALL = 1_800_000_000.0
URL = "http://127.0.0.1:1/gateway/v1/"


def write_config(folder: Path, url: str = URL, *, more: str = "", **interface: Any) -> Path:
    """A configuration with its folders and its token in ``folder``."""
    token = folder / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    lines = [f"{key} = {json.dumps(value)}" for key, value in interface.items()]
    path = folder / "gateway.toml"
    text = f'[core]\nurl = "{url}"\ntoken_file = "token"\n[paths]\nstate = "state"\nruntime = "run"\n'
    path.write_text("\n".join([text, "[interface]", *lines, more, ""]))
    return path


def wg_agent(
    *argv: str | Path,
    through: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """The command line to its end, through a program that changes what it may or sees."""
    return subprocess.run(
        [*through, sys.executable, "-m", "agent", *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=dict(os.environ) | (env or {}),
        stdin=subprocess.DEVNULL,
    )


@contextmanager
def beside(make: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """Keep an asynchronous context open in a thread with a loop of its own."""
    made: list[T] = []
    failed: list[BaseException] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def main() -> None:
        try:
            async with make() as value:
                made.append(value)
                ready.set()
                await over.wait()
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            ready.set()

    def work() -> None:
        with contextlib.suppress(BaseException), contextlib.closing(loop):
            loop.run_until_complete(main())

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(10)
    try:
        if failed:
            raise failed[0]
        yield made[0]
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(over.set)
        thread.join(10)


@contextmanager
def a_core(context: ssl.SSLContext | None = None, socket: Path | None = None) -> Iterator[Core]:
    with beside(lambda: core(context, "" if socket is None else str(socket))) as told:
        yield told


@dataclass
class Agent:
    """What answers the operator's socket in place of a daemon."""

    peers: Sequence[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, Any] = field(default_factory=dict)
    with_session: set[PublicKey] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    explained: dict[str, Any] = field(default_factory=dict)
    trail: Trail = field(default_factory=Trail)
    process: str = "p1"
    names: dict[PublicKey, str] = field(default_factory=dict)
    audit: Audit = field(default_factory=lambda: Audit(State(), clock.read))

    async def status(self) -> dict[str, Any]:
        self.asked.append("status")
        return self.document()

    def document(self) -> dict[str, Any]:
        return {
            "interface": "wg0",
            "core_connected": True,
            "core_error": "",
            "core_since": None,
            "synced_at": None,
            "version": "1.2.3",
            "started_at": None,
            "observed_at": None,
            "link_up": True,
            "guard": "in_force",
            "guard_error": "",
            "expiry_late": False,
            "overstaying": 0,
            "journal_ok": True,
            "device_error": "",
            "reap_backlog": 0,
            "epoch": "b7e1",
            "revision": 42,
            "mfa_required": True,
            "location": "hq",
            **self.about,
            "peers": list(self.peers),
        }

    async def plan(self) -> dict[str, Any]:
        return {"interface": "wg0", "operations": [], "drift": [], **self.planned}

    def explain(self, what: str) -> dict[str, Any]:
        self.asked.append(f"explain {what}")
        return {"interface": "wg0", "asked": what, "peers": [], "more": 0} | self.explained

    def happens(self, kind: Kind, *subjects: Subject, revision: int | None = 42) -> None:
        named = [
            one._replace(name=self.names.get(PublicKey(one.peer))) if isinstance(one.peer, bytes) else one
            for one in subjects
        ]
        self.trail.add(WALL, kind, revision, columns(*named))

    async def events(
        self, after: int | None, limit: int, wait: float, process: str | None = None, who: str | None = None
    ) -> dict[str, Any]:
        self.asked.append(f"events {after} {limit}")
        self.audit.trail, self.audit._process = self.trail, self.process
        answer = await self.audit.events(after, limit, min(wait, 0.1), process, who)
        return {"interface": "wg0", **answer}

    async def end(self, keys: Sequence[PublicKey] | None) -> dict[str, Any]:
        ended = self.with_session if keys is None else self.with_session.intersection(keys)
        self.with_session = self.with_session - ended
        return {"ended": sorted(format_key(key) for key in ended)}


@contextmanager
def an_agent(config: Path, agent: Agent) -> Iterator[Agent]:
    """The agent's own control app on the socket that the configuration names."""

    @asynccontextmanager
    async def serving() -> AsyncIterator[Agent]:
        sock = bind_control(config.parent / "run" / "wg0.sock")
        task = asyncio.create_task(serve(control_app(agent), sock))
        yield agent
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with beside(serving) as running:
        yield running


def peer(key: PublicKey, **changed: Any) -> dict[str, Any]:
    """A peer of the status document."""
    return {
        "public_key": format_key(key),
        "name": "alice-laptop",
        "state": "waiting",
        "allowed_ips": ["10.8.0.5/32"],
        "session_id": None,
        "session_in_use": None,
        "expires_at": None,
        "granted_at": None,
        "session_life": None,
        "time_left": None,
        "latest_handshake": None,
        "endpoint": None,
        "rx_bytes": 0,
        "tx_bytes": 0,
        "rx_rate": None,
        "tx_rate": None,
        "mfa_exempt": False,
    } | changed
