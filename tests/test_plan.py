from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from agent.model import (
    KEEP,
    AddPeer,
    CutPeer,
    DesiredPeer,
    Endpoint,
    ObservedDevice,
    ObservedPeer,
    Operation,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)
from agent.observed import RawPeers
from agent.plan import CUT, FOUND, LEAVE, DriftKind, Mirror, Plan, Wanted, describe, make_plan
from tests.support.builders import device, key, observed, prefixes, psk
from tests.support.kernel_model import Kernel

HOME = Endpoint(b"\xcb\x00\x71\x09", 51000)


def want(
    number: int, *allowed_ips: str, preshared_key: int | None = None, keepalive: int = 0, tenure: int = 0
) -> DesiredPeer:
    return DesiredPeer(
        key(number),
        None if preshared_key is None else psk(preshared_key),
        prefixes(*(allowed_ips or (f"10.8.0.{number}",))),
        keepalive,
        tenure,
    )


def plan_of(mirror: Mirror, *wanted: DesiredPeer | tuple[int, Wanted]) -> Plan:
    pairs = [(w.public_key, w) if isinstance(w, DesiredPeer) else (key(w[0]), w[1]) for w in wanted]
    return make_plan(pairs, mirror)


def carried_out(mirror: Mirror, *wanted: DesiredPeer | tuple[int, Wanted]) -> list[Operation]:
    """Plan and acknowledge all of it."""
    plan = plan_of(mirror, *wanted)
    for operation in plan:
        mirror.acknowledge(operation, plan.tenures.get(operation.public_key, FOUND))
    return list(plan)


def holding(*wanted: DesiredPeer) -> Mirror:
    mirror = Mirror()
    carried_out(mirror, *wanted)
    return mirror


def test_a_plan_removes_then_updates_then_adds() -> None:
    mirror = holding(want(1), want(2), want(3))
    plan = plan_of(mirror, want(4), want(2, "10.9.0.2"), (1, None), want(3, tenure=1))
    assert list(plan) == [
        RemovePeer(key(1)),
        RemovePeer(key(3)),
        UpdatePeer(key(2), KEEP, prefixes("10.9.0.2"), True, KEEP),
        AddPeer(key(4), None, prefixes("10.8.0.4")),
        AddPeer(key(3), None, prefixes("10.8.0.3")),
    ]
    assert len(plan) == 5
    assert plan.tenures == {key(3): 1, key(4): 0}


def test_a_plan_without_a_peer_is_without_who_gains_its_prefixes_too() -> None:
    """The kernel would take them from it, and nobody would know."""
    mirror = holding(want(1, "10.9.0.1"), want(2, "10.9.0.2"), want(3, "10.9.0.3"), want(4, "10.9.0.4"))
    chain = [want(1, "10.9.0.9"), want(2, "10.9.0.1"), want(3, "10.9.0.2"), want(4, "10.9.0.8")]
    plan, out = plan_of(mirror, *chain, want(5, "10.9.0.5")).without({key(1)}, mirror)
    assert out == {key(1), key(2), key(3)}
    assert [operation.public_key for operation in plan] == [key(4), key(5)]
    assert plan.tenures.keys() >= {key(5)}
    # Nothing is left of whoever was to be removed and added afresh.
    plan, out = plan_of(mirror, want(3, "10.9.0.3", tenure=1), (4, None)).without({key(3)}, mirror)
    assert (list(plan), out) == ([RemovePeer(key(4))], {key(3)})
    # Whoever is not there yet holds nothing that another could gain.
    plan, out = plan_of(mirror, *chain, want(5, "10.9.0.5")).without({key(5), key(6)}, mirror)
    assert out == {key(5), key(6)}
    assert [operation.public_key for operation in plan] == [key(1), key(2), key(3), key(4)]


def test_a_long_plan_is_cut_into_portions_of_updates_and_then_of_adds_each_in_order() -> None:
    mirror = holding(*(want(n) for n in range(1, 9)))
    changed = [want(n, f"10.9.0.{n}") for n in (3, 1, 2)]
    plan = plan_of(mirror, *changed, *(want(n) for n in (14, 12, 11, 13)), (8, None))
    portions = plan.portions(2, lambda key: key.hex())
    assert [[write.public_key for write in portion] for portion in portions] == [
        [key(1), key(2)],
        [key(3)],
        [key(11), key(12)],
        [key(13), key(14)],
    ]
    writes = [write for portion in portions for write in portion]
    assert sorted(map(str, writes)) == sorted(map(str, (*plan.updates, *plan.adds)))
    assert all(portions[2].tenures[key(n)] == 0 for n in (11, 12))
    assert not any(portion.removes for portion in portions)


