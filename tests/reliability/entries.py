"""Bad entries of a list that is good otherwise: each is refused alone, by name and reason."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.core.fakes import answer
from tests.reliability.stage import EPOCH, Stage, address, compact, entry, moment, new_key, session
from tests.support.site import until

ZERO: Final = base64.b64encode(bytes(32)).decode()
LOOSE: Final = ZERO[:42] + "B="
"""Decodes like the all-zero key, and is not its canonical form."""


@dataclass(frozen=True)
class Entry:
    """``made`` gives the entries, as JSON; ``reason`` is why each of them is refused."""

    name: str
    made: Callable[[Stage], list[Any]]
    reason: str


class Verbatim:
    """JSON that no document can be written as."""

    def __init__(self, text: bytes, public_key: str) -> None:
        self.text, self.public_key = text, public_key


def of_session(name: str, reason: str, **changed: Any) -> Entry:
    """An entry whose session is good but for what is changed; None takes a member out."""
    gone = [member for member, value in changed.items() if value is ...]

    def made(_stage: Stage) -> list[Any]:
        document = entry()
        document["session"].update(changed)
        for member in gone:
            del document["session"][member]
        return [document]

    return Entry(name, made, reason)


def of_peer(name: str, reason: str, **changed: Any) -> Entry:
    """An entry that is good but for what is changed."""
    return Entry(name, lambda _stage: [{**entry(), **changed}], reason)


def intruder(name: str, reason: str, **changed: Any) -> Entry:
    """The intruder's entry, whose session is good but for what is changed."""
    return Entry(name, lambda s: [s.peer(s.intruder, session={**session("s-in"), **changed})], reason)


def repeated(_stage: Stage) -> list[Any]:
    document = entry(mfa_exempt=False)
    text = compact(document).replace(b'"mfa_exempt":false', b'"mfa_exempt":false,"mfa_exempt":true')
    return [Verbatim(text, document["public_key"])]


def sharing(**members: Any) -> Callable[[Stage], list[Any]]:
    """Two entries that have the same of these members, made anew for each pair."""

    def made(_stage: Stage) -> list[Any]:
        same = {name: value() for name, value in members.items()}
        return [entry(**same), entry(**same)]

    return made


def containing(_stage: Stage) -> list[Any]:
    return [entry(allowed_ips=["10.10.0.0/24"]), entry(allowed_ips=["10.10.0.7/32"])]


def own_key(stage: Stage) -> list[Any]:
    shown = stage.site.gateway.run("wg", "show", stage.site.interface, "public-key").stdout.strip()
    return [entry(public_key=shown)]


PSK, SESSION, TIME = "invalid_preshared_key", "invalid_session", "invalid_time"
KEY, PEER, IPS = "invalid_public_key", "invalid_peer", "invalid_allowed_ips"
DUPLICATE = "duplicate_public_key"
KEEPALIVE, EXEMPT = "invalid_persistent_keepalive", "invalid_mfa_exempt"

