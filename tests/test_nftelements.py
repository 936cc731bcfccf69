"""Elements of nftables' sets as the kernel's messages; a real kernel takes them in tests/firewall."""

import struct
from collections.abc import Iterable, Iterator
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.nftelements import (
    CATCH_ALL,
    ElementChange,
    ElementListing,
    ListingInterruptedError,
    Verb,
    outcome,
    transaction,
)

lives = st.none() | st.integers(1, 99_999_999_000)
elements_of_one_set = st.sampled_from([4, 16]).flatmap(
    lambda width: st.dictionaries(st.binary(min_size=width, max_size=width), lives)
)
changes = st.builds(
    ElementChange, st.sampled_from(Verb), st.sampled_from(["a", "session4_32"]), elements_of_one_set
)
Said = tuple[int, str, dict[bytes, int | None]]


def together(said: Iterable[Said]) -> list[tuple[int, str, list[tuple[bytes, int | None]]]]:
    """What is said of one set in one breath, in however many messages."""
    return [
        (verb, name, sorted((pair for *_, part in parts for pair in part.items()), key=str))
        for (verb, name), parts in groupby(said, key=lambda one: one[:2])
    ]


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """What a run of netlink attributes holds; nothing may be left over."""
    at = 0
    while at < len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        assert size >= 4
        yield kind & 0x3FFF, data[at + 4 : at + size]
        at += (size + 3) & ~3
    assert at == len(data)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, flags, number and attributes of each message."""
    at = 0
    while at < len(data):
        length, kind, flags, number, port, family, version, resource = struct.unpack_from(
            "=IHHIIBBH", data, at
        )
        assert (port, family, version) == (0, 1, 0)
        assert resource == (struct.unpack("=H", struct.pack(">H", 10))[0] if kind in {0x10, 0x11} else 0)
        yield kind, flags, number, data[at + 20 : at + length]
        assert length % 4 == 0
        at += length
    assert at == len(data)


def element(data: bytes) -> tuple[bytes, int | None]:
    members = dict(attributes(data))
    [(value, key)] = attributes(members.pop(1))
    assert value == 1
    life = members.pop(4, None)
    assert members == {}
    return key, None if life is None else int.from_bytes(life, "big")


@given(st.lists(changes, max_size=5), st.integers(1, 1 << 31))
def test_a_transaction_says_what_it_was_asked_to(asked: list[ElementChange], first: int) -> None:
    data, last = transaction("wg_agent_wg0", asked, first)
    begin, *middle, end = messages(data)
    assert (begin[0], end[0]) == (0x10, 0x11)
    assert [number for _, _, number, _ in middle] == list(range(first, last + 1))
    said: list[Said] = []
    for kind, flags, number, body in middle:
        (one, table), (two, name), (three, elements) = attributes(body)
        assert (one, two, three, table) == (1, 2, 3, b"wg_agent_wg0\0")
        assert flags == 1 | (0x400 if kind & 0xFF == Verb.ADD else 0) | (4 if number == last else 0)
        assert kind >> 8 == 10
        listed = list(attributes(elements))
        assert {kind for kind, _ in listed} == {1}
        said.append((kind & 0xFF, name.rstrip(b"\0").decode(), dict(element(raw) for _, raw in listed)))
    assert together(said) == together((c.verb, c.set, dict(c.elements)) for c in asked if c.elements)


def test_more_elements_than_an_attribute_holds_go_into_several_messages() -> None:
    many = {number.to_bytes(16, "big"): 1000 for number in range(5000)}
    data, last = transaction("t", [ElementChange(Verb.ADD, "s", many)], 7)
    _, *middle, _ = messages(data)
    assert last == 7 + len(middle) - 1 > 7
    assert all(len(body) < 1 << 16 for _, _, _, body in middle)
    assert sum(len(list(attributes(dict(attributes(body))[3]))) for _, _, _, body in middle) == 5000


def answer(number: int, code: int, *, kind: int = 2) -> bytes:
    return struct.pack("=IHHIIi", 36, kind, 0, number, 0, code) + bytes(16)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (answer(9, 0), 0),
        (answer(8, 0), None),
        (answer(7, -2), 2),
        (answer(9, -17), 17),
        (answer(8, -2) + answer(9, -2), 2),
        (answer(6, -2), None),
        (answer(10, -2), None),
        (answer(6, -2) + answer(9, 0), 0),
        (answer(9, -2, kind=3), None),
        (answer(9, 0)[:15], None),
        (b"", None),
        (bytes(32), None),
    ],
)
def test_an_outcome_is_that_of_the_transactions_own_messages(data: bytes, said: int | None) -> None:
    assert outcome(data, 7, 9) == said


def listed(key: bytes, left: int | None, *, life: bool = True, more: bytes = b"", flag: int = 0) -> bytes:
    """An element as the kernel lists it; ``more`` is what another kernel may tell besides."""
    value = struct.pack("=HH", 4 + len(key), 1) + key
    inner = struct.pack("=HH", 4 + len(value), 1 | flag) + value
    if left is not None and life:
        inner += struct.pack("=HH", 12, 4) + (90_000).to_bytes(8, "big")
    if left is not None:
        inner += struct.pack("=HH", 12, 5) + left.to_bytes(8, "big")
    inner += more
    return struct.pack("=HH", 4 + len(inner), 1 | flag) + inner


def listing(*elements: bytes, number: int = 7, flags: int = 2) -> bytes:
    nest = b"".join(elements)
    body = struct.pack("=HH2s2x", 6, 1, b"t\0") + struct.pack("=HH2s2x", 6, 2, b"s\0")
    body += struct.pack("=HH", 4 + len(nest), 3) + nest
    return struct.pack("=IHHIIBBH", 20 + len(body), 10 << 8 | 12, flags, number, 0, 1, 0, 0) + body


def done(code: int = 0, kind: int = 3) -> bytes:
    return struct.pack("=IHHIIi", 20, kind, 2, 7, 0, code)


listed_keys = st.sampled_from([4, 16]).flatmap(
    lambda width: st.dictionaries(
        st.binary(min_size=width, max_size=width), st.none() | st.integers(1, 1 << 40), max_size=6
    )
)


@given(st.lists(listed_keys, max_size=3), st.booleans(), st.booleans(), st.booleans())
def test_a_listing_of_elements_is_read_however_the_kernel_words_it(
    parts: list[dict[bytes, int | None]], life: bool, more: bool, flagged: bool
) -> None:
    said = ElementListing(7)
    extra = struct.pack("=HHI", 8, 3, 0) if more else b""
    flag = 0x8000 if flagged else 0
    expected: dict[bytes, float | None] = {}
    for part in parts:
        elements = [listed(k, left, life=life, more=extra, flag=flag) for k, left in part.items()]
        assert said.feed(listing(*elements) + listing(listed(b"none", 5), number=8)) is None
        expected |= {key: None if left is None else left / 1000 for key, left in part.items()}
    assert said.feed(done()) == 0
    assert said.elements == expected


def test_an_element_for_everything_has_the_empty_key() -> None:
    said = ElementListing(7)
    said.feed(listing(struct.pack("=HHHH", 16, 1, 12, 5) + (5000).to_bytes(8, "big"), listed(b"abcd", 7)))
    assert said.elements == {CATCH_ALL: 5.0, b"abcd": 0.007}


def test_a_listing_that_fails_or_was_interrupted_is_not_taken_for_a_whole_one() -> None:
    assert ElementListing(7).feed(done(-2, kind=2)) == 2
    assert ElementListing(7).feed(done(-12)) == 12
    with pytest.raises(ListingInterruptedError):
        ElementListing(7).feed(listing(listed(b"abcd", 5), flags=0x12))
    for cut in (21, 35, 50):
        with pytest.raises(ValueError, match=r"cut off|length"):
            ElementListing(7).feed(listing(listed(b"abcd", 5), listed(b"abce", 5))[:cut])