def test_what_fits_is_one_portion_as_it_stands_and_nothing_is_one_too() -> None:
    plan = plan_of(holding(want(8)), want(2), want(1), (8, None))
    (portion,) = plan.portions(2, lambda key: key.hex())
    assert [write.public_key for write in portion] == [key(2), key(1)]
    (nothing,) = plan_of(Mirror(), (8, None)).portions(2, lambda key: key.hex())
    assert not nothing


def test_updates_and_adds_count_together_for_what_fits() -> None:
    mirror = holding(want(1))
    plan = plan_of(mirror, want(1, "10.9.0.1"), want(3), want(2))
    assert len(plan.portions(3, lambda key: key.hex())) == 1
    portions = plan.portions(2, lambda key: key.hex())
    assert [[write.public_key for write in portion] for portion in portions] == [[key(1)], [key(2), key(3)]]


def test_nothing_is_sent_for_peers_that_are_as_wanted() -> None:
    mirror = holding(want(1, preshared_key=1), want(2))
    assert len(plan_of(mirror, want(1, preshared_key=1), want(2))) == 0


def test_peers_that_were_not_asked_about_are_not_touched() -> None:
    mirror = holding(want(1), want(2))
    assert list(plan_of(mirror, (1, None))) == [RemovePeer(key(1))]


def test_an_unwanted_peer_that_is_not_there_needs_no_removal() -> None:
    assert list(plan_of(Mirror(), (1, None))) == []


def test_hands_off_means_hands_off() -> None:
    mirror = Mirror()
    mirror.observe(device(observed(1, preshared_key=9)))
    assert list(plan_of(mirror, (1, LEAVE), (2, LEAVE))) == []
    # And the others are planned as ever.
    assert list(plan_of(mirror, (2, LEAVE), (1, None), (3, LEAVE))) == [RemovePeer(key(1))]


def test_a_renewed_psk_is_updated_in_place_and_alone() -> None:
    mirror = holding(want(1, preshared_key=1))
    assert carried_out(mirror, want(1, preshared_key=2)) == [UpdatePeer(key(1), psk(2), KEEP, False, KEEP)]
    assert len(plan_of(mirror, want(1, preshared_key=2))) == 0


def test_another_tenure_removes_and_adds_even_with_everything_alike() -> None:
    mirror = holding(want(1, preshared_key=1))
    assert carried_out(mirror, want(1, preshared_key=1, tenure=1)) == [
        RemovePeer(key(1)),
        AddPeer(key(1), psk(1), prefixes("10.8.0.1")),
    ]
    assert len(plan_of(mirror, want(1, preshared_key=1, tenure=1))) == 0


def test_a_static_psk_that_core_takes_away_is_cleared() -> None:
    mirror = holding(want(1, preshared_key=1))
    assert carried_out(mirror, want(1)) == [UpdatePeer(key(1), None, KEEP, False, KEEP)]
    assert mirror.peers[key(1)].preshared_key is None


def test_gained_allowed_ips_are_added_and_only_lost_ones_replace() -> None:
    mirror = holding(want(1, "10.0.0.1"))
    assert carried_out(mirror, want(1, "10.0.0.1", "10.0.0.2")) == [
        UpdatePeer(key(1), KEEP, prefixes("10.0.0.2"), False, KEEP)
    ]
    assert carried_out(mirror, want(1, "10.0.0.2")) == [
        UpdatePeer(key(1), KEEP, prefixes("10.0.0.2"), True, KEEP)
    ]
    assert len(plan_of(mirror, want(1, "10.0.0.2"))) == 0


def test_the_order_of_allowed_ips_is_no_difference() -> None:
    mirror = holding(want(1, "10.0.0.1", "10.0.0.2"))
    other_order = want(1)._replace(allowed_ips=prefixes("10.0.0.1", "10.0.0.2")[::-1])
    assert len(plan_of(mirror, other_order)) == 0
    shuffled = observed(1)._replace(allowed_ips=other_order.allowed_ips)
    assert mirror.observe(device(shuffled)) == ([], set())


