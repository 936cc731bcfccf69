"""Judging a state: each clause by the agent's own strict reader, given that part alone."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from agent.conformance.answers import Answer
from agent.conformance.verdicts import Ledger
from agent.core.messages import decode_snapshot
from agent.encoding import format_key, parse_time
from agent.errors import InvalidMessage
from agent.fence import Position
from agent.model import Peer, Refusal, Snapshot
from agent.roster import Roster

SKEW: Final = 300.0
"""Seconds that core's clock and this host's may differ: what signatures of pushes bear."""
_SHOWN: Final = 3
_SOUND: Final[dict[str, Any]] = {
    "epoch": "sound",
    "revision": 0,
    "server_time": "2026-11-24T03:00:00.000Z",
    "location": {"id": "1", "mfa_required": True},
    "interface": None,
    "session_policy": None,
    "peer_count": 0,
    "peers": [],
}
"""A state without a fault, of which one part at a time is replaced by core's."""
_PARTS: Final = {
    "epoch": "state.epoch",
    "revision": "state.revision",
    "location": "state.location",
    "interface": "state.interface",
    "session_policy": "state.session-policy",
}
_FAULTS: Final = {
    Refusal.INVALID_PUBLIC_KEY: "keys.canonical",
    Refusal.INVALID_PRESHARED_KEY: "keys.preshared",
    Refusal.INVALID_ALLOWED_IPS: "prefixes.strict",
    Refusal.INVALID_SESSION: "state.sessions",
    Refusal.INVALID_TIME: "times.offset",
}
_OF_PEERS: Final = (
    "state.peers",
    "state.one-entry",
    "state.one-owner",
    "keys.canonical",
    "prefixes.strict",
)


def load_json(body: bytes) -> tuple[Any, bool]:
    """Read JSON; return it and whether an object in it repeats a key. Raises ValueError."""
    repeated = False

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        found = dict(pairs)
        repeated |= len(found) != len(pairs)
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=members, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, repeated


class Reading(NamedTuple):
    """A state as far as it can be read: faulty parts are replaced by sound ones.

    ``snapshot`` is None if not even its position is known. ``server_time`` is None if it is faulty.
    """

    snapshot: Snapshot | None = None
    server_time: float | None = None

    @property
    def position(self) -> Position | None:
        """Epoch and revision."""
        return None if self.snapshot is None else Position(self.snapshot.epoch, self.snapshot.revision)


def read_state(answer: Answer, ledger: Ledger) -> Reading:
    """Judge a 200 to GET state by all that can be seen in it alone."""
    if answer.media_type != "application/json":
        ledger.failed("state.json", f"Content-Type is {answer.media_type[:40] or 'missing'}")
    try:
        document, repeated = load_json(answer.body)
    except ValueError:
        ledger.failed("state.json", f"{len(answer.body)} bytes that are not JSON")
        return Reading()
    if not isinstance(document, dict):
        ledger.failed("state.json", "the answer is JSON but no object")
        return Reading()
    ledger.passed("state.json", f"an object of {len(answer.body)} bytes")
    ledger.judged(
        "json.no-repeated-keys", not repeated, "an object repeats a key" if repeated else "no object does"
    )
    sound = dict(_SOUND)
    for part, clause in _PARTS.items():
        value = document.get(part)
        if problem := _refused({part: value}):
            ledger.failed(clause, problem)
        else:
            ledger.passed(clause, _about(part, value))
            sound[part] = value
    server_time = _server_time(document.get("server_time"), answer, ledger)
    if server_time is not None:
        sound["server_time"] = document["server_time"]
    sound |= _peers(document, ledger)
    snapshot = decode_snapshot(json.dumps(sound).encode(), answer.sent)
    _judge_peers(snapshot, document.get("peers"), ledger)
    if ledger.failures("state.epoch", "state.revision"):
        return Reading(None, server_time)
    _judge_etag(answer, Position(snapshot.epoch, snapshot.revision), ledger)
    _judge_whole(answer, repeated, ledger)
    return Reading(snapshot, server_time)


def _refused(part: dict[str, Any]) -> str:
    """What the agent's reader says of a state that is sound but for this part; empty if nothing."""
    try:
        decode_snapshot(json.dumps(_SOUND | part).encode(), 0.0)
    except InvalidMessage as error:
        return error.message.removeprefix("core's message is not valid: ")
    return ""


def _about(part: str, value: Any) -> str:
    match part:
        case "epoch" | "revision":
            return str(value)
        case "location":
            mfa = "requires MFA" if value["mfa_required"] else "does not require MFA"
            return f"location {value['id']} {mfa}"
    return "left to the gateway's configuration" if value is None else ", ".join(map(str, value))


def _server_time(value: object, answer: Answer, ledger: Ledger) -> float | None:
    try:
        server_time = parse_time(value)
    except ValueError as error:
        ledger.failed(
            "times.offset" if isinstance(value, str) else "state.server-time", f"server_time: {error}"
        )
        return None
    ledger.passed("times.offset", "server_time carries one")
    off = server_time - (answer.sent_wall + (answer.received - answer.sent) / 2)
    ledger.judged("state.server-time", abs(off) <= SKEW, f"{off:+.1f} s beside this host's clock")
    return server_time


