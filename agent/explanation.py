"""Why a peer is on the interface or not: ``wg-agent explain``.

A judgement names the one reason that decides; the lines beside it say what else there is to know, each with
whether it speaks for the peer (True), against it (False) or neither (None).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from agent.encoding import (
    format_key,
    format_span,
    format_time,
    network_of,
    parse_interface_address,
    parse_prefix,
    parse_public_key,
)
from agent.meanings import ENDS, MEANINGS
from agent.model import EndReason, Now, Peer, Prefix, PublicKey, Refusal, UnreadablePeer
from agent.overview import peer_state
from agent.plan import CUT, LEAVE, Mirror, make_plan
from agent.sessions import Session
from agent.state import State
from agent.trail import Kind, Occurrence, Trail

_MANY: Final = 8
"""More peers than this are named and not explained."""
_UNGUARDED: Final = "the guard is not in force: nothing but the agent ends this session"
_LOOK_BACK: Final = 100
"""Occurrences of one peer among which the end of its last session is looked for."""
_KEY_PART: Final = 4
"""Characters from which on a text may be the beginning of a public key."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the state does not know: the interface's name, faults (empty: none), and what the guard does.

    ``core`` is "connected", empty if it has not answered yet, or what is wrong. ``trail`` has the last end of
    a peer's session. ``guarded`` is ``Warden.guarded``; ``stuck`` whether the device did not remove a peer.
    """

    interface: str
    core: str
    device_error: str
    guard_error: str
    trail: Trail
    guarded: Callable[[PublicKey], Literal["admitted", "barred", "missing"] | None]
    stuck: Callable[[PublicKey], bool]


class _Judgement(NamedTuple):
    reason: str
    because: str
    remedy: str = ""


def explain(what: str, state: State, mirror: Mirror, now: Now, around: Surroundings) -> dict[str, Any]:
    """Return ``{"interface", "asked", "peers": […], "more": n}`` for a public key, an address or a name.

    No peer if nothing fits; more than a few are left out and counted in ``more``.
    """
    found = find(what, state, mirror)
    unreadable = [one for one in state.roster.unreadable if what in {one.public_key, one.name}]
    peers = [_explain(key, state, mirror, now, around) for key in found[:_MANY]]
    peers += [_unreadable(one) for one in unreadable[: _MANY - len(peers)]]
    return {
        "interface": around.interface,
        "asked": what,
        "peers": peers,
        "more": len(found) + len(unreadable) - len(peers),
    }


def key_of(document: dict[str, Any]) -> PublicKey | None:
    """Return the key of a peer in ``explain``'s answer; None for one that can't be read."""
    try:
        return parse_public_key(document["public_key"])
    except ValueError:
        return None


def find(what: str, state: State, mirror: Mirror) -> list[PublicKey]:
    """Return the peers that a text means: by key, by address or prefix, by name.

    Of an address the most specific prefix counts; a prefix that nobody's contains means those within it. Of
    a name the exact one counts, else the same in other case, else those that contain it. The beginning of a
    key counts as much as an exact name does: no device's name stands before another one's key.
    """
    listed = state.roster.peers
    known = listed.keys() | mirror.peers.keys()
    try:
        key = parse_public_key(what)
    except ValueError:
        pass
    else:
        return [key] if key in known else []
    if (prefix := _as_prefix(what)) is not None:
        return _by_prefix(prefix, state, mirror)
    begun = [key for key in known if format_key(key).startswith(what)] if len(what) >= _KEY_PART else []
    for fits in _name_tests(what):
        if keys := {key for key, peer in listed.items() if fits(peer.name)}.union(begun):
            return sorted(keys, key=lambda key: (listed[key].name if key in listed else "", key))
    return []


def _as_prefix(what: str) -> Prefix | None:
    try:
        return parse_prefix(what)
    except ValueError:
        pass
    try:
        return network_of(parse_interface_address(what))
    except ValueError:
        return None


def _name_tests(what: str) -> Iterable[Callable[[str], bool]]:
    folded = what.casefold()
    return (
        lambda name: name == what,
        lambda name: name.casefold() == folded,
        lambda name: bool(folded) and folded in name.casefold(),
    )


def _by_prefix(asked: Prefix, state: State, mirror: Mirror) -> list[PublicKey]:
    around = {_network(asked, length) for length in range(asked.length + 1)}
    best: list[PublicKey] = []
    within: list[PublicKey] = []
    longest = -1
    for key in state.roster.peers.keys() | mirror.peers.keys():
        peer, held = state.roster.peers.get(key), mirror.peers.get(key)
        prefixes = peer.allowed_ips if peer is not None else held.allowed_ips if held is not None else ()
        for prefix in prefixes:
            if prefix in around and prefix.length >= longest:
                if prefix.length > longest:
                    best, longest = [], prefix.length
                best.append(key)
            elif longest < 0 and prefix.length > asked.length and _network(prefix, asked.length) == asked:
                within.append(key)
    return sorted(set(best or within))


def _network(prefix: Prefix, length: int) -> Prefix:
    """The prefix of this length that contains the other."""
    size = len(prefix.packed)
    host_bits = size * 8 - length
    number = int.from_bytes(prefix.packed, "big") >> host_bits << host_bits
    return Prefix(number.to_bytes(size, "big"), length)


def _explain(key: PublicKey, state: State, mirror: Mirror, now: Now, around: Surroundings) -> dict[str, Any]:
    peer, held = state.roster.peers.get(key), mirror.peers.get(key)
    on_interface = held is not None and held.tenure != CUT
    judgement = _judge(key, state, mirror, now, around)
    return {
        "public_key": format_key(key),
        "name": "" if peer is None else peer.name,
        "state": "unlisted" if peer is None else peer_state(state, mirror, key),
        "on_interface": on_interface,
        "reason": judgement.reason,
        "because": judgement.because,
        "remedy": judgement.remedy,
        "session_id": state.sessions[key].id if key in state.sessions else None,
        "facts": [
            {"speaks_for": speaks_for, "fact": fact}
            for speaks_for, fact in _facts(key, state, mirror, now, around)
        ],
    }


def _unreadable(one: UnreadablePeer) -> dict[str, Any]:
    meaning = MEANINGS[one.reason]
    return {
        "public_key": one.public_key,
        "name": one.name,
        "state": "refused",
        "on_interface": False,
        "reason": one.reason.value,
        "because": meaning.fault,
        "remedy": meaning.remedy,
        "session_id": None,
        "facts": [{"speaks_for": False, "fact": "core lists it with a key that can't be read"}],
    }


def _judge(key: PublicKey, state: State, mirror: Mirror, now: Now, around: Surroundings) -> _Judgement:
    held, want = mirror.peers.get(key), state.wanted(key, now)
    on_interface = held is not None and held.tenure != CUT
    if want is LEAVE:
        return _Judgement(
            "left_as_found",
            "it was found there, and core has not said yet what is to become of it",
            _core_remedy(around),
        )
    if want is None:
        off = _why_off(key, state, now, around)
        if not on_interface:
            return off
        refuses = "the device does not remove it, which is tried again at each tick: see the log"
        return _Judgement(
            "has_to_go",
            f"it is to be removed: {off.because}",
            around.device_error or (refuses if around.stuck(key) else "this takes a moment"),
        )
    fault = around.device_error and f"the interface can't be changed: {around.device_error}"
    if not on_interface:
        return _Judgement("not_there_yet", "it may be on the interface and is about to be put there", fault)
    if make_plan([(key, want)], mirror):
        return _Judgement("being_changed", "what it should be there is not in force yet", fault)
    on = _why_on(key, state)
    if around.guarded(key) == "missing":
        return on._replace(remedy=f"{_UNGUARDED}: {around.guard_error or 'it is being put in force'}")
    return on


def _why_on(key: PublicKey, state: State) -> _Judgement:
    session, peer = state.sessions.get(key), state.roster.peers[key]
    if session is not None and session.in_use:
        if state.roster.must_do_mfa(key):
            return _Judgement("session", "it has a live session")
        return _Judgement(
            "session_before_switch",
            "it needs no session any more and keeps its PSK until the running one ends",
        )
    if peer.mfa_exempt and state.roster.mfa_required:
        return _Judgement("mfa_exempt", "core exempts it from MFA")
    return _Judgement("mfa_not_required", "the location requires no MFA")


def _why_off(key: PublicKey, state: State, now: Now, around: Surroundings) -> _Judgement:
    peer = state.roster.peers.get(key)
    if peer is None and state.epoch is None:
        return _Judgement("awaiting_core", "core's list is not known yet", _core_remedy(around))
    if peer is None:
        return _Judgement(
            "not_listed", "core does not list it", "add the device in core; the public key has to be the same"
        )
    if (refusal := state.roster.refused.get(key)) is not None:
        meaning = MEANINGS[refusal]
        return _Judgement(refusal.value, meaning.fault, meaning.remedy)
    session = state.sessions.get(key)
    if session is not None and session.deadline.passed(now):
        return _Judgement(EndReason.EXPIRED.value, "its session is past its deadline", "authenticate again")
    if session is not None or not state.roster.must_do_mfa(key):
        # The PSK of either is core's to say.
        return _Judgement(
            "awaiting_core", "only core knows its PSK, and has not said it yet", _core_remedy(around)
        )
    needs = f"{_location(state)} requires MFA, and it has no session"
    last = _last_end(key, around.trail)
    if last is None:
        return _Judgement("no_session", needs, "authenticate: core grants a session for each connection")
    meaning = ENDS[EndReason(last.subject.reason)]
    return _Judgement(
        "no_session", f"{needs}: the last one ended ({last.subject.reason}), {meaning.fault}", meaning.remedy
    )


def _last_end(key: PublicKey, trail: Trail) -> Occurrence | None:
    ends = (one for one in reversed(trail.of(key, _LOOK_BACK)) if one.kind is Kind.ENDED)
    return next(ends, None)


def _core_remedy(around: Surroundings) -> str:
    if around.core == "connected":
        return ""
    return f"core is unreachable: {around.core}" if around.core else "core has not answered yet"


def _location(state: State) -> str:
    return "the location" if state.location is None else f"location {state.location.name}"


def _facts(
    key: PublicKey, state: State, mirror: Mirror, now: Now, around: Surroundings
) -> Iterable[tuple[bool | None, str]]:
    peer, session = state.roster.peers.get(key), state.sessions.get(key)
    if peer is None and state.epoch is None:
        yield None, "core's list is not known yet"
    elif peer is None:
        yield False, "core does not list it"
    else:
        yield True, f"core lists it with {_shown(peer.allowed_ips)}"
        yield from _refusal_facts(key, peer, state)
        yield from _mfa_facts(key, peer, state)
    if session is not None:
        yield from _session_facts(key, session, state, mirror, now)
    yield from _interface_facts(key, state, mirror, now)
    match around.guarded(key):
        case "admitted":
            yield True, "the kernel's guard lets its packets through"
        case "barred":
            yield False, "the kernel's guard does not let its packets through"
        case "missing":
            yield False, f"{_UNGUARDED}: {around.guard_error or 'it is being put in force'}"
    if around.device_error:
        yield None, f"the interface can't be read or changed: {around.device_error}"
    if remedy := _core_remedy(around):
        yield None, remedy


def _refusal_facts(key: PublicKey, peer: Peer, state: State) -> Iterable[tuple[bool | None, str]]:
    refusal = state.roster.refused.get(key)
    others: Iterable[PublicKey] = ()
    if refusal is Refusal.PREFIX_CLAIMED:
        others = state.roster.claimants(key)
    elif refusal is Refusal.SESSION_ON_TWO_KEYS and peer.session is not None:
        others = state.roster.holders(peer.session.id) - {key}
    for other in sorted(others)[:_MANY]:
        entry = state.roster.peers[other]
        yield (
            False,
            f"so does {entry.name or 'a peer'} ({format_key(other)}) with {_shown(entry.allowed_ips)}",
        )


def _mfa_facts(key: PublicKey, peer: Peer, state: State) -> Iterable[tuple[bool | None, str]]:
    if not state.roster.mfa_required:
        yield True, f"{_location(state)} requires no MFA"
    elif peer.mfa_exempt:
        yield True, f"{_location(state)} requires MFA, and core exempts this peer"
    else:
        has_session = key in state.sessions
        yield has_session, f"{_location(state)} requires MFA: only a live session lets it in"


def _session_facts(
    key: PublicKey, session: Session, state: State, mirror: Mirror, now: Now
) -> Iterable[tuple[bool | None, str]]:
    left = session.deadline.remaining(now)
    times = f"granted {format_time(session.granted_at)}, ends {format_time(session.ends_at)}"
    yield left > 0, f"session {session.id}, {times}: {format_span(left)} left"
    if session.expires_at > session.ends_at:
        yield None, "max_lifetime ends it before core's expires_at"
    if not session.in_use:
        yield None, "the session is held for when MFA is required: it does not matter now"
        return
    if session.preshared_key is None:
        yield False, "its PSK is not known since the restart: core has to name it again"
    held = mirror.peers.get(key)
    if held is None or held.tenure == CUT or key in state.roster.refused:
        return  # Nobody waits for signs of life from who is not there.
    liveness, ceilings = state.liveness.get(key), state.ceilings
    if ceilings.idle_timeout is None:
        yield None, "core judges whether it is idle, from the reports of all gateways"
    elif liveness is not None:
        lapses = format_span(liveness.lapses_at(ceilings) - now.boot)
        if liveness.last_sign_at is None:
            yield None, f"no handshake yet: never_connected ends it in {lapses} without one"
        else:
            ago = format_span(now.boot - liveness.last_sign_at)
            yield True, f"last sign of life {ago} ago: idle ends it in {lapses} without another"


def _interface_facts(
    key: PublicKey, state: State, mirror: Mirror, now: Now
) -> Iterable[tuple[bool | None, str]]:
    held, traffic = mirror.peers.get(key), state.traffic.get(key)
    if held is None:
        yield False, "it is not on the interface"
    elif held.tenure == CUT:
        yield False, "it is on the interface without allowed IPs and with a useless PSK, and is removed soon"
    else:
        psk = "a PSK" if held.preshared_key is not None else "no PSK"
        yield True, f"it is on the interface with {_shown(held.allowed_ips)} and {psk}"
    if traffic.latest_handshake:
        since = format_span(max(0.0, now.wall - traffic.latest_handshake))
        where = "" if traffic.endpoint is None else f", from {traffic.endpoint}"
        yield None, f"latest handshake {since} ago{where}"
    elif held is not None:
        yield None, "it has never shaken hands here: the client may have another PSK, key, endpoint or port"


def _shown(prefixes: Iterable[Prefix]) -> str:
    return ", ".join(map(str, prefixes)) or "no allowed IPs"