def test_keepalive_is_set_only_once_a_peer_has_an_endpoint() -> None:
    mirror = holding(want(1, keepalive=25))
    assert len(plan_of(mirror, want(1, keepalive=25))) == 0
    drift, again = mirror.observe(device(observed(1, endpoint=HOME)))
    assert (drift, again) == ([], {key(1)})
    assert carried_out(mirror, want(1, keepalive=25)) == [UpdatePeer(key(1), KEEP, KEEP, False, 25)]
    assert len(plan_of(mirror, want(1, keepalive=25))) == 0
    assert carried_out(mirror, want(1)) == [UpdatePeer(key(1), KEEP, KEEP, False, 0)]


def test_a_keepalive_without_an_endpoint_is_switched_off() -> None:
    mirror = holding(want(1, keepalive=25))
    drift, _ = mirror.observe(device(observed(1, keepalive=25)))
    assert [d.kind for d in drift] == [DriftKind.PERSISTENT_KEEPALIVE]
    assert carried_out(mirror, want(1, keepalive=25)) == [UpdatePeer(key(1), KEEP, KEEP, False, 0)]


# Adoption.


def test_a_peer_found_as_wanted_is_adopted_without_a_message() -> None:
    mirror = Mirror()
    mirror.observe(device(observed(1, preshared_key=1, endpoint=HOME)))
    plan = plan_of(mirror, want(1, preshared_key=1))
    assert (list(plan), plan.adopted) == ([], (key(1),))
    assert plan_of(mirror, want(1, preshared_key=1)).adopted == ()


def test_a_found_peer_with_the_right_psk_gets_its_other_differences_in_place() -> None:
    mirror = Mirror()
    mirror.observe(device(observed(1, "10.9.9.9", preshared_key=1, endpoint=HOME)))
    plan = plan_of(mirror, want(1, preshared_key=1, keepalive=25))
    assert list(plan) == [UpdatePeer(key(1), KEEP, prefixes("10.8.0.1"), True, 25)]


@pytest.mark.parametrize("preshared_key", [None, 2])
def test_a_found_peer_with_another_psk_is_removed_and_added(preshared_key: int | None) -> None:
    mirror = Mirror()
    mirror.observe(device(observed(1, preshared_key=preshared_key)))
    assert carried_out(mirror, want(1, preshared_key=1)) == [
        RemovePeer(key(1)),
        AddPeer(key(1), psk(1), prefixes("10.8.0.1")),
    ]


def test_a_found_peer_without_allowed_ips_was_being_cut_and_is_removed_and_added() -> None:
    mirror = Mirror()
    mirror.observe(device(observed(1, preshared_key=1)._replace(allowed_ips=())))
    assert plan_of(mirror, want(1, preshared_key=1)).removes == (RemovePeer(key(1)),)
    none_wanted = want(1, preshared_key=1)._replace(allowed_ips=())
    assert plan_of(mirror, none_wanted).adopted == (key(1),)


# Cutting.


def test_a_cut_peer_is_only_ever_removed() -> None:
    mirror = holding(want(1, preshared_key=1))
    mirror.acknowledge(CutPeer(key(1)))
    assert mirror.peers[key(1)].tenure == CUT
    assert list(plan_of(mirror, (1, None))) == [RemovePeer(key(1))]
    for again in (want(1, preshared_key=1), want(1, preshared_key=1, tenure=5)):
        assert list(plan_of(mirror, again)) == [
            RemovePeer(key(1)),
            AddPeer(key(1), psk(1), prefixes("10.8.0.1")),
        ]


def test_a_cut_peer_is_neither_drift_nor_revived_by_what_somebody_puts_into_it() -> None:
    mirror = holding(want(1, preshared_key=1))
    mirror.acknowledge(CutPeer(key(1)))
    assert mirror.observe(device(observed(1, preshared_key=1))) == ([], set())
    assert plan_of(mirror, want(1, preshared_key=1)).removes == (RemovePeer(key(1)),)
    assert mirror.observe(device())[0] == []
    assert key(1) not in mirror.peers


