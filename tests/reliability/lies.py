"""What a lying core answers to a request: one lie, one row."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import pytest

from tests.core.fakes import Handler, answer
from tests.reliability.lying_core import STREAM_HEAD, endless, raw
from tests.reliability.stage import LOCATION, Stage, compact
from tests.support.ledger import FULL

OK: Final = b"HTTP/1.1 200 OK\r\n"
NO_BODY: Final = b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
DEEP: Final = b"[" * 200_000 + b"]" * 200_000


@dataclass(frozen=True)
class Answer:
    """An answer that is refused whole; ``says`` is in the error that the status shows.

    ``invalid``: it counts as invalid, and not only as core being away. ``brief``: part of the short run.
    """

    name: str
    handler: Callable[[Stage], Handler]
    says: str
    invalid: bool = True
    path: Literal["state", "changes"] = "state"
    brief: bool = False


def state(**changed: Any) -> Callable[[Stage], Handler]:
    """A tempting state, but for what is changed."""
    return lambda stage: answer(200, compact(stage.tempting(**changed)))


def without(*members: str) -> Callable[[Stage], Handler]:
    def handler(stage: Stage) -> Handler:
        document = stage.tempting()
        for member in members:
            del document[member]
        return answer(200, compact(document))

    return handler


def text(change: Callable[[bytes], bytes]) -> Callable[[Stage], Handler]:
    """A tempting state whose bytes are changed."""
    return lambda stage: answer(200, change(compact(stage.tempting())))


def packed(change: Callable[[bytes], bytes]) -> Callable[[Stage], Handler]:
    """A tempting state whose compressed bytes are changed."""
    return lambda stage: answer(
        200, change(gzip.compress(compact(stage.tempting()))), Content_Encoding="gzip"
    )


def fixed(handler: Handler) -> Callable[[Stage], Handler]:
    return lambda _stage: handler


def status(code: int, **headers: str) -> Callable[[Stage], Handler]:
    return lambda stage: answer(code, compact(stage.tempting()), **headers)


def _dense(item: bytes, size: int = 3 << 20) -> Callable[[Stage], Handler]:
    """A list of as many of these as fit, with the right count: a few bytes that take many in memory."""
    count = size // (len(item) + 1)

    def handler(stage: Stage) -> Handler:
        document = compact(stage.tempting(peers=[], peer_count=count))
        return answer(200, document.replace(b'"peers":[]', b'"peers":[' + b",".join([item] * count) + b"]"))

    return handler


def _many(count: int) -> Callable[[Stage], Handler]:
    return lambda stage: answer(
        200, compact(stage.tempting(peers=[{"name": "x" * 40}] * count, peer_count=count))
    )


def _bomb() -> bytes:
    return gzip.compress(b" " * (80 << 20), 9)


ANSWERS: Final = [
    Answer("an empty list with a count", state(peers=[]), "peer_count", brief=True),
    Answer("a list without a count", without("peer_count"), "peer_count", brief=True),
    Answer("an empty list without a count", state(peers=[], peer_count=None), "peer_count"),
    Answer("a list that is cut", state(peer_count=2), "peer_count"),
    Answer("a count that is true", state(peer_count=True), "peer_count"),
    Answer("a count that is text", state(peer_count="1"), "peer_count"),
    Answer("a count with a fraction", state(peer_count=1.0), "peer_count"),
    Answer("no list", without("peers"), "peers"),
    Answer("a list that is an object", state(peers={}, peer_count=0), "peers"),
    Answer("no epoch", without("epoch"), "epoch"),
    Answer("an epoch of another form", state(epoch="a b"), "epoch"),
    Answer("an endless epoch", state(epoch="e" * 65), "epoch"),
    Answer("no revision", without("revision"), "revision"),
    Answer("a revision that is text", state(revision="7"), "revision"),
    Answer("a revision with a fraction", state(revision=7.0), "revision"),
    Answer("a negative revision", state(revision=-1), "revision"),
    Answer("a revision past 63 bits", state(revision=1 << 63), "revision"),
    Answer("a revision that is NaN", state(revision=float("nan")), "not JSON", brief=True),
    Answer("an infinite time-out", state(session_policy={"idle_timeout": float("inf")}), "not JSON"),
    Answer(
        "a time-out past all floats",
        text(lambda b: b.replace(b'"session_policy":{}', b'"session_policy":{"idle_timeout":1e999}')),
        "session_policy",
    ),
    Answer(
        "a revision that goes back",
        lambda s: state(revision=s.revision - 1)(s),
        "went back",
        False,
        brief=True,
    ),
    Answer("no server_time", without("server_time"), "server_time"),
    Answer(
        "a server_time without an offset", state(server_time="2026-11-24T03:00:00"), "server_time", brief=True
    ),
    Answer("a server_time in 9999", state(server_time="9999-12-31T23:59:59-12:00"), "server_time"),
    Answer("a server_time in the year 0", state(server_time="0000-01-01T00:00:00Z"), "server_time"),
    Answer("a server_time that is a number", state(server_time=0), "server_time"),
    Answer("no location", without("location"), "location"),
    Answer("a location without mfa_required", state(location={"id": "7"}), "mfa_required"),
    Answer("mfa_required as text", state(location={**LOCATION, "mfa_required": "false"}), "mfa_required"),
    Answer("mfa_required as a number", state(location={**LOCATION, "mfa_required": 0}), "mfa_required"),
    Answer("a location that is a list", state(location=[]), "location"),
    Answer("a thousand addresses", state(interface={"addresses": ["10.1.2.3"] * 1000}), "addresses"),
    Answer("an address that is none", state(interface={"addresses": ["10.1.2.3.4"]}), "addresses"),
    Answer("a port past 16 bits", state(interface={"listen_port": 65536}), "listen_port"),
    Answer("a policy that is a list", state(session_policy=[]), "session_policy"),
    Answer("liveness of another kind", state(session_policy={"liveness": "none"}), "liveness"),
    Answer(
        "mfa_required twice",
        text(lambda b: b.replace(b'"mfa_required":true', b'"mfa_required":true,"mfa_required":false')),
        "repeats a key",
    ),
    Answer("peers twice", text(lambda b: b[:-1] + b',"peers":[]}'), "repeats a key"),
    Answer("no JSON", text(lambda b: b"<html>" + b), "not JSON"),
    Answer("no object", fixed(answer(200, b"[]")), "not an object"),
    Answer("nothing", fixed(answer(200)), "not JSON"),
    Answer("half of it", text(lambda b: b[:-20]), "not JSON"),
    Answer("more after the end", text(lambda b: b + b"{}"), "not JSON"),
    Answer("invalid UTF-8", text(lambda b: b.replace(b'"hq"', b'"\xff\xfe"')), "not JSON", brief=True),
    Answer("UTF-16", text(lambda b: b.decode().encode("utf-16")), "not JSON"),
    Answer(
        "JSON nested 200,000 deep", text(lambda b: b[:-1] + b',"x":' + DEEP + b"}"), "not JSON", brief=True
    ),
    Answer(
        "a number of a million digits",
        text(lambda b: b[:-1] + b',"x":' + b"9" * 1_000_000 + b"}"),
        "not JSON",
    ),
    Answer("millions of zeros for peers", _dense(b"0"), "too many values", brief=True),
    Answer("millions of empty objects for peers", _dense(b"{}"), "too many values"),
    Answer("20,000 peers without a key", _many(20_000), "without a public key"),
    Answer(
        "a connection closed within the body",
        lambda s: answer(200, compact(s.tempting()), Content_Length="999999"),
        "truncated",
    ),
    Answer("a gzip bomb", fixed(answer(200, _bomb(), Content_Encoding="gzip")), "larger than", brief=True),
    Answer("gzip that ends early", packed(lambda b: b[:-9]), "truncated"),
    Answer("gzip that is none", packed(lambda b: b[1:]), "gzip"),
    Answer("another compression", status(200, Content_Encoding="br"), "Content-Encoding"),
    Answer("a 204", status(204), "204"),
    Answer("a 206", status(206), "206"),
    Answer("a 304 that was not asked for", fixed(raw(b"HTTP/1.1 304 Not Modified" + NO_BODY)), "304", False),
    Answer("a redirect to itself", status(307, Location="/gateway/v1/state"), "redirects", False),
    Answer(
        "a redirect to elsewhere", status(301, Location="http://127.0.0.1:9586/metrics"), "redirects", False
    ),
    Answer("a redirect to nowhere", status(302, Location="http://" + "a" * 60_000), "core", False),
    Answer("a 400", status(400), "400", False),
    Answer("a 401", status(401), "refuses the token", False, brief=True),
    Answer("a 403", status(403), "refuses the token", False),
    Answer("a 404", status(404), "core.url is wrong", False),
    Answer("a 429", status(429), "429", False),
    Answer("a 500", status(500), "500", False, brief=True),
    Answer("a 503", status(503), "503", False),
    Answer("a status of 999", status(999), "999", False),
    Answer("a connection closed without a word", fixed(raw(b"")), "core", False),
    Answer("no HTTP", fixed(raw(b"SSH-2.0-OpenSSH\r\n\r\n")), "HTTP", False),
    Answer("a header without an end", fixed(endless(OK + b"X: ", b"x" * 1000)), "HTTP", False, brief=True),
    Answer("headers without an end", fixed(endless(OK, b"X: y\r\n" * 100)), "HTTP", False),
    Answer("a negative length", fixed(raw(OK + b"Content-Length: -1\r\n\r\n{}")), "HTTP", False),
    Answer(
        "a length of 5,000 digits",
        fixed(raw(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n")),
        "HTTP",
        False,
    ),
    Answer(
        "a stream that is compressed",
        lambda _s: answer(200, gzip.compress(b":\n\n"), Content_Encoding="gzip"),
        "compressed",
        path="changes",
    ),
    Answer("a stream that is refused", status(401), "refuses the token", False, "changes"),
    Answer(
        "a stream that redirects",
        status(302, Location="http://127.0.0.1:9586/"),
        "redirects",
        False,
        "changes",
    ),
    Answer("a stream that fails", status(500), "500", False, "changes"),
    Answer(
        "a stream that ends at once", fixed(raw(STREAM_HEAD)), "closed the change stream", False, "changes"
    ),
]


def rows(table: list[Any]) -> list[Any]:
    """The rows of this run, as parameters."""
    return [pytest.param(row, id=row.name) for row in table if FULL or row.brief]
