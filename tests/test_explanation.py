from __future__ import annotations

from typing import Any, Literal

import pytest
from msgspec.structs import replace

from agent.encoding import format_key
from agent.explanation import Surroundings, explain, find
from agent.meanings import ENDS, MEANINGS
from agent.model import (
    CutPeer,
    EndReason,
    Now,
    PeerRemoved,
    PublicKey,
    Refusal,
    SessionPolicy,
    UnreadablePeer,
)
from agent.plan import Mirror, make_plan
from agent.sessions import Limits
from agent.state import Restored, State
from agent.trail import Kind, Subject, Trail, one
from tests.reconciler.harness import granted, revoked
from tests.support.builders import (
    NOW,
    OWN_KEY,
    after,
    columns,
    device,
    grant,
    key,
    location_changed,
    observed,
    peer,
    snapshot,
)


class Gateway:
    """A state, its interface and its trail, without the I/O between them."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.state, self.mirror, self.trail = State(limits, OWN_KEY), Mirror(), Trail()
        self.now = NOW
        self.around = {"core": "connected", "device_error": "", "guard_error": ""}
        self.guarded: Literal["admitted", "barred", "missing"] | None = None
        self.stuck = False

    def load(self, *peers: Any, follow: bool = True, **members: Any) -> Gateway:
        self.state.load(snapshot(peers, **members), self.now)
        return self.follow() if follow else self

    def follow(self) -> Gateway:
        """The interface follows the state, and what has ended is told."""
        state = self.state
        done = make_plan(((k, state.wanted(k, self.now)) for k in state.dirty), self.mirror)
        for operation in done:
            self.mirror.acknowledge(operation, done.tenures.get(operation.public_key, 0))
        for added in state.dirty & self.mirror.peers.keys():
            state.added(added, self.now)
        state.dirty.clear()
        ends = [Subject(one.public_key, one.session_id, one.reason.value) for one in state.ends]
        self.trail.add(self.now.wall, Kind.ENDED, state.revision, columns(*ends))
        state.ends.clear()
        return self

    def at(self, now: Now) -> Gateway:
        self.now = now
        self.state.tick(now)
        return self.follow()

    def asked(self, what: str) -> dict[str, Any]:
        guarded, stuck = self.guarded, self.stuck
        around = Surroundings(
            interface="wg0",
            trail=self.trail,
            guarded=lambda _: guarded,
            stuck=lambda _: stuck,
            **self.around,
        )
        return explain(what, self.state, self.mirror, self.now, around)

    def why(self, what: str | int) -> dict[str, Any]:
        text = format_key(key(what)) if isinstance(what, int) else what
        (one,) = self.asked(text)["peers"]
        return one  # type: ignore[no-any-return]

    def reason(self, number: int) -> tuple[bool, str]:
        one = self.why(number)
        return one["on_interface"], one["reason"]

    def facts(self, number: int) -> list[str]:
        return [fact["fact"] for fact in self.why(number)["facts"]]


# Who is meant.


def numbers(gateway: Gateway, what: str) -> list[int]:
    return [int.from_bytes(one, "big") for one in find(what, gateway.state, gateway.mirror)]


def a_few() -> Gateway:
    return Gateway().load(
        peer(1, "10.8.0.1", name="alice"),
        peer(2, "10.8.0.2", "fd00::2", name="Alice-phone"),
        peer(3, "10.9.0.0/16", name="router", mfa_exempt=True),
        peer(4, "10.9.7.0/24", name="lab", mfa_exempt=True),
    )


@pytest.mark.parametrize(
    ("what", "meant"),
    [
        ("alice", [1]),
        ("ALICE", [1]),
        ("phone", [2]),
        ("lic", [2, 1]),
        ("10.8.0.2", [2]),
        ("fd00::2", [2]),
        ("10.9.1.1", [3]),
        ("10.9.7.9", [4]),
        ("10.9.7.0/25", [4]),
        ("10.9.0.0/16", [3]),
        ("10.9.1.1/16", [3]),
        ("10.8.0.0/24", [1, 2]),
        ("10.0.0.0/8", [1, 2, 3, 4]),
        ("0.0.0.0/0", [1, 2, 3, 4]),
        ("::/0", [2]),
        ("10.8.0.77", []),
        ("nobody", []),
        (format_key(key(3)), [3]),
        (format_key(key(9)), []),
    ],
)
def test_a_peer_is_found_by_name_address_or_key(what: str, meant: list[int]) -> None:
    assert numbers(a_few(), what) == meant


def test_a_peer_is_found_by_the_beginning_of_its_key_but_not_by_a_letter_or_two() -> None:
    gateway = Gateway().load(peer(1, name="x"))
    gateway.state.load(snapshot([peer(1)._replace(public_key=PublicKey(b"\x01" * 32))]), NOW)
    whole = format_key(PublicKey(b"\x01" * 32))
    assert find(whole[:6], gateway.state, gateway.mirror) == [b"\x01" * 32]
    assert find(whole[:4], gateway.state, gateway.mirror) == [b"\x01" * 32]
    assert find(whole[:3], gateway.state, gateway.mirror) == []


def test_no_device_can_hide_another_one_behind_a_name_like_its_key() -> None:
    victim = PublicKey(b"\x01" * 32)
    gateway = Gateway().load(peer(1)._replace(public_key=victim), peer(2, name=format_key(victim)[:8]))
    assert set(find(format_key(victim)[:8], gateway.state, gateway.mirror)) == {victim, key(2)}
    gateway = Gateway().load(peer(1)._replace(public_key=victim), peer(2, name="x" + format_key(victim)[:8]))
    assert find(format_key(victim)[:8], gateway.state, gateway.mirror) == [victim]


def test_where_too_many_are_meant_some_are_named_and_the_others_counted() -> None:
    gateway = Gateway().load(*(peer(number, name=f"laptop-{number:02}") for number in range(1, 21)))
    answer = gateway.asked("laptop")
    assert (len(answer["peers"]), answer["more"]) == (8, 12)


def test_an_entry_with_an_unreadable_key_is_explained_by_what_core_wrote() -> None:
    odd = UnreadablePeer("rubbish", Refusal.INVALID_PUBLIC_KEY, "carol")
    gateway = Gateway().load(unreadable=(odd,))
    for what in ("rubbish", "carol"):
        one = gateway.why(what)
        assert (one["on_interface"], one["reason"], one["state"]) == (False, "invalid_public_key", "refused")


# Why a peer is on.


def test_on_by_a_live_session() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1, lasts=3600)))
    assert gateway.reason(1) == (True, "session")
    facts = gateway.facts(1)
    assert "location hq requires MFA: only a live session lets it in" in facts
    assert any(fact.startswith("session s1, granted ") and fact.endswith("1h00m left") for fact in facts)
    assert any("never_connected ends it in 3m00s" in fact for fact in facts)


def test_on_because_exempt_and_because_the_location_requires_no_mfa() -> None:
    assert Gateway().load(peer(1, mfa_exempt=True)).reason(1) == (True, "mfa_exempt")
    assert Gateway().load(peer(1), mfa_required=False).reason(1) == (True, "mfa_not_required")


def test_on_by_a_session_that_began_before_mfa_was_switched_off() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.state.change(location_changed(mfa_required=False), NOW)
    assert gateway.follow().reason(1) == (True, "session_before_switch")


def test_on_as_it_was_found_until_core_is_heard() -> None:
    gateway = Gateway()
    found = device(observed(1))
    gateway.mirror.find(found)
    gateway.state.adopt(found, {}, NOW)
    gateway.around["core"] = "connection refused"
    one = gateway.why(1)
    assert (one["on_interface"], one["reason"], one["state"]) == (True, "left_as_found", "unlisted")
    assert one["remedy"] == "core is unreachable: connection refused"


def test_on_though_it_has_to_go_while_the_device_refuses_to_remove_it() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.state.change(revoked(1, "s1"), NOW)
    gateway.around["device_error"] = "no such device"
    one = gateway.why(1)
    assert (one["on_interface"], one["reason"], one["remedy"]) == (True, "has_to_go", "no such device")


def test_on_and_not_as_it_should_be_until_the_change_is_in_force() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.load(peer(1, session=grant("s1", 9)), follow=False, revision=2)
    gateway.around["device_error"] = "no such device"
    told = gateway.why(1)
    assert (told["on_interface"], told["reason"]) == (True, "being_changed")
    assert "no such device" in told["remedy"]


def test_on_without_a_guard_that_is_needed_is_said_in_the_verdict() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.guarded, gateway.around["guard_error"] = "missing", "nft: not found"
    told = gateway.why(1)
    assert (
        told["remedy"] == "the guard is not in force: nothing but the agent ends this session: nft: not found"
    )
    assert {"speaks_for": False, "fact": told["remedy"]} in told["facts"]


def test_a_peer_that_the_device_does_not_remove_is_not_said_to_go_in_a_moment() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.state.change(revoked(1, "s1"), NOW)
    assert gateway.why(1)["remedy"] == "this takes a moment"
    gateway.stuck = True
    assert "the device does not remove it" in gateway.why(1)["remedy"]


# Why it is off.


def test_off_because_unlisted() -> None:
    gateway = Gateway().load(peer(1, mfa_exempt=True), peer(2))
    gateway.state.change(PeerRemoved(key(1)), NOW)
    assert gateway.reason(1) == (True, "has_to_go")
    gateway.mirror.find(device(observed(3)))
    assert "core does not list it" in gateway.why(3)["because"]


def test_off_without_a_session_that_ever_was() -> None:
    gateway = Gateway().load(peer(1))
    assert gateway.reason(1) == (False, "no_session")
    assert gateway.why(1)["because"] == "location hq requires MFA, and it has no session"


@pytest.mark.parametrize("ending", list(EndReason))
def test_off_because_its_session_ended_says_how_it_ended(ending: EndReason) -> None:
    gateway = Gateway().load(peer(1))
    gateway.trail.add(NOW.wall, Kind.ENDED, 1, one(Subject(key(1), "s1", ending.value)))
    told = gateway.why(1)
    assert f"the last one ended ({ending.value}), {ENDS[ending].fault}" in told["because"]
    assert told["remedy"] == ENDS[ending].remedy


def test_off_because_expired_by_the_clock() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1, lasts=60))).at(after(61))
    assert gateway.reason(1) == (False, "no_session")
    assert "(expired)" in gateway.why(1)["because"]


@pytest.mark.parametrize("refusal", list(Refusal))
def test_off_for_each_reason_to_refuse_with_its_meaning(refusal: Refusal) -> None:
    gateway = Gateway().load(peer(1, fault=refusal))
    one = gateway.why(1)
    assert (one["on_interface"], one["reason"], one["state"]) == (False, refusal.value, "refused")
    assert (one["because"], one["remedy"]) == (MEANINGS[refusal].fault, MEANINGS[refusal].remedy)


def test_off_because_of_a_claimed_prefix_names_the_others_that_claim_it() -> None:
    gateway = Gateway().load(peer(1, "10.8.0.9"), peer(2, "10.8.0.9", name="bob"), peer(3))
    assert gateway.reason(1) == (False, "prefix_claimed")
    assert f"so does bob ({format_key(key(2))}) with 10.8.0.9/32" in gateway.facts(1)


def test_off_because_of_a_shared_session_id_names_the_other_key() -> None:
    gateway = Gateway().load(peer(1, session=grant("s", 1)), peer(2, name="bob", session=grant("s", 1)))
    assert gateway.reason(1) == (False, "session_on_two_keys")
    assert any("bob" in fact for fact in gateway.facts(1))


def test_off_until_core_is_heard_after_a_reboot() -> None:
    gateway = Gateway()
    listed = peer(1, mfa_exempt=True, static_key_unknown=True)
    gateway.state.restore(Restored(location=snapshot().location, peers=(listed,)), NOW)
    assert gateway.reason(1) == (False, "awaiting_core")


def test_off_because_its_session_ended_while_the_agent_was_away_and_core_has_not_been_heard() -> None:
    gateway = Gateway()
    gateway.state.restore(Restored(location=snapshot().location, peers=(peer(1),)), NOW)
    gateway.around["core"] = ""
    assert gateway.reason(1) == (False, "no_session")
    assert "core has not answered yet" in gateway.facts(1)


def test_off_though_wanted_while_the_interface_cannot_be_changed() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)), follow=False)
    gateway.around["device_error"] = "no such device"
    one = gateway.why(1)
    assert (one["on_interface"], one["reason"]) == (False, "not_there_yet")
    assert "no such device" in one["remedy"]


def test_a_cut_peer_is_off() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.state.change(revoked(1, "s1"), NOW)
    gateway.mirror.acknowledge(CutPeer(key(1)))
    assert gateway.reason(1) == (False, "no_session")
    assert any("removed soon" in fact for fact in gateway.facts(1))


# What else there is to know.


def for_and_against(gateway: Gateway, number: int = 1) -> list[tuple[bool | None, str]]:
    return [(fact["speaks_for"], fact["fact"]) for fact in gateway.why(number)["facts"]]


def test_a_live_session_has_these_facts_for_it_and_no_other() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1, lasts=3600)))
    gateway.guarded = "admitted"
    assert for_and_against(gateway) == [
        (True, "core lists it with 10.8.0.1/32"),
        (True, "location hq requires MFA: only a live session lets it in"),
        (True, "session s1, granted 2027-01-15T08:00:00.000Z, ends 2027-01-15T09:00:00.000Z: 1h00m left"),
        (None, "no handshake yet: never_connected ends it in 3m00s without one"),
        (True, "it is on the interface with 10.8.0.1/32 and a PSK"),
        (None, "it has never shaken hands here: the client may have another PSK, key, endpoint or port"),
        (True, "the kernel's guard lets its packets through"),
    ]


def test_who_needs_no_session_has_these_facts_for_it_and_no_other() -> None:
    gateway = Gateway().load(peer(1, mfa_exempt=True))
    on = [
        (True, "it is on the interface with 10.8.0.1/32 and no PSK"),
        (None, "it has never shaken hands here: the client may have another PSK, key, endpoint or port"),
    ]
    listed = (True, "core lists it with 10.8.0.1/32")
    assert for_and_against(gateway) == [
        listed,
        (True, "location hq requires MFA, and core exempts this peer"),
        *on,
    ]
    gateway = Gateway().load(peer(1, mfa_exempt=True), mfa_required=False)
    assert for_and_against(gateway) == [listed, (True, "location hq requires no MFA"), *on]
    assert gateway.reason(1) == (True, "mfa_not_required")


def test_who_has_no_session_has_these_facts_against_it_and_no_other() -> None:
    gateway = Gateway().load(peer(1))
    gateway.guarded = "barred"
    assert for_and_against(gateway) == [
        (True, "core lists it with 10.8.0.1/32"),
        (False, "location hq requires MFA: only a live session lets it in"),
        (False, "it is not on the interface"),
        (False, "the kernel's guard does not let its packets through"),
    ]


def test_who_is_not_listed_has_these_facts_against_it_and_no_other() -> None:
    gateway = Gateway().load(peer(2))
    gateway.mirror.find(device(observed(1)))
    assert for_and_against(gateway)[0] == (False, "core does not list it")
    gateway.mirror.acknowledge(CutPeer(key(1)))
    assert for_and_against(gateway) == [
        (False, "core does not list it"),
        (False, "it is on the interface without allowed IPs and with a useless PSK, and is removed soon"),
        (None, "it has never shaken hands here: the client may have another PSK, key, endpoint or port"),
    ]


def test_before_cores_list_is_known_nobody_is_said_not_to_be_listed() -> None:
    gateway = Gateway()
    gateway.state.restore(Restored(location=snapshot().location), NOW)
    gateway.mirror.find(device(observed(1)))
    gateway.around["core"] = "refused"
    assert for_and_against(gateway) == [
        (None, "core's list is not known yet"),
        (True, "it is on the interface with 10.8.0.1/32 and no PSK"),
        (None, "it has never shaken hands here: the client may have another PSK, key, endpoint or port"),
        (None, "core is unreachable: refused"),
    ]
    told = gateway.why(1)
    assert (told["reason"], told["because"]) == (
        "has_to_go",
        "it is to be removed: core's list is not known yet",
    )


def test_an_unreadable_entry_has_one_fact_against_it() -> None:
    odd = UnreadablePeer("rubbish", Refusal.INVALID_PUBLIC_KEY, "carol")
    assert Gateway().load(unreadable=(odd,)).why("carol") == {
        "public_key": "rubbish",
        "name": "carol",
        "state": "refused",
        "on_interface": False,
        "reason": "invalid_public_key",
        "because": MEANINGS[odd.reason].fault,
        "remedy": MEANINGS[odd.reason].remedy,
        "session_id": None,
        "facts": [{"speaks_for": False, "fact": "core lists it with a key that can't be read"}],
    }


def test_unreadable_entries_are_named_and_counted_beside_the_others() -> None:
    odd = tuple(UnreadablePeer(f"bad{n}", Refusal.INVALID_PUBLIC_KEY, "laptop") for n in range(6))
    gateway = Gateway().load(*(peer(number, name="laptop") for number in range(1, 6)), unreadable=odd)
    answer = gateway.asked("laptop")
    assert [one["reason"] for one in answer["peers"]].count("invalid_public_key") == 3
    assert (len(answer["peers"]), answer["more"]) == (8, 3)


def test_a_guard_in_force_adds_nothing_to_the_verdict_and_one_to_come_says_so() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    for guarded in (None, "admitted"):
        gateway.guarded = guarded
        assert gateway.why(1)["remedy"] == ""
    gateway.guarded = "missing"
    assert gateway.why(1)["remedy"].endswith("ends this session: it is being put in force")


def test_who_is_on_the_interface_and_refused_is_not_said_to_be_waited_for() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.load(peer(1, session=grant("s1", 1)), peer(2, "10.8.0.1"), follow=False, revision=2)
    assert gateway.reason(1) == (True, "has_to_go")
    assert not any("never_connected" in fact for fact in gateway.facts(1))


def test_a_restored_sessions_psk_is_awaited_from_core() -> None:
    first = Gateway().load(peer(1, session=grant("s1", 1)))
    session = replace(first.state.sessions[key(1)], preshared_key=None, journalled_digest=b"\x01" * 32)
    gateway = Gateway()
    gateway.state.restore(
        Restored(location=snapshot().location, peers=(peer(1),), sessions=((session, None),)), NOW
    )
    gateway.around["core"] = "refused"
    assert gateway.reason(1) == (False, "awaiting_core")
    assert gateway.why(1)["because"] == "only core knows its PSK, and has not said it yet"
    assert (
        False,
        "its PSK is not known since the restart: core has to name it again",
    ) in for_and_against(gateway)
    gateway.now = after(3600)
    assert gateway.reason(1) == (False, "expired")
    assert for_and_against(gateway)[2][0] is False


def test_signs_of_life_say_when_the_session_would_end_for_lack_of_them() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.now = after(10)
    gateway.state.observe(device(observed(1, handshake=NOW.wall + 9)), gateway.now)
    gateway.now = after(40)
    assert "last sign of life 30s ago: idle ends it in 4m30s without another" in gateway.facts(1)
    assert any(fact.startswith("latest handshake 31s ago") for fact in gateway.facts(1))


def test_where_core_judges_liveness_no_idle_rule_is_claimed() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)), policy=SessionPolicy(liveness="core"))
    assert "core judges whether it is idle, from the reports of all gateways" in gateway.facts(1)
    assert not any("ends it in" in fact for fact in gateway.facts(1))


def test_nobody_waits_for_signs_of_life_from_who_is_not_there() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)), follow=False)
    assert not any("never_connected" in fact for fact in gateway.facts(1))


def test_a_stricter_ceiling_here_is_named() -> None:
    gateway = Gateway(Limits(max_lifetime=600)).load(peer(1, session=grant("s1", 1, lasts=3600)))
    assert "max_lifetime ends it before core's expires_at" in gateway.facts(1)


def test_a_session_that_is_only_held_is_said_not_to_matter() -> None:
    gateway = Gateway().load(peer(1), mfa_required=False)
    gateway.state.change(granted(1, grant("s1", 1)), NOW)
    assert any("does not matter now" in fact for fact in gateway.facts(1))


@pytest.mark.parametrize(("guarded", "text"), [("admitted", "lets"), ("barred", "does not let")])
def test_the_guard_has_a_say(guarded: Literal["admitted", "barred"], text: str) -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 1)))
    gateway.guarded = guarded
    assert f"the kernel's guard {text} its packets through" in gateway.facts(1)


def test_faults_around_the_peer_are_named() -> None:
    gateway = Gateway().load(peer(1))
    gateway.around = {"core": "timeout", "device_error": "gone", "guard_error": "no nft"}
    gateway.guarded = "missing"
    facts = " / ".join(gateway.facts(1))
    assert all(word in facts for word in ("timeout", "gone", "no nft"))


def test_no_answer_holds_a_preshared_key() -> None:
    gateway = Gateway().load(peer(1, session=grant("s1", 77), name="alice"))
    secret = grant("s1", 77).preshared_key
    answer = repr(gateway.asked("alice"))
    assert format_key(secret.raw) not in answer
    assert repr(secret.raw) not in answer
