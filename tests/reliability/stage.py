"""A running agent whose core lies, an honest session and a peer that needs none, and an intruder.

``tell`` serves the truth under the next revision. The intruder has a tunnel of its own and knocks all
the time, with the PSK of the session that lies give it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from agent.encoding import format_key, format_time
from tests.core import fakes
from tests.core.fakes import Handler, Request
from tests.reliability.inspect_agent import Pages
from tests.reliability.lying_core import LyingCore
from tests.support.client import Client
from tests.support.scenarios import ping
from tests.support.site import Site, until

EPOCH: Final = "truth"
HOUR: Final = 3600.0
HOLDS: Final = "nobody else gets in, nobody who is in loses a packet"
"""What each lie is tried on."""
LOCATION: Final = {"id": "7", "name": "hq", "mfa_required": True}


def moment(seconds: float = 0.0) -> str:
    """So many seconds from now, as core writes times."""
    return format_time(time.time() + seconds)


def new_key() -> str:
    return format_key(os.urandom(32))


def session(name: str, **changed: Any) -> dict[str, Any]:
    """A good session for an hour."""
    times = {"granted_at": moment(-5), "expires_at": moment(HOUR)}
    return {"id": name, "preshared_key": new_key(), **times, **changed}


def compact(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


class Stage:
    """Leave the block and all of it is gone."""

    def __init__(self, folder: Path, *, max_body: int) -> None:
        """``max_body`` is the agent's ``core.max_body`` in bytes."""
        self._max_body = max_body
        self.site = Site(folder)
        self.core = LyingCore(folder / "lying.sock")
        self.pages = Pages(self.site.gateway)
        self.revision = 0
        """Of the truth, as it was told last."""
        self.others: list[Any] = []
        """Further entries of the true list."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("WG_AGENT_CORE__MAX_BODY", str(self._max_body))
            self.site.core_url = stack.enter_context(self.core).url
            stack.enter_context(self.site)
            self.honest, self.router, self.ending, self.intruder = self.site.add_clients(4)
            self._good = session("s-honest")
            self.stolen = new_key()
            self.prepare()
            self.site.start_agent()
            for client in (self.honest, self.router, self.ending, self.intruder):
                self.site.attach(client)
            self.site.connect(self.honest, self._good["preshared_key"])
            self.site.connect(self.router)
            self.knock(self.stolen)
            self.kept = stack.enter_context(ping(self.honest))
            self.exempt = stack.enter_context(ping(self.router))
            self.knocks = stack.enter_context(ping(self.intruder, 0.05))
            self.kept.wait_reply(15)
            self.exempt.wait_reply(15)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def pid(self) -> int:
        assert self.site.process is not None
        return self.site.process.pid

    @property
    def lost(self) -> int:
        """Packets lost by those to whom nothing is to happen."""
        return self.kept.lost + self.exempt.lost

    @property
    def invalid(self) -> float:
        return self.pages.metric("wg_agent_core_invalid_total")

    def knock(self, psk: str = "") -> None:
        """The intruder tries with this PSK, or without one, from now on."""
        self.site.connect(self.intruder, psk)

    # What core says.

    def peer(self, client: Client, **changed: Any) -> dict[str, Any]:
        """A client's entry of the list."""
        entry = {"public_key": client.public_key, "name": client.name, "session": None}
        return {**entry, "allowed_ips": list(client.device.allowed_ips), **changed}

    def truth(self, **changed: Any) -> dict[str, Any]:
        """The state, true but for what is changed."""
        peers = [self.peer(self.honest, session=self._good), self.peer(self.router, mfa_exempt=True)]
        peers += self.others
        frame = {"epoch": EPOCH, "revision": self.revision, "server_time": moment(), "location": LOCATION}
        interface = {"addresses": ["10.8.0.1/16"], "listen_port": 51820}
        of_peers = {"peer_count": len(peers), "peers": peers}
        return {**frame, "interface": interface, "session_policy": {}, **of_peers, **changed}

    def tempting(self, **changed: Any) -> dict[str, Any]:
        """The next state, with the intruder in the honest session's place, but for what is changed."""
        peers = [self.peer(self.intruder, session=session("s-stolen", preshared_key=self.stolen))]
        believed = {"revision": self.revision + 1, "peer_count": len(peers), "peers": peers}
        return self.truth(**{**believed, **changed})

    def prepare(self) -> None:
        """Have the truth ready under the next revision, for whoever asks."""
        self.revision += 1
        self.core.on("state", self.telling())

    def telling(self, **changed: Any) -> Handler:
        """The truth as it is when core is asked, but for what is changed."""

        async def handler(request: Request, writer: asyncio.StreamWriter) -> None:
            await fakes.answer(200, compact(self.truth(**changed)))(request, writer)

        return handler

    def resync(self) -> None:
        """Have the agent pull."""
        self.core.send(fakes.event("resync", f"{EPOCH}:{self.revision}", {}))

    def tell(self, timeout: float = 20.0) -> float:
        """Tell the truth under the next revision; how long it took until that was held."""
        self.prepare()
        began = time.monotonic()
        self.resync()
        until(self.in_step, timeout, "the truth")
        return time.monotonic() - began

    def in_step(self) -> bool:
        """Whether the truth is held and core counts as reachable."""
        status = self.site.status()
        return self.position(status) == f"{EPOCH}:{self.revision}" and bool(status["core_connected"])

    def position(self, status: dict[str, Any] | None = None) -> str:
        """What the agent holds, as EPOCH:REVISION."""
        status = status or self.site.status()
        return f"{status['epoch']}:{status['revision']}"

    @contextmanager
    def lying(self, path: str, handler: Handler) -> Iterator[None]:
        """Have the agent ask for state or stream, answered by this handler; then the truth."""
        self.core.on(path, handler)
        try:
            if path == "state":
                self.resync()
            else:
                self.core.cut()
            yield
        finally:
            self.core.on("changes", self.core.stream)
            if path == "changes":
                self.core.cut()
            self.tell(40)

    def core_lost_by(self) -> str:
        """Why core counts as lost, as the status says it; empty while it does not."""
        status = self.site.status()
        return "" if status["core_connected"] else str(status["core_error"])

    # What must hold.

    @contextmanager
    def nobody_notices(self) -> Iterator[None]:
        """Nobody of the truth loses a packet meanwhile, nobody else gets in, and nothing breaks."""
        lost = self.lost
        yield
        self.kept.wait_reply(5)
        self.exempt.wait_reply(5)
        assert self.lost == lost
        assert self.knocks.received == 0
        true = {self.honest.public_key, self.router.public_key}
        assert {p["public_key"] for p in self.site.status()["peers"] if p["state"] == "up"} == true
        assert self.site.shown().keys() == true
        assert '"exception"' not in self.site.log.read_text()

    def refused(self) -> set[tuple[str, str]]:
        """The refused by public key and reason, as core was told last and as the status says it."""
        told = {
            (peer["public_key"], peer["reason"]) for peer in self.core.asked("applied")[-1].json()["refused"]
        }
        shown = {
            (peer["public_key"], peer["reason"])
            for peer in self.site.status()["peers"]
            if peer["state"] == "refused"
        }
        return told & shown


NUMBERS: Final = itertools.count(1)


def address() -> str:
    """A prefix that nobody has been given yet."""
    number = next(NUMBERS)
    return f"10.9.{number >> 8}.{number & 255}/32"


def entry(**changed: Any) -> dict[str, Any]:
    """A good entry of the list, of a device that nobody has, with a session of its own."""
    name = f"s-{next(NUMBERS)}"
    good = {"public_key": new_key(), "allowed_ips": [address()], "session": session(name)}
    return {**good, **changed}