@pytest.mark.parametrize(
    "operation", [CutPeer(key(1)), UpdatePeer(key(1), psk(1), KEEP, False, KEEP), RemovePeer(key(1))]
)
def test_cutting_updating_or_removing_a_peer_that_is_not_there_changes_nothing(operation: Operation) -> None:
    mirror = Mirror()
    mirror.acknowledge(operation)
    assert mirror.peers == {}


# Drift.


def test_what_somebody_else_changed_is_drift_and_to_be_planned_again() -> None:
    mirror = holding(want(1, preshared_key=1), want(2), want(3), want(4), want(6))
    drift, again = mirror.observe(
        device(
            observed(1, preshared_key=9),
            observed(2, "10.8.0.2", "10.99.0.0/16"),
            observed(3, keepalive=5, endpoint=HOME),
            observed(5),
            observed(6, endpoint=HOME),
        )
    )
    assert {(d.kind, d.public_key) for d in drift} == {
        (DriftKind.PRESHARED_KEY, key(1)),
        (DriftKind.ALLOWED_IPS, key(2)),
        (DriftKind.PERSISTENT_KEEPALIVE, key(3)),
        (DriftKind.PEER_REMOVED, key(4)),
        (DriftKind.PEER_ADDED, key(5)),
    }
    assert again == {key(1), key(2), key(3), key(4), key(5), key(6)}
    assert mirror.observe(
        device(
            observed(1, preshared_key=9),
            observed(2, "10.8.0.2", "10.99.0.0/16"),
            observed(3, keepalive=5, endpoint=HOME),
            observed(5),
            observed(6, endpoint=HOME),
        )
    ) == ([], set())


def raw_device(*peers: ObservedPeer) -> ObservedDevice:
    """A look that knows who has moved since another of the same objects."""
    raw = {one.public_key: RAW.setdefault(one, str(len(RAW)).encode()) for one in peers}
    by_raw = {raw: one for one, raw in RAW.items()}
    return replace(device(), peers=RawPeers(raw, by_raw.__getitem__))


RAW: dict[ObservedPeer, bytes] = {}


def test_what_we_have_changed_is_compared_even_if_it_looks_as_it_did_before() -> None:
    mirror = holding(want(1, preshared_key=1), want(2))
    before = raw_device(observed(1, preshared_key=1), observed(2))
    assert mirror.observe(before) == ([], set())
    carried_out(mirror, want(1, preshared_key=7))
    mirror.acknowledge(RemovePeer(key(2)))
    drift, again = mirror.observe(before)
    assert {(d.kind, d.public_key) for d in drift} == {
        (DriftKind.PRESHARED_KEY, key(1)),
        (DriftKind.PEER_ADDED, key(2)),
    }
    assert again == {key(1), key(2)}


def test_what_is_found_at_first_is_no_drift_and_compared_with_from_then_on() -> None:
    found, learnt = device(observed(1, preshared_key=1), observed(2)), Mirror()
    other = Mirror()
    other.observe(found)
    learnt.find(found)
    assert learnt.peers == other.peers
    assert {held.tenure for held in learnt.peers.values()} == {FOUND}
    drift, again = learnt.observe(device(observed(1, preshared_key=2), observed(2)))
    assert [(one.kind, one.public_key) for one in drift] == [(DriftKind.PRESHARED_KEY, key(1))]
    assert again == {key(1)}


@pytest.mark.parametrize("look", [Mirror.find, Mirror.observe])
def test_who_has_not_moved_since_the_last_look_is_not_looked_at(
    look: Callable[[Mirror, ObservedDevice], object],
) -> None:
    mirror = holding(want(1), want(2), want(3))
    look(mirror, raw_device(observed(1), observed(2), observed(3)))
    mirror.peers[key(1)] = structs.replace(mirror.peers[key(1)], persistent_keepalive=9)
    drift, again = mirror.observe(raw_device(observed(1), observed(2, endpoint=HOME)))
    assert ([(d.kind, d.public_key) for d in drift], again) == (
        [(DriftKind.PEER_REMOVED, key(3))],
        {key(2), key(3)},
    )