ENTRIES: Final = [
    intruder("the all-zero PSK", PSK, preshared_key=ZERO),
    of_session("no PSK", PSK, preshared_key=...),
    of_session("null for a PSK", PSK, preshared_key=None),
    of_session("an empty PSK", PSK, preshared_key=""),
    of_session("a PSK that is too short", PSK, preshared_key=ZERO[1:]),
    of_session("a PSK with a space", PSK, preshared_key=" " + new_key()[1:]),
    of_session("a PSK that is not canonical", PSK, preshared_key=LOOSE),
    of_session("a PSK in another alphabet", PSK, preshared_key="-_" + new_key()[2:]),
    of_session("a PSK that is a list", PSK, preshared_key=[0] * 32),
    of_session("a session without an id", SESSION, id=...),
    of_session("a session id that is a number", SESSION, id=7),
    of_session("an empty session id", SESSION, id=""),
    of_session("a session id that is too long", SESSION, id="x" * 129),
    of_session("a session id with an escape", SESSION, id="s\x1b[2J"),
    of_session("half of a surrogate pair in a session id", SESSION, id="s\ud800"),
    of_peer("a session that is text", SESSION, session="s-1"),
    of_peer("a session that is a list", SESSION, session=[]),
    of_peer("a session that is true", SESSION, session=True),
    of_session("no granted_at", TIME, granted_at=...),
    of_session("no expires_at", TIME, expires_at=...),
    of_session("times without an offset", TIME, expires_at="2126-11-24T03:00:00"),
    of_session("an end in 9999", TIME, expires_at="9999-12-31T23:59:59Z"),
    of_session("an end past 9999", TIME, expires_at="9999-12-31T23:59:59-12:00"),
    of_session("an end in 1970", TIME, expires_at="1970-01-01T00:00:00Z"),
    of_session("a grant in the year 0", TIME, granted_at="0000-01-01T00:00:00Z"),
    of_session("a date that does not exist", TIME, expires_at="2126-02-30T00:00:00Z"),
    of_session("a time that is a number", TIME, expires_at=9_999_999_999),
    of_session("a time in a list", TIME, expires_at=[moment(60)]),
    of_session("an end before the grant", TIME, granted_at=moment(60), expires_at=moment(30)),
    of_peer("the all-zero static PSK", PSK, mfa_exempt=True, preshared_key=ZERO),
    of_peer("an empty static PSK", PSK, mfa_exempt=True, preshared_key=""),
    of_peer("a static PSK that is false", PSK, mfa_exempt=True, preshared_key=False),
    of_peer("mfa_exempt as text", EXEMPT, mfa_exempt="true"),
    of_peer("mfa_exempt as a number", EXEMPT, mfa_exempt=1),
    of_peer("mfa_exempt as a list", EXEMPT, mfa_exempt=[True]),
    of_peer("no allowed IPs", IPS, allowed_ips=None),
    of_peer("allowed IPs as text", IPS, allowed_ips="10.11.0.1/32"),
    of_peer("allowed IPs as an object", IPS, allowed_ips={"10.11.0.1/32": True}),
    of_peer("an allowed IP that is a number", IPS, allowed_ips=[167_772_161]),
    of_peer("an allowed IP in a list", IPS, allowed_ips=[["10.11.0.1/32"]]),
    of_peer("host bits", IPS, allowed_ips=["10.11.0.1/24"]),
    of_peer("a prefix of 33 bits", IPS, allowed_ips=["10.11.0.1/33"]),
    of_peer("a negative prefix", IPS, allowed_ips=["10.11.0.0/-8"]),
    of_peer("a prefix in other digits", IPS, allowed_ips=["10.11.0.0/\u0661\u0666"]),
    of_peer("an address with a zone", IPS, allowed_ips=["fe80::1%wg0/128"]),
    of_peer("an IPv4-mapped address", IPS, allowed_ips=["::ffff:10.11.0.1/128"]),
    of_peer("a short address", IPS, allowed_ips=["10.11/16"]),
    of_peer("one bad prefix among good ones", IPS, allowed_ips=["10.11.0.2/32", "all"]),
    of_peer("keepalive as text", KEEPALIVE, persistent_keepalive="25"),
    of_peer("keepalive past 16 bits", KEEPALIVE, persistent_keepalive=65_536),
    of_peer("negative keepalive", KEEPALIVE, persistent_keepalive=-1),
    of_peer("keepalive with a fraction", KEEPALIVE, persistent_keepalive=1.5),
    of_peer("keepalive that is true", KEEPALIVE, persistent_keepalive=True),
    of_peer("the all-zero public key", KEY, public_key=ZERO),
    of_peer("a public key that is not canonical", KEY, public_key=LOOSE),
    of_peer("a public key in hex", KEY, public_key="ab" * 32),
    of_peer("a public key with markup", KEY, public_key="<b>\x1b[31mred"),
    of_peer("a public key that is a number", KEY, public_key=7),
    Entry("no public key", lambda _s: [{"name": "nobody"}], KEY),
    Entry("an entry that is text", lambda _s: ["peer"], PEER),
    Entry("an entry that is null", lambda _s: [None], PEER),
    Entry("an entry that is a list", lambda _s: [[entry()]], PEER),
    Entry("a member twice", repeated, PEER),
    Entry("the gateway's own key", own_key, "own_public_key"),
    Entry("one key twice", sharing(public_key=new_key), DUPLICATE),
    Entry("one prefix on two keys", sharing(allowed_ips=lambda: [address()]), "prefix_claimed"),
    Entry("a prefix within another's", containing, "prefix_claimed"),
    Entry("one session on two keys", sharing(session=lambda: session(new_key())), "session_on_two_keys"),
]


EVENTS: Final = [row for row in ENTRIES if row.reason not in {KEY, PEER, DUPLICATE}]
"""Those that are refused in the same way when an event brings them; the others are no such events."""


def shown_key(made: Any) -> str:
    """The public key that an entry is refused under, as far as it can be read."""
    if isinstance(made, Verbatim):
        return made.public_key
    text = made.get("public_key") if isinstance(made, dict) else ""
    if not isinstance(text, str):
        return ""
    return text.replace("\x1b", "\\x1b")[:64]


def written(made: Any) -> bytes:
    return made.text if isinstance(made, Verbatim) else json.dumps(made).encode()


@dataclass
class Refused:
    """What was made of each row, and who was refused once it was taken in: public key and reason."""

    made: dict[str, list[Any]]
    refused: set[tuple[str, str]]


def list_all(stage: Stage) -> Refused:
    """Serve the truth with all bad entries in it."""
    made = {row.name: row.made(stage) for row in ENTRIES}
    entries = [written(one) for some in made.values() for one in some]
    stage.revision += 1
    peers = [*stage.truth()["peers"], "…"]
    document = stage.truth(peers=peers, peer_count=len(peers) - 1 + len(entries))
    stage.core.on("state", answer(200, compact(document).replace(compact("…"), b",".join(entries))))
    stage.resync()
    return Refused(made, _refused(stage))


def send_all(stage: Stage) -> Refused:
    """Send all bad entries that can be one as an event each, in one burst."""
    made = {row.name: row.made(stage) for row in EVENTS}
    events = []
    for one in (one for some in made.values() for one in some):
        stage.revision += 1
        head = f"event: peer_upserted\nid: {EPOCH}:{stage.revision}\ndata: "
        events.append(head.encode() + written(one) + b"\n\n")
    stage.core.send(b"".join(events))
    return Refused(made, _refused(stage))


def _refused(stage: Stage) -> set[tuple[str, str]]:
    """Wait until core has been told of the truth's revision; who is refused."""
    until(lambda: stage.in_step() and stage.core.asked("applied")[-1].json()["revision"] == stage.revision)
    return stage.refused()
