"""The push endpoint: core calls the agent instead of being held open by it.

Requests are signed by the Standard Webhooks scheme (its specification, «Verifying signatures»).
The signature covers id, time and body; within the 5 minutes' tolerance a request can be played
again, and harmlessly so: every change is fenced by its revision, and one that is already held is a
200 without effect. Core's own retries depend on that, so a webhook-id seen before is no error.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Callable
from typing import Final

import structlog
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent import clock
from agent.core.documents import refused_json
from agent.core.messages import Push, decode_push
from agent.errors import AgentError, ConfigError, InvalidMessage
from agent.ports import Inbox, Outcome, Position, Verdict

SECRET_BYTES: Final = 24
"""The shortest secret that the Standard Webhooks specification allows."""
DISCARDED: Final = 8 * 1024 * 1024
"""Bytes over the limit that are still read, and dropped: a client that is cut off while it sends
sees a reset connection instead of the 413."""
COMPLAIN_EVERY: Final = 10.0
"""Seconds between two lines of the log about pushes that are not core's: anybody can send those."""
AT_ONCE: Final = 512
"""Changes handed over at once: between them others have their turn, deadlines first."""
_FORM: Final = "whsec_"
_HEADERS: Final = ("webhook-id", "webhook-timestamp", "webhook-signature")

log = structlog.get_logger()


def webhook_of(secret: str) -> Webhook:
    """Return the verifier for a ``whsec_…`` secret. Raises ConfigError, without quoting it."""
    problem = ConfigError(
        f"the push secret is not {_FORM} and at least {SECRET_BYTES} bytes in base64",
        f'take the one that core shows, or make one: echo "{_FORM}$(head -c 32 /dev/urandom | base64)"',
    )
    encoded = secret.removeprefix(_FORM)
    try:
        # The library decodes leniently, and a mistyped secret would only show as 401s.
        padding = "=" * (-len(encoded) % 4)
        raw = binascii.a2b_base64((encoded + padding).encode("ascii"), strict_mode=True)
    except ValueError:
        raw = b""
    if encoded == secret or len(raw) < SECRET_BYTES:
        raise problem
    return Webhook(raw)


def push_app(
    inbox: Inbox,
    secret: str,
    location: Callable[[], str | None],
    *,
    max_body: int = 1024 * 1024,
    body_timeout: float = 10.0,
) -> Starlette:
    """Return the ASGI application that serves POST /v1/changes.

    ``location`` gives the id of the location that is held, None before the first state;
    ``max_body`` in bytes, ``body_timeout`` in seconds. Raises ConfigError for an unusable secret.
    """
    endpoint = _Changes(inbox, webhook_of(secret), location, max_body, body_timeout)
    return Starlette(routes=[Route("/v1/changes", endpoint.serve, methods=["POST"])])


class _Changes:
    def __init__(
        self,
        inbox: Inbox,
        webhook: Webhook,
        location: Callable[[], str | None],
        max_body: int,
        body_timeout: float,
    ) -> None:
        self._inbox = inbox
        self._webhook = webhook
        self._location = location
        self._max_body = max_body
        self._body_timeout = body_timeout
        self._complained_at = -COMPLAIN_EVERY
        self._refused = 0

    async def serve(self, request: Request) -> Response:
        """Answer one push once its changes are in the kernel."""
        # An unsigned request costs nothing but its headers.
        if not all(request.headers.get(name) for name in _HEADERS):
            return _error(401, "the request is not signed")
        try:
            async with asyncio.timeout(self._body_timeout):
                body = await self._body(request)
        except TimeoutError:
            return _error(408, "the body came too slowly")
        except ClientDisconnect:
            return _error(400, "the body is cut")
        if body is None:
            return _error(413, f"the body has more than {self._max_body} bytes")
        received_at = clock.monotonic()
        if (problem := self._verify(body, request)) is not None:
            self._complain(problem, received_at)
            return _error(401, problem)
        self._inbox.heard()
        try:
            push = decode_push(body)
        except InvalidMessage as error:
            # It is core's, and an unreadable change must not be skipped.
            self._inbox.core_sent_rubbish(error)
            self._inbox.pull_wanted.set()
            return _error(400, error.message)
        return await self._apply(push, received_at)

    async def _body(self, request: Request) -> bytes | None:
        body = bytearray()
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self._max_body:
                body += chunk
            elif size > self._max_body + DISCARDED:
                break
        return bytes(body) if size <= self._max_body else None

    def _verify(self, body: bytes, request: Request) -> str | None:
        """Return what is wrong with the signature, None if it is core's and fresh."""
        try:
            self._webhook.verify(body, {name: request.headers[name] for name in _HEADERS}, json_parse=False)
        except WebhookVerificationError as error:
            return f"the signature is not accepted: {error}"
        except ValueError:  # from taking the headers and the body apart
            return "the signature is not accepted: it can't be read"
        return None

    def _complain(self, problem: str, now: float) -> None:
        self._refused += 1
        if now - self._complained_at >= COMPLAIN_EVERY:
            log.warning("a push was refused", error=problem, refused=self._refused)
            self._complained_at, self._refused = now, 0

    async def _apply(self, push: Push, received_at: float) -> Response:
        held = self._location()
        if held is None:
            return _no_state()
        if push.location != held:
            self._inbox.pull_wanted.set()
            return _conflict(self._inbox.position)
        outcome = Outcome(Verdict.NO_STATE, None)
        for start in range(0, len(push.changes), AT_ONCE):
            # The request may be cancelled; the change goes its way all the same.
            future = self._inbox.submit(push.changes[start : start + AT_ONCE], received_at)
            future.add_done_callback(_seen)
            try:
                outcome = await asyncio.shield(future)
            except AgentError as error:
                log.warning("a pushed change is not in force yet", error=str(error))
                return _error(503, error.message)
            if outcome.verdict in {Verdict.NO_STATE, Verdict.PULL}:
                break
        position = outcome.position
        if outcome.verdict is Verdict.NO_STATE or position is None:
            return _no_state()
        if outcome.verdict is Verdict.PULL:
            return _conflict(position)
        return JSONResponse({"revision": position.revision, "refused": refused_json(outcome.refused)})


def _seen(future: asyncio.Future[Outcome]) -> None:
    if not future.cancelled():
        future.exception()  # a request that was cancelled asks no more


def _conflict(position: Position | None) -> Response:
    return _no_state() if position is None else JSONResponse({"revision": position.revision}, 409)


def _error(status: int, message: str) -> Response:
    headers = {"Connection": "close"} if status in {408, 413} else None
    return JSONResponse({"error": message}, status, headers)


def _no_state() -> Response:
    return JSONResponse({"error": "there is no state of core's yet"}, 503, {"Retry-After": "1"})