def test_who_is_gone_is_told_in_order() -> None:
    mirror = holding(*(want(n) for n in (5, 3, 9, 1, 7, 2, 8)))
    drift, _ = mirror.observe(device(observed(8)))
    assert [one.public_key for one in drift] == [key(n) for n in (1, 2, 3, 5, 7, 9)]


def test_drift_with_the_same_psk_does_not_turn_a_peers_stay_into_another() -> None:
    """Else a renewal would lose its packets, and a peer of an ended session be taken for the next one's."""
    mirror = holding(want(1, preshared_key=1, tenure=4), want(2, tenure=4), want(3, tenure=4))
    mirror.observe(
        device(
            observed(1, "10.66.0.0/16", preshared_key=1), observed(2, "10.66.0.2"), observed(3, endpoint=HOME)
        )
    )
    assert list(plan_of(mirror, want(1, preshared_key=2, tenure=4))) == [
        UpdatePeer(key(1), psk(2), prefixes("10.8.0.1"), True, KEEP)
    ]
    assert list(plan_of(mirror, want(2, tenure=5), want(3, tenure=5))) == [
        RemovePeer(key(2)),
        RemovePeer(key(3)),
        AddPeer(key(2), None, prefixes("10.8.0.2")),
        AddPeer(key(3), None, prefixes("10.8.0.3")),
    ]


def test_drift_in_allowed_ips_and_keepalive_is_healed_in_place() -> None:
    mirror = holding(want(1, preshared_key=1))
    mirror.observe(device(observed(1, "10.66.0.0/16", preshared_key=1, keepalive=9, endpoint=HOME)))
    assert list(plan_of(mirror, want(1, preshared_key=1))) == [
        UpdatePeer(key(1), KEEP, prefixes("10.8.0.1"), True, 0)
    ]


def test_only_a_renewal_changes_a_psk_in_place_so_a_strange_one_is_removed_and_added() -> None:
    """Whoever got in by the strange PSK would keep transport keys for 180 s."""
    mirror = holding(want(1, preshared_key=1))
    mirror.observe(device(observed(1, preshared_key=9)))
    assert carried_out(mirror, want(1, preshared_key=1)) == [
        RemovePeer(key(1)),
        AddPeer(key(1), psk(1), prefixes("10.8.0.1")),
    ]


def test_an_update_that_was_carried_out_but_not_acknowledged_costs_no_packet() -> None:
    mirror = holding(want(1, preshared_key=1))
    mirror.observe(device(observed(1, preshared_key=2)))
    assert list(plan_of(mirror, want(1, preshared_key=2))) == []


def test_a_strange_peer_is_removed() -> None:
    mirror = Mirror()
    mirror.observe(device(observed(1)))
    assert list(plan_of(mirror, (1, None))) == [RemovePeer(key(1))]


def test_what_drift_and_operations_say_to_people_holds_no_secret() -> None:
    mirror = holding(want(1, preshared_key=1))
    many = [f"10.77.0.{n}" for n in range(20)]
    drift, _ = mirror.observe(device(observed(1, *many, preshared_key=9)))
    texts = [d.detail for d in drift]
    assert texts[0] == "has another pre-shared key"
    eight = ", ".join(f"10.77.0.{n}/32" for n in range(8))
    assert texts[1] == f"has {eight}, … instead of 10.8.0.1/32"
    all_of_them = AddPeer(key(1), None, prefixes(*many[:8]))
    assert describe(all_of_them) == f"add without pre-shared key, allowed ips {eight}"
    one_more = AddPeer(key(1), None, prefixes(*many[:9]))
    assert describe(one_more) == f"add without pre-shared key, allowed ips {eight}, …"
    assert describe(UpdatePeer(key(1), psk(1), KEEP, False, KEEP)) == "update: new pre-shared key"
    assert describe(RemovePeer(key(1))) == "remove"
    assert describe(CutPeer(key(1))) == "cut"
    assert describe(AddPeer(key(1), None, ())) == "add without pre-shared key, allowed ips none"
    assert (
        describe(AddPeer(key(1), psk(1), prefixes("10.0.0.1")))
        == "add with pre-shared key, allowed ips 10.0.0.1/32"
    )
    assert (
        describe(UpdatePeer(key(1), psk(1), prefixes("10.0.0.1"), True, 25))
        == "update: new pre-shared key; allowed ips 10.0.0.1/32; persistent keepalive 25"
    )
    assert (
        describe(UpdatePeer(key(1), None, prefixes("10.0.0.1"), False, 0))
        == "update: clear pre-shared key; gain allowed ips 10.0.0.1/32; persistent keepalive off"
    )
    assert describe(UpdatePeer(key(1), KEEP, KEEP, False, 7)) == "update: persistent keepalive 7"


