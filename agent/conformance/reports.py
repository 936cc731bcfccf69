"""The reports that core is sent, good ones and bad ones, and what its answers to them say."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from agent import __version__
from agent.conformance.answers import Answer
from agent.conformance.verdicts import Ledger
from agent.core.documents import encode_applied, encode_ends, encode_stats
from agent.encoding import format_key
from agent.fence import Position
from agent.model import EndReason, PeerStats, PublicKey, Refusal, RefusedPeer, SessionEnd

_PADDING: Final = 9 * 1024
"""Bytes of white space that make a body larger than what is sent unpacked."""
_NO_REFUSAL_OF_THE_BODY: Final = frozenset({401, 403, 404, 405, 408, 429})
_NO_OFFSET: Final = "2026-11-24T03:00:00"
_AFTER: Final = dict(zip("AEIMQUYcgkosw048", "BFJNRVZdhlptx159", strict=True))
"""What a canonical key's last digit can be, and one that a lenient reader takes for the same."""


@dataclass(frozen=True, slots=True)
class Report:
    """A request body for a path, and the clause that its answer is judged by."""

    clause: str
    path: str
    body: bytes
    what: str
    gzip: bool = False

    @property
    def content(self) -> bytes:
        """The body as it is sent."""
        return gzip.compress(self.body, mtime=0) if self.gzip else self.body

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        return {"Content-Encoding": "gzip"} if self.gzip else {}


@dataclass(frozen=True, slots=True)
class Reporter:
    """Makes reports as a gateway that holds ``position``; ``stranger`` is a peer that core does not know.

    ``known`` are listed peers with their sessions' ids; ``now`` is Unix time.
    """

    position: Position
    stranger: PublicKey
    known: tuple[tuple[PublicKey, str | None], ...]
    now: float

    def applied(self, refused: tuple[RefusedPeer, ...] = ()) -> bytes:
        """A body for POST applied."""
        return encode_applied(*self.position, self.now, refused)

    def stats(self, peers: tuple[tuple[PublicKey, str | None], ...]) -> bytes:
        """A body for POST stats: peers that have never shaken hands."""
        rows = [PeerStats(key, session_id, None, 0.0, 0, 0) for key, session_id in peers]
        return encode_stats(*self.position, self.now, rows, version=__version__, started_at=self.now)

    def ends(self, session_id: str, key: PublicKey) -> bytes:
        """A body for POST session-ends."""
        return encode_ends([SessionEnd(session_id, key, EndReason.OPERATOR, self.now, 0.0, 0, 0)])

    def good(self) -> Iterator[Report]:
        """Reports that core has to take; the last ``applied`` refuses nobody."""
        name = f"conformance-{format_key(self.stranger)[:8]}"
        peers = self.known or ((self.stranger, None),)
        applied, stats = self.applied(), self.stats(peers)
        ends = self.ends(name, self.stranger)
        no_key = (RefusedPeer("not a key", Refusal.INVALID_PUBLIC_KEY),)
        yield Report("applied.accepted", "applied", applied, f"revision {self.position.revision}")
        yield Report("applied.refused", "applied", self.applied(no_key), "a refused peer without a key")
        yield Report("applied.repeated", "applied", applied, "the same revision again")
        yield Report("stats.accepted", "stats", stats, f"{len(peers)} peers")
        yield Report(
            "stats.unknown-peer", "stats", self.stats(((self.stranger, None),)), "a peer that is not listed"
        )
        yield Report("stats.gzip", "stats", _padded(stats), "gzip of more than 8 KiB", gzip=True)
        yield Report("ends.accepted", "session-ends", ends, f"the end of {name}")
        yield Report("ends.idempotent", "session-ends", ends, f"the end of {name} again")
        yield Report("ends.gzip", "session-ends", _padded(ends), "gzip of more than 8 KiB", gzip=True)
        for path, body in (("stats", stats), ("session-ends", ends), ("applied", applied)):
            yield Report(
                "reports.unknown-fields-ignored",
                path,
                _changed(body, _add_unknown),
                f"{path} with more members",
            )

    def bad(self) -> Iterator[Report]:
        """Reports that core has to refuse."""
        stats = self.stats(((self.stranger, None),))
        ends = self.ends(f"conformance-{format_key(self.stranger)[8:16]}", self.stranger)
        bodies = {"applied": self.applied(), "stats": stats, "session-ends": ends}
        wrong_types = {"applied": "refused", "stats": "peers", "session-ends": "ends"}
        for path, body in bodies.items():
            for what, bad in (
                ("text that is not JSON", b"revision 42"),
                ("a list", b"[]"),
                ("an object without members", b"{}"),
                ("JSON that is cut", body[:-8]),
                ("a string for a list", _changed(body, _set(wrong_types[path], "none"))),
            ):
                yield Report("json.malformed-request", path, bad, f"{path} with {what}")
            yield Report("json.repeated-key-refused", path, _repeated(body), f"{path} with a key twice")
        as_text = _changed(bodies["applied"], _set("revision", str(self.position.revision)))
        yield Report("json.malformed-request", "applied", as_text, "a revision that is a string")
        for path, body, member in (
            ("applied", bodies["applied"], _set("applied_at", _NO_OFFSET)),
            ("stats", stats, _set("sent_at", _NO_OFFSET)),
            ("session-ends", ends, _set_in("ends", "ended_at", _NO_OFFSET)),
        ):
            yield Report("times.offset-required", path, _changed(body, member), f"{path} at {_NO_OFFSET}")
        loose = _loose(format_key(self.stranger))
        for path, body, part in (("stats", stats, "peers"), ("session-ends", ends, "ends")):
            bad = _changed(body, _set_in(part, "public_key", loose))
            yield Report("keys.canonical-required", path, bad, f"{path} of a key that is not canonical")


def cut_gzip(report: Report) -> bytes:
    """The report's body in gzip, without its end."""
    return replace(report, gzip=True).content[:-12]


def judge_good(report: Report, answer: Answer, ledger: Ledger) -> None:
    """Judge the answer to a good report."""
    ledger.judged(report.clause, answer.status == 202, f"{report.what}: {answer}")


def judge_bad(clause: str, what: str, answer: Answer, ledger: Ledger) -> None:
    """Judge the answer to a malformed request."""
    good = 400 <= answer.status < 500 and answer.status not in _NO_REFUSAL_OF_THE_BODY
    ledger.judged(clause, good, f"{what}: {answer}")


def _padded(body: bytes) -> bytes:
    return body[:-1] + b" " * _PADDING + body[-1:]


def _changed(body: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(body)
    change(document)
    return json.dumps(document).encode()


def _add_unknown(document: dict[str, Any]) -> None:
    document["conformance"] = {"of": ["a later version"], "is": None}
    for value in list(document.values()):
        for entry in value if isinstance(value, list) else ():
            entry["conformance"] = 1.5


def _set(member: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document[member] = value

    return change


def _set_in(part: str, member: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document[part][0][member] = value

    return change


def _repeated(body: bytes) -> bytes:
    """The same object with its first member twice."""
    member, value = next(iter(json.loads(body).items()))
    return b"{" + json.dumps(member).encode() + b":" + json.dumps(value).encode() + b"," + body[1:]


def _loose(key: str) -> str:
    """The same 32 bytes for a lenient reader, written otherwise."""
    return key[:-2] + _AFTER[key[-2]] + "="
