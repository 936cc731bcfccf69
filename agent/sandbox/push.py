"""Pushes changes to an agent's signed endpoint, beside or instead of the stream."""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import httpx
import msgspec
from standardwebhooks import Webhook

from agent.encoding import clean_name
from agent.sandbox.config import Gateway, secret
from agent.sandbox.directory import Directory
from agent.sandbox.errors import Refusal
from agent.sandbox.gateways import Gateways
from agent.sandbox.store import Store

_BATCH: Final = 200
_FIRST_WAIT: Final = 0.25
_LONGEST_WAIT: Final = 30.0
_log = logging.getLogger(__name__)


class _Refused(msgspec.Struct):
    public_key: str
    reason: str


class _Answer(msgspec.Struct):
    revision: int
    refused: list[_Refused] = []


class Pusher:
    """Keeps one gateway up to date by push.

    It starts after the location's revision at the time: the agent pulls the state by itself, and
    also when a push is answered with 409.
    """

    def __init__(
        self,
        gateway: Gateway,
        store: Store,
        directory: Directory,
        gateways: Gateways,
        clock: Callable[[], float],
    ) -> None:
        """``gateway`` has a ``push_url`` and a secret. Raises ConfigError for an unreadable file."""
        self._store = store
        self._directory = directory
        self._gateways = gateways
        self._clock = clock
        self._gateway = gateway
        self._url = gateway.push_url or ""
        key = secret(gateway.push_secret, gateway.push_secret_file, "push_secret")
        self._webhook = Webhook(key or "")
        self._tls = (
            ssl.create_default_context(cafile=gateway.push_ca_file)
            if self._url.startswith("https:")
            else False
        )

    async def run(self) -> None:
        """Push until cancelled."""
        location_id = await self._location()
        store = self._store
        held = store.position(location_id)
        wait = 0.0
        async with httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=10) as client:
            with store.watch(location_id) as changed:
                while True:
                    changed.clear()
                    found = store.changes_after(location_id, *held, limit=_BATCH)
                    if found is None:
                        held = store.position(location_id)
                        continue
                    if not found:
                        await changed.wait()
                        continue
                    body = msgspec.json.encode(
                        {
                            "location": str(location_id),
                            "changes": [{"id": c.id, "type": c.event, "data": c.data} for c in found],
                        }
                    )
                    revision = await self._push(client, location_id, held[0], body)
                    if revision is None or revision < found[-1].revision:
                        # The agent has no state yet, is not there, or is about to pull.
                        wait = min(max(wait * 2, _FIRST_WAIT), _LONGEST_WAIT)
                        await asyncio.sleep(wait * (0.5 + secrets.randbelow(500) / 1000))
                    else:
                        wait = 0.0
                    if revision is not None:
                        newest = store.position(location_id)[1]
                        held = (held[0], max(held[1], min(revision, newest)))

    async def _location(self) -> int:
        while True:
            try:
                return self._directory.location(self._gateway.location).id
            except Refusal:
                await asyncio.sleep(1)

    async def _push(self, client: httpx.AsyncClient, location_id: int, epoch: str, body: bytes) -> int | None:
        """Push one batch; return the revision that the agent holds, None if it did not say."""
        message_id = "msg_" + secrets.token_hex(12)
        sent_at = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(sent_at.timestamp())),
            "webhook-signature": self._webhook.sign(message_id, sent_at, body.decode()),
        }
        try:
            response = await client.post(self._url, content=body, headers=headers)
            if response.status_code not in {200, 409}:
                _log.warning("push to %s: HTTP %d", self._gateway.name, response.status_code)
                return None
            answer = msgspec.json.decode(response.content, type=_Answer)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            _log.warning("push to %s failed: %s", self._gateway.name, type(error).__name__)
            return None
        if response.status_code == 200:
            now = self._clock()
            self._gateways.seen(self._gateway.name, location_id, now)
            self._gateways.applied(
                self._gateway.name,
                location_id,
                epoch,
                answer.revision,
                {peer.public_key: clean_name(peer.reason) for peer in answer.refused},
            )
        return answer.revision
