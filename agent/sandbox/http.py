"""What the core's APIs have in common: bodies, answers, errors, bearer tokens."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from agent.sandbox.errors import Refusal

MAX_BODY: Final = 16 * 1024 * 1024
_COMPRESS_FROM: Final = 1024
_log = logging.getLogger(__name__)
T = TypeVar("T")


def answer(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return JSON that is not cached."""
    return Response(
        msgspec.json.encode(content),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/json",
    )


def refusal_answer(refusal: Refusal) -> Response:
    """Return a refusal as ``{"error", "message"}``."""
    headers = {}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(refusal.retry_after)))
    if refusal.code == "unauthorized":
        headers["www-authenticate"] = "Bearer"
    return answer({"error": refusal.code, "message": refusal.message}, refusal.status, headers)


async def on_refusal(request: Request, error: Exception) -> Response:
    """Answer a Refusal."""
    if not isinstance(error, Refusal):
        raise error
    return refusal_answer(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer the framework's own errors (404, 405) in our form."""
    if not isinstance(error, HTTPException):
        raise error
    return answer(
        {"error": error.detail.lower().replace(" ", "_"), "message": f"{error.detail}."},
        error.status_code,
        error.headers,
    )


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody is left to answer."""
    return Response(status_code=400)


async def on_fault(request: Request, error: Exception) -> Response:
    """Answer a fault of the core's own; the framework logs it."""
    return answer({"error": "internal", "message": "The core failed; see its log."}, 500)


async def body_of(request: Request, kind: type[T]) -> T:
    """Return the JSON body as ``kind``; gzip is accepted. Raises Refusal (400, 413, 415)."""
    raw = await _read(request)
    _refuse_repeated_keys(raw)
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise Refusal(400, "malformed", f"The body can't be used: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refusal(400, "malformed", "The body is not JSON.") from None


def _refuse_repeated_keys(raw: bytes) -> None:
    """Refuse an object that has a key twice: parsers differ in which of the values they take."""

    def members(pairs: list[tuple[str, Any]]) -> None:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Refusal(400, "malformed", "An object in the body repeats a key.")

    # What is no JSON at all is the decoder's to say.
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(raw, object_pairs_hook=members)


async def _read(request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", "gzip"}:
        raise Refusal(415, "unsupported_encoding", "Send the body as it is or with gzip.")
    inflate = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
    body = bytearray()
    async for part in request.stream():
        if inflate is None:
            body += part
        else:
            try:
                body += inflate.decompress(part, MAX_BODY + 1 - len(body))
            except zlib.error:
                raise Refusal(400, "malformed", "The body is not gzip.") from None
        if len(body) > MAX_BODY or (inflate is not None and inflate.unconsumed_tail):
            raise Refusal(413, "too_large", f"A body has at most {MAX_BODY} bytes.")
    if inflate is not None and not inflate.eof:
        raise Refusal(400, "malformed", "The gzip body is cut.")
    return bytes(body)


def accepts_gzip(request: Request) -> bool:
    """Say whether the client takes gzip (RFC 9110, section 12.5.3)."""
    for entry in request.headers.get("accept-encoding", "").split(","):
        name, _, parameters = entry.partition(";")
        if name.strip().lower() in {"gzip", "*"}:
            return parameters.replace(" ", "").lower() not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return False


def compress(body: bytes) -> bytes | None:
    """Return the body in gzip, None where that is not worth it."""
    return gzip.compress(body, 5, mtime=0) if len(body) >= _COMPRESS_FROM else None


def etag_matches(header: str | None, etag: str) -> bool:
    """Compare ``If-None-Match`` weakly (RFC 9110, section 13.1.2)."""
    if header is None:
        return False
    tags = [tag.strip() for tag in header.split(",")]
    return "*" in tags or any(tag.removeprefix("W/") == etag for tag in tags)


def token_digest(token: str) -> bytes:
    """Return the form in which tokens are kept and compared, so that timing tells nothing."""
    return hashlib.sha256(token.encode()).digest()


def bearer(request: Request) -> bytes:
    """Return the digest of a request's bearer token. Raises Refusal (401)."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Refusal(401, "unauthorized", "Send the token as Authorization: Bearer.")
    return token_digest(token.strip())


EXCEPTION_HANDLERS: Final[dict[Any, Any]] = {
    Refusal: on_refusal,
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
    Exception: on_fault,
}
