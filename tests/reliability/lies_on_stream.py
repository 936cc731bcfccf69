"""What a lying core says on its stream: one lie, one row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from tests.reliability.entries import ZERO
from tests.reliability.lies import DEEP
from tests.reliability.stage import EPOCH, LOCATION, Stage, compact, session

Effect = Literal["pull", "ignored", "heeded"]


@dataclass(frozen=True)
class Told:
    """Bytes on the stream. ``heeded``: so many revisions are taken in; ``pull``: the state is asked for."""

    name: str
    data: Callable[[Stage], bytes]
    effect: Effect
    brief: bool = False


def event(kind: str, data: Any, ahead: int = 1, epoch: str = EPOCH) -> Callable[[Stage], bytes]:
    """An event so many revisions ahead of the truth; ``data`` may depend on the stage."""

    def made(stage: Stage) -> bytes:
        body = json.dumps(data(stage) if callable(data) else data)
        return f"event: {kind}\nid: {epoch}:{stage.revision + ahead}\ndata: {body}\n\n".encode()

    return made


def of_honest(stage: Stage) -> dict[str, Any]:
    """What would end the honest session."""
    return {"public_key": stage.honest.public_key, "session_id": "s-honest"}


def stolen(**changed: Any) -> Callable[[Stage], dict[str, Any]]:
    """A grant to the intruder, good but for what is changed."""

    def data(stage: Stage) -> dict[str, Any]:
        grant = session("s-stolen", preshared_key=stage.stolen)
        return {"public_key": stage.intruder.public_key, "session": {**grant, **changed}}

    return data


TOLD: Final = [
    Told(
        "a revocation of revisions to come", event("session_revoked", of_honest, ahead=5), "pull", brief=True
    ),
    Told(
        "a revocation of an old revision",
        event("session_revoked", of_honest, ahead=-1),
        "ignored",
        brief=True,
    ),
    Told("a revocation of the held revision", event("session_revoked", of_honest, ahead=0), "ignored"),
    Told("a revocation of another epoch", event("session_revoked", of_honest, epoch="other"), "pull"),
    Told(
        "a revocation of another session",
        event("session_revoked", lambda s: {**of_honest(s), "session_id": "s-0"}),
        "heeded",
    ),
    Told("an unknown event", event("session_blessed", of_honest), "pull", brief=True),
    Told("an event of no type", event("", of_honest), "pull"),
    Told("an event of another form", lambda _s: b"Event: session_revoked\n\n", "pull"),
    Told(
        "an event without an id",
        lambda s: b"event: peer_removed\ndata: " + compact(of_honest(s)) + b"\n\n",
        "pull",
    ),
    Told("an id that is none", lambda _s: b"event: resync\nid: truth:-1\ndata: {}\n\n", "pull"),
    Told(
        "an id of a million digits",
        lambda _s: b"event: resync\nid: truth:" + b"9" * 999_000 + b"\ndata: {}\n\n",
        "pull",
    ),
    Told("data that is no JSON", lambda s: event("peer_removed", of_honest)(s).replace(b"{", b"["), "pull"),
    Told(
        "data that is invalid UTF-8",
        lambda s: event("peer_removed", of_honest)(s).replace(b'"}', b'\xff"}'),
        "pull",
        brief=True,
    ),
    Told("data with NaN", event("peer_removed", lambda s: {**of_honest(s), "x": float("nan")}), "pull"),
    Told(
        "data with a key twice",
        lambda s: event("peer_removed", of_honest)(s).replace(b"{", b'{"public_key":"",'),
        "pull",
    ),
    Told(
        "data nested deep",
        lambda s: event("peer_removed", of_honest)(s).replace(b"{", b'{"x":' + DEEP + b","),
        "pull",
    ),
    Told(
        "a grant without a key",
        event("session_granted", lambda s: {"session": stolen()(s)["session"]}),
        "pull",
        brief=True,
    ),
    Told(
        "a grant to nobody", event("session_granted", lambda s: {**stolen()(s), "public_key": ZERO}), "pull"
    ),
    Told("a grant to somebody unknown", event("session_granted", stolen()), "pull", brief=True),
    Told(
        "a removal of somebody unknown",
        event("peer_removed", lambda s: {"public_key": s.intruder.public_key}),
        "pull",
    ),
    Told(
        "MFA switched off by text",
        event("location_changed", {"location": {**LOCATION, "mfa_required": "no"}}),
        "pull",
    ),
    Told("MFA not mentioned", event("location_changed", {"location": {"id": "7"}}), "pull"),
    Told("a line without an end", lambda _s: b"data: " + b"x" * (2 << 20), "pull", brief=True),
    Told("an event without an end", lambda _s: b"data: xxxxxxxxxxxxxxxx\n" * 100_000, "pull"),
    Told("a comment without an end", lambda _s: b": " + b"x" * (2 << 20), "pull"),
    Told("comments without end", lambda _s: b":\n" * 500_000, "ignored", brief=True),
    Told("ten thousand unreadable events", lambda _s: b"data\n\n" * 10_000, "pull", brief=True),
    Told(
        "ten thousand old revocations",
        lambda s: event("session_revoked", of_honest, ahead=-1)(s) * 10_000,
        "ignored",
    ),
]
