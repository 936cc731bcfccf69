from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.stream import EventParser, Heartbeat, ServerEvent
from agent.errors import InvalidMessage

STREAM = (
    b"\xef\xbb\xbf: hello\n\nretry: 3000\n\n"
    b"event: peer_removed\nid: e:1\ndata: {}\n\n"
    b":\r\n\r\nevent:resync\r\nid:e:2\r\ndata:{\r\ndata: }\r\n\r\n"
    b"data: x\rid: e:3\r\r"
    b"nonsense\nevent: last\n\n"
    b"event: unfinished\ndata: {}\n"
)
EVENTS = [
    Heartbeat(),
    ServerEvent("peer_removed", "e:1", b"{}"),
    Heartbeat(),
    ServerEvent("resync", "e:2", b"{\n}"),
    ServerEvent("", "e:3", b"x"),
    ServerEvent("last", "", b""),
]


def test_a_stream_is_taken_apart_as_the_standard_says() -> None:
    assert EventParser().feed(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM))))
def test_where_the_bytes_are_cut_makes_no_difference(cuts: list[int]) -> None:
    parser = EventParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = []
    for begin, end in itertools.pairwise(edges):
        found += parser.feed(STREAM[begin:end])
    assert found == EVENTS


@given(st.lists(st.binary() | st.text("\r\n: \ufeffdatideventry").map(str.encode)))
def test_arbitrary_bytes_are_taken_apart_alike_in_whatever_pieces_they_come(chunks: list[bytes]) -> None:
    parser = EventParser()
    found = [item for chunk in chunks for item in parser.feed(chunk)]
    assert found == EventParser().feed(b"".join(chunks))


def test_an_event_without_an_id_does_not_inherit_one() -> None:
    found = EventParser().feed(b"event: a\nid: e:1\ndata: 1\n\nevent: a\ndata: 2\n\n")
    assert found == [ServerEvent("a", "e:1", b"1"), ServerEvent("a", "", b"2")]


@pytest.mark.parametrize(
    "event",
    [
        b"data: " + b"x" * 200 + b"\n\n",
        b"data: " + b"x" * 200,
        b": " + b"x" * 200,
        b"data: xxxxxxxx\n" * 20,
        b"unknown: xxxxxxxx\n" * 20,
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_event_over_the_limit_is_refused_before_it_is_held(event: bytes, size: int) -> None:
    parser = EventParser(100)
    pieces = [event[begin : begin + size] for begin in range(0, len(event), size)]
    with pytest.raises(InvalidMessage, match="100 bytes"):
        deque(map(parser.feed, pieces), maxlen=0)


def test_the_limit_is_an_events_and_not_the_streams() -> None:
    parser = EventParser(100)
    for _ in range(50):
        assert parser.feed(b"event: a\ndata: xxxxxxxxxxxxxxxxxxxxxxxx\n\n: beat\n")
