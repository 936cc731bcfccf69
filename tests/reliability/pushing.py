"""Core's half of push, done by the test: signed requests from inside the gateway's namespace."""

import base64
import http.client
import json
import os
import secrets
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from standardwebhooks import Webhook

from agent.sandbox.core import Core
from agent.sandbox.store import Change
from tests.contract.inside import _enter
from tests.support.netns import Namespace
from tests.support.site import Site

PATH = "/v1/changes"


def push_secret() -> str:
    return "whsec_" + base64.b64encode(os.urandom(32)).decode()


def signed(secret: str, body: bytes, *, age: float = 0.0, message: str = "") -> dict[str, str]:
    """The headers of a push of ``body`` that was signed ``age`` seconds ago."""
    message = message or f"msg_{secrets.token_hex(12)}"
    at = datetime.fromtimestamp(time.time() - age, UTC)
    return {
        "content-type": "application/json",
        "webhook-id": message,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(message, at, body.decode("latin-1")),
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """``seconds``: from before the connection to the end of the answer."""

    status: int
    head: bytes
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


class Courier:
    """Makes requests from inside a namespace, each on a connection of its own."""

    def __init__(self, space: Namespace, target: str, tls: ssl.SSLContext | None = None) -> None:
        """``target`` is ``HOST:PORT`` or the path of a socket."""
        self.target = target
        self._tls = tls
        self._thread = ThreadPoolExecutor(1, initializer=_enter, initargs=(space.path,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> Answer:
        """One request; raises OSError where there is no answer. A body without a length is chunked."""
        return self._thread.submit(self._ask, method, path, body, dict(headers or {}), tls).result()

    def _ask(
        self, method: str, path: str, body: Any, headers: dict[str, str], tls: ssl.SSLContext | None
    ) -> Answer:
        began = time.monotonic()
        connection = self._connection(tls or self._tls)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            head = str(answer.headers).encode()
            return Answer(answer.status, head, answer.read(), time.monotonic() - began)
        finally:
            connection.close()

    def _connection(self, tls: ssl.SSLContext | None) -> http.client.HTTPConnection:
        if self.target.startswith("/"):
            return _UnixConnection(self.target)
        host, _, port = self.target.rpartition(":")
        if tls is not None:
            return http.client.HTTPSConnection(host, int(port), timeout=15, context=tls)
        return http.client.HTTPConnection(host, int(port), timeout=15)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("agent", timeout=15)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(15)
        self.sock.connect(self._path)


class Pushing:
    """Brings core's changes to the agent by push, in place of its stream."""

    def __init__(self, site: Site, secret: str, courier: Courier) -> None:
        self._site = site
        self._secret = secret
        self._courier = courier

    def changes(self, since: int) -> list[Change]:
        """Core's changes after a revision."""

        def find(core: Core) -> list[Change]:
            location = core.directory.location("hq")
            return core.store.changes_after(location.id, location.epoch, since) or []

        return self._site.core.do(find)

    def body(self, changes: Sequence[Change]) -> bytes:
        location = self._site.core.do(lambda core: core.directory.location("hq").id)
        told = [{"id": change.id, "type": change.event, "data": change.data} for change in changes]
        return json.dumps({"location": str(location), "changes": told}).encode()

    def send(self, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """Push a body, signed now unless headers are given."""
        return self._courier.ask(
            "POST", PATH, body, signed(self._secret, body) if headers is None else headers
        )

    def all(self) -> Answer:
        """Push whatever the agent does not hold yet, the newest change at least; it has to be taken."""
        held, newest = self._site.status()["revision"], self._newest()
        answer = self.send(self.body(self.changes(min(held, newest - 1))))
        assert answer.status == 200, answer
        return answer

    def _newest(self) -> int:
        return self._site.core.do(lambda core: core.directory.location("hq").revision)