def test_trying_a_plan_on_a_copy_of_the_mirror_leaves_the_mirror_alone() -> None:
    mirror = Mirror()
    mirror.observe(device(observed(1, preshared_key=1)))
    assert plan_of(mirror.copy(), want(1, preshared_key=1)).adopted == (key(1),)
    assert mirror.peers[key(1)].tenure == FOUND


def test_a_copy_looks_at_whom_the_mirror_would_look_at_and_takes_nothing_from_it() -> None:
    mirror, seen = holding(want(1), want(2)), raw_device(observed(1), observed(2))
    mirror.observe(seen)
    mirror.peers[key(1)] = structs.replace(mirror.peers[key(1)], persistent_keepalive=9)
    carried_out(mirror, want(2, "10.9.9.9"))
    for looks in (mirror.copy(), mirror.copy(), mirror):
        (drift,) = looks.observe(seen)[0]
        assert (drift.kind, drift.public_key) == (DriftKind.ALLOWED_IPS, key(2))


# From every interrupted prefix.

_PREFIXES = [f"10.0.0.{n}" for n in range(1, 7)]


@st.composite
def _interfaces(draw: st.DrawFn) -> dict[PublicKey, DesiredPeer]:
    """Peers that share out a few prefixes, each belonging to one."""
    owners = draw(st.lists(st.integers(0, 4), min_size=len(_PREFIXES), max_size=len(_PREFIXES)))
    return {
        key(n): want(
            n,
            *[p for p, owner in zip(_PREFIXES, owners, strict=True) if owner == n] or [f"10.1.0.{n}"],
            preshared_key=draw(st.none() | st.integers(1, 3)),
            keepalive=draw(st.sampled_from([0, 25])),
            tenure=draw(st.integers(0, 1)),
        )
        for n in draw(st.sets(st.integers(1, 4)))
    }


@settings(max_examples=150)
@given(_interfaces(), _interfaces(), st.booleans(), st.randoms(use_true_random=False))
def test_a_plan_interrupted_anywhere_is_completed_by_the_next(
    before: dict[PublicKey, DesiredPeer], after: dict[PublicKey, DesiredPeer], reread: bool, random: object
) -> None:
    everybody = [key(n) for n in range(1, 5)]
    random.shuffle(everybody)  # type: ignore[attr-defined]
    for cut_off in count():
        kernel, mirror = Kernel(), Mirror()
        steps = [(before, None), (after, cut_off), (after, None)]
        for wanted, stop in steps:
            if wanted is after and stop is None and reread:
                mirror = Mirror()
                mirror.observe(kernel.read())
            plan = make_plan([(k, wanted.get(k)) for k in everybody], mirror)
            for done, operation in enumerate(plan):
                if done == stop:
                    break
                kernel.apply(operation)
                mirror.acknowledge(operation, plan.tenures.get(operation.public_key, FOUND))
                _nobody_is_let_in(kernel, before, after)
            else:
                if stop is not None:
                    return
        assert _shown(kernel) == {k: (w.preshared_key, set(w.allowed_ips)) for k, w in after.items()}
        assert len(make_plan([(k, after.get(k)) for k in everybody], mirror)) == 0


def _shown(kernel: Kernel) -> dict[PublicKey, object]:
    return {k: (p.preshared_key, p.allowed_ips) for k, p in kernel.peers.items()}


def _nobody_is_let_in(
    kernel: Kernel, before: dict[PublicKey, DesiredPeer], after: dict[PublicKey, DesiredPeer]
) -> None:
    """At no moment is somebody there with a PSK or a prefix that neither list gives it."""
    for k, peer in kernel.peers.items():
        lists = [held[k] for held in (before, after) if k in held]
        assert peer.preshared_key in [w.preshared_key for w in lists]
        assert peer.allowed_ips <= {p for w in lists for p in w.allowed_ips}
