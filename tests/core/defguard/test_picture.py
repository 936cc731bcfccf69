from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.defguard.messages import (
    Configuration,
    LocationGone,
    LocationPut,
    PeerGone,
    PeerPut,
    session_id,
)
from agent.core.defguard.picture import Picture
from agent.model import (
    NEVER,
    Change,
    Grant,
    InterfaceSettings,
    LocationChanged,
    Peer,
    PeerRemoved,
    PeerUpserted,
    Refusal,
    Snapshot,
)
from agent.state import State
from tests.support.builders import NOW, OWN_KEY, key, prefixes, psk


def put(number: int, secret: int | None = None, address: str = "", **members: Any) -> Peer:
    session = (
        None if secret is None else Grant(session_id(key(number), psk(secret)), psk(secret), None, NEVER)
    )
    return Peer(
        key(number),
        prefixes(address or f"10.8.0.{number}"),
        mfa_exempt=session is None,
        session=session,
        **members,
    )


def whole(*peers: Peer) -> Configuration:
    return Configuration("hq", None, InterfaceSettings(), peers)


def picture(*peers: Peer, **members: Any) -> Picture:
    made = Picture("e1", "7", mfa_required=False, **members)
    made.whole(whole(*peers), NOW)
    return made


def bodies(taken: Snapshot | tuple[Change, ...]) -> list[Any]:
    assert isinstance(taken, tuple)
    return [change.body for change in taken]


def test_revisions_go_up_by_one_whatever_is_told() -> None:
    made = Picture("e1", "7", mfa_required=False)
    assert made.whole(whole(), NOW).revision == 1
    [change] = made.take(PeerPut(put(1, 1)), NOW)  # type: ignore[misc]
    assert (change.epoch, change.revision) == ("e1", 2)
    assert made.whole(whole(put(1, 1)), NOW).revision == 3


def test_the_new_owner_of_a_prefix_has_the_old_one_refused_first() -> None:
    made = picture(put(1, 1), put(2, 2))
    changed = put(5, 5, "10.8.0.1")
    refused = put(1, 1)._replace(allowed_ips=(), fault=Refusal.PREFIX_CLAIMED)
    assert bodies(made.take(PeerPut(changed), NOW)) == [PeerUpserted(refused), PeerUpserted(changed)]


def test_two_devices_may_change_places_and_keep_their_sessions() -> None:
    made, state = picture(), State(None, OWN_KEY)
    state.load(made.whole(whole(put(1, 1), put(2, 2)), NOW), NOW)
    for number, address in ((1, "10.8.0.2"), (2, "10.8.0.1")):
        taken = made.take(PeerPut(put(number, number, address)), NOW)
        assert isinstance(taken, tuple)
        for change in taken:
            state.change(change.body, NOW)
    assert not state.roster.refused
    assert state.desired(NOW)[key(1)].allowed_ips == prefixes("10.8.0.2/32")
    assert state.desired(NOW)[key(2)].preshared_key == psk(2)
    assert not state.ends


def test_who_is_barred_is_refused_whether_told_alone_or_with_the_whole() -> None:
    made = picture()
    made.barred = lambda peer: peer.public_key == key(1)
    [one, other] = made.whole(whole(put(1, 1), put(2, 2)), NOW).peers
    assert (one.fault, other.fault) == (Refusal.NOT_GUARDED, None)
    [body] = bodies(made.take(PeerPut(put(1, 3)), NOW))
    assert body.peer.fault is Refusal.NOT_GUARDED


def test_a_peer_that_is_refused_takes_nobody_away() -> None:
    made = picture(put(1, 1))
    broken = put(5, 5, "10.8.0.1", fault=Refusal.INVALID_KEEPALIVE)
    assert bodies(made.take(PeerPut(broken), NOW)) == [PeerUpserted(broken)]


def test_who_is_not_listed_need_not_be_taken_away() -> None:
    assert picture(put(1, 1)).take(PeerGone(key(2)), NOW) == ()


def test_a_deleted_location_takes_everybody_away_and_keeps_the_rest() -> None:
    made = picture(put(1, 1), put(2))
    assert bodies(made.take(LocationGone(), NOW)) == [PeerRemoved(key(1)), PeerRemoved(key(2))]


def test_settings_without_peers_change_the_settings_and_leave_a_doubt() -> None:
    made = picture(put(1, 1))
    settled = Configuration("hq", None, InterfaceSettings(mtu=1380), ())
    [body] = bodies(made.take(LocationPut(settled), NOW))
    assert isinstance(body, LocationChanged)
    assert body.interface == InterfaceSettings(mtu=1380)
    assert made.in_doubt
    made.whole(whole(put(1, 1)), NOW)
    assert not made.in_doubt


def test_where_mfa_is_required_nobody_is_exempt() -> None:
    made = Picture("e1", "7", mfa_required=True)
    [one] = made.whole(whole(put(1)), NOW).peers
    assert not one.mfa_exempt


Step = tuple[str, int, int | None]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "moved", "gone", "whole"]),
        st.integers(1, 6),
        st.one_of(st.none(), st.integers(1, 4)),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=150)
@given(STEPS)
def test_updates_lead_to_what_the_whole_would_have(steps: list[Step]) -> None:
    """Whoever followed all updates lists and lets in whom a newcomer would that is told the whole."""
    made, state = Picture("e1", "7", mfa_required=False), State(None, OWN_KEY)
    core: dict[int, Peer] = {}
    psks = 0
    state.load(made.whole(whole(), NOW), NOW)
    for kind, number, secret in steps:
        taken: Snapshot | tuple[Change, ...]
        if kind in {"put", "moved"}:
            # Each grant has a fresh PSK, as core makes it.
            psks += secret is not None
            owner = number + 10 if kind == "moved" else number
            one = put(owner, None if secret is None else psks, f"10.8.0.{number}")
            core[number] = one
            taken = made.take(PeerPut(one), NOW)
        elif kind == "gone":
            gone = core.pop(number, None)
            taken = made.take(PeerGone(key(number) if gone is None else gone.public_key), NOW)
        else:
            taken = made.whole(whole(*core.values()), NOW)
        if isinstance(taken, Snapshot):
            state.load(taken, NOW)
        else:
            for change in taken:
                state.change(change.body, NOW)
    newcomer = State(None, OWN_KEY)
    newcomer.load(Picture("e2", "7", mfa_required=False).whole(whole(*core.values()), NOW), NOW)
    wanted = {k: (w.preshared_key, w.allowed_ips) for k, w in state.desired(NOW).items()}
    assert wanted == {k: (w.preshared_key, w.allowed_ips) for k, w in newcomer.desired(NOW).items()}
    # Of a device whose key was changed the old one is refused until the whole is told.
    known = {peer.public_key for peer in core.values()}
    assert {k: peer for k, peer in made.peers.items() if k in known} == {
        p.public_key: p for p in core.values()
    }
    assert set(state.roster.refused) == made.peers.keys() - known
