"""Values of the model for Hypothesis."""

from hypothesis import strategies as st

from agent.model import (
    KEEP,
    AddPeer,
    CutPeer,
    Endpoint,
    ObservedPeer,
    Operation,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)

keys = st.binary(min_size=32, max_size=32).map(PublicKey)
psks = st.binary(min_size=32, max_size=32).filter(any).map(PresharedKey)
v4_prefixes = st.builds(Prefix, st.binary(min_size=4, max_size=4), st.integers(0, 32))
v6_prefixes = st.builds(Prefix, st.binary(min_size=16, max_size=16), st.integers(0, 128))
prefix_lists = st.one_of(
    st.tuples(v4_prefixes),
    st.tuples(v4_prefixes, v6_prefixes),
    st.lists(st.one_of(v4_prefixes, v6_prefixes), max_size=6).map(tuple),
)
u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
u63 = st.integers(0, 2**63 - 1)
endpoints = st.one_of(
    st.builds(Endpoint, st.binary(min_size=4, max_size=4), u16, st.just(0)),
    st.builds(Endpoint, st.binary(min_size=16, max_size=16), u16, u32),
)
adds: st.SearchStrategy[AddPeer] = st.builds(AddPeer, keys, st.none() | psks, prefix_lists)
operations: st.SearchStrategy[Operation] = st.one_of(
    adds,
    st.builds(RemovePeer, keys),
    st.builds(CutPeer, keys),
    st.builds(
        UpdatePeer,
        keys,
        st.just(KEEP) | st.none() | psks,
        st.just(KEEP) | prefix_lists,
        st.booleans(),
        st.just(KEEP) | u16,
    ),
)


@st.composite
def observed_peers(draw: st.DrawFn) -> ObservedPeer:
    seconds, nanoseconds = draw(st.tuples(st.integers(0, 2**40), st.integers(0, 999_999_999)))
    return ObservedPeer(
        draw(keys),
        draw(st.none() | psks),
        draw(prefix_lists),
        draw(st.none() | endpoints),
        draw(u16),
        seconds + nanoseconds / 1e9,
        draw(u63),
        draw(u63),
    )