def _peers(document: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Judge the list and its count; return them, or none of them, to be read on."""
    peers, count = document.get("peers"), document.get("peer_count")
    if not isinstance(peers, list):
        ledger.failed("state.peers", "peers is missing" if peers is None else "peers is not a list")
        return {}
    right = type(count) is int and count == len(peers)
    shown = count if type(count) is int else "missing" if count is None else "no integer"
    ledger.judged("state.peer-count", right, f"peer_count is {shown}, peers has {len(peers)}")
    part = {"peers": peers, "peer_count": len(peers)}
    if problem := _refused(part):
        ledger.failed("state.peers", problem)
        return {}
    return part


def _judge_peers(snapshot: Snapshot, entries: object, ledger: Ledger) -> None:
    if not isinstance(entries, list):
        return
    for unreadable in snapshot.unreadable:
        clause = _FAULTS.get(unreadable.reason, "state.peers")
        ledger.failed(
            clause, f"{unreadable.name or unreadable.public_key or 'an entry'}: {unreadable.reason}"
        )
    with_key = [e for e in entries if isinstance(e, dict) and isinstance(e.get("public_key"), str)]
    by_key = {entry["public_key"]: entry for entry in with_key}
    for peer in snapshot.peers:
        judge_entry(peer, by_key.get(key_text(peer)), ledger)
    _judge_list(snapshot, ledger)
    peers, sessions = len(snapshot.peers), sum(peer.session is not None for peer in snapshot.peers)
    psks = sessions + sum(peer.preshared_key is not None for peer in snapshot.peers)
    for clauses, count, what in (
        (_OF_PEERS, peers, "peers"),
        (("state.sessions",), sessions, "sessions"),
        (("keys.preshared",), psks, "PSKs"),
    ):
        for clause in clauses:
            if count:
                ledger.passed(clause, f"{what} listed: {count}")
            else:
                ledger.skipped(clause, f"there are no {what} in the state")


def key_text(peer: Peer) -> str:
    """The peer's public key as core writes it."""
    return format_key(peer.public_key)


def judge_entry(peer: Peer, entry: object, ledger: Ledger, clause: str = "state.peers") -> bool:
    """Judge one entry of the list, or of an event; ``clause`` is for faults that have none of their own."""
    good = True
    for fault in (peer.fault, peer.session_fault):
        if fault is None:
            continue
        good = False
        session = entry.get("session") if isinstance(entry, dict) else None
        if fault is Refusal.INVALID_ALLOWED_IPS and not _is_text_list(entry):
            ledger.failed(clause, f"{key_text(peer)}: allowed_ips is no list of strings")
        else:
            ledger.failed(_clause_of(fault, session, clause), f"{key_text(peer)}: {fault}")
    return good


def judge_session(fault: Refusal, session: object, who: str, ledger: Ledger) -> None:
    """Enter the fault of a session in an event."""
    ledger.failed(_clause_of(fault, session, "state.sessions"), f"{who}: {fault}")


def _is_text_list(entry: object) -> bool:
    prefixes = entry.get("allowed_ips") if isinstance(entry, dict) else None
    return isinstance(prefixes, list) and all(isinstance(prefix, str) for prefix in prefixes)


def _clause_of(fault: Refusal, session: object, otherwise: str) -> str:
    if not isinstance(session, dict):
        return _FAULTS.get(fault, otherwise)
    times = [session.get("granted_at"), session.get("expires_at")]
    if fault is Refusal.INVALID_TIME and not any(isinstance(t, str) and not _is_time(t) for t in times):
        return "state.sessions"  # one is missing, or it ends before it begins
    if fault is Refusal.INVALID_PRESHARED_KEY and "preshared_key" not in session:
        return "state.sessions"
    return _FAULTS.get(fault, otherwise)


def _is_time(text: str) -> bool:
    try:
        parse_time(text)
    except ValueError:
        return False
    return True


def _judge_list(snapshot: Snapshot, ledger: Ledger) -> None:
    """What the agent refuses over the whole list: repeated keys, contested prefixes, shared sessions."""
    keys = [peer.public_key for peer in snapshot.peers]
    if len(set(keys)) != len(keys):
        ledger.failed("state.one-entry", f"{len(keys) - len(set(keys))} entries repeat a key")
    roster = Roster()
    roster.load({peer.public_key: peer for peer in snapshot.peers}, snapshot.location.mfa_required)
    claimed = [roster.peers[k] for k, why in roster.refused.items() if why is Refusal.PREFIX_CLAIMED]
    if claimed:
        some = ", ".join(f"{peer.name} {key_text(peer)}" for peer in claimed[:_SHOWN])
        ledger.failed("state.one-owner", f"{len(claimed)} peers claim what another has: {some}")
    if any(why is Refusal.SESSION_ON_TWO_KEYS for why in roster.refused.values()):
        ledger.failed("session.id-is-new", "a session is listed for two peers")


def _judge_etag(answer: Answer, position: Position, ledger: Ledger) -> None:
    etag = answer.headers.get("etag", "")
    good = etag.removeprefix("W/") == f'"{position}"'
    ledger.judged("state.etag", good, f"ETag is {etag[:100] or 'missing'}, the body {position}")


def _judge_whole(answer: Answer, repeated: bool, ledger: Ledger) -> None:
    """The agent's reader takes it as it came; named only where no other clause says why not."""
    try:
        snapshot = decode_snapshot(answer.body, answer.sent)
    except InvalidMessage as error:
        if repeated or ledger.failures():
            ledger.skipped("state.readable", "the failures above say why not")
        else:
            ledger.failed("state.readable", error.message)
        return
    ledger.passed("state.readable", f"{len(snapshot.peers)} peers at {snapshot.epoch}:{snapshot.revision}")
