import base64
import ipaddress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.encoding import (
    clean_name,
    format_key,
    format_time,
    network_of,
    parse_interface_address,
    parse_key,
    parse_prefix,
    parse_preshared_key,
    parse_public_key,
    parse_time,
)
from agent.model import Prefix

KEY = base64.b64encode(bytes(range(1, 33))).decode()


@given(st.binary(min_size=32, max_size=32))
def test_a_key_comes_back_from_its_44_characters(raw: bytes) -> None:
    text = format_key(raw)
    assert (len(text), text, parse_key(text)) == (44, base64.b64encode(raw).decode(), raw)


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        KEY.encode(),
        "",
        KEY[:-1],
        KEY + "=",
        KEY + "\n",
        " " + KEY[:-1],
        KEY[:20] + "\n" + KEY[20:-1],
        KEY[:20] + "-" + KEY[21:],
        KEY[:20] + "_" + KEY[21:],
        KEY[:20] + "=" + KEY[21:],
        KEY[:43] + "A",
        KEY[:42] + "==",
        KEY[:42] + chr(ord(KEY[42]) + 1) + "=",  # the same bytes, not canonical
        "é" + KEY[1:],
        "A" * 44,
        "=" * 44,
        "\0" * 44,
    ],
)
def test_a_key_that_does_not_encode_back_to_itself_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_key(text)


_keys = st.binary(min_size=32, max_size=32).map(lambda raw: base64.b64encode(raw).decode())
_nearly_keys = st.builds(
    lambda key, at, odd: key[:at] + odd + key[at + 1 :],
    _keys,
    st.integers(0, 44),
    st.sampled_from("AEIMQUYcgkosw048BZz19+/=-_ \né"),
)


@given(_keys | _nearly_keys | st.text(max_size=50))
@example(KEY)
def test_whatever_is_taken_for_a_key_is_one(text: str) -> None:
    try:
        raw = parse_key(text)
    except ValueError:
        return
    assert len(raw) == 32
    assert format_key(raw) == text


def test_the_all_zero_key_is_neither_a_psk_nor_a_public_key() -> None:
    zero = format_key(bytes(32))
    for parse in (parse_preshared_key, parse_public_key):
        with pytest.raises(ValueError, match="zero"):
            parse(zero)


def test_a_good_key_is_taken_as_either() -> None:
    assert parse_public_key(KEY) == bytes(range(1, 33))
    assert parse_preshared_key(KEY).raw == bytes(range(1, 33))


@pytest.mark.parametrize("bad", [None, "", "A" * 43, format_key(bytes(32)), KEY[:-2]])
def test_a_bad_psk_never_becomes_no_psk(bad: object) -> None:
    with pytest.raises(ValueError):
        parse_preshared_key(bad)


@pytest.mark.parametrize("parse", [parse_key, parse_prefix, parse_time, parse_interface_address])
def test_an_error_does_not_quote_the_input(parse: type) -> None:
    with pytest.raises(ValueError) as caught:
        parse("s3cret-s3cret")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "packed", "length"),
    [
        ("10.8.0.5/32", b"\x0a\x08\x00\x05", 32),
        ("10.8.0.5", b"\x0a\x08\x00\x05", 32),
        ("10.8.0.0/16", b"\x0a\x08\x00\x00", 16),
        ("0.0.0.0/0", bytes(4), 0),
        ("::/0", bytes(16), 0),
        ("fd00:8::5", b"\xfd\x00\x00\x08" + bytes(11) + b"\x05", 128),
        ("FD00:0008::/32", b"\xfd\x00\x00\x08" + bytes(12), 32),
        ("10.8.0.6/31", b"\x0a\x08\x00\x06", 31),
    ],
)
def test_a_prefix_is_read_and_a_bare_address_is_one_host(text: str, packed: bytes, length: int) -> None:
    assert parse_prefix(text) == Prefix(packed, length)


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"10.0.0.0/8",
        8,
        "",
        "/",
        "/8",
        "10.0.0.1/8",
        "10.8.0.5/31",
        "fd00::1/64",
        "fd00:0:0:0:8000::/64",
        "10.0.0.0/33",
        "::/129",
        "10.0.0.0/-1",
        "10.0.0.0/+8",
        "10.0.0.0/08",
        "10.0.0.0/ 8",
        "10.0.0.0/8 ",
        "10.0.0.0/",
        "10.0.0.0/8/8",
        "10.0.0.0/255.0.0.0",
        "10.0.0.0/٨",
        "10.0.0",
        "10.1",
        "010.0.0.1",
        "0x0a.0.0.1",
        "167772161",
        " 10.0.0.1",
        "10.0.0.1\n",
        "10.0.0.1\0",
        "fe80::1%eth0",
        "fe80::%1/64",
        "::ffff:10.0.0.1",
        "::ffff:10.0.0.1/128",
        "::ffff:0:0/96",
        "::ffff:a00:0/104",
        "[fd00::1]",
        "localhost",
        "\ud800",
    ],
)
def test_host_bits_zones_mapped_addresses_and_nonsense_are_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_prefix(text)


@given(st.ip_addresses(), st.integers(0, 128))
def test_a_prefix_is_taken_exactly_if_a_strict_network_is(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, length: int
) -> None:
    text = f"{address}/{length}"
    try:
        network = ipaddress.ip_network(text, strict=True)
    except ValueError:
        with pytest.raises(ValueError):
            parse_prefix(text)
        return
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped and length >= 96:
        with pytest.raises(ValueError):
            parse_prefix(text)
        return
    prefix = parse_prefix(text)
    assert (prefix.packed, prefix.length) == (network.network_address.packed, network.prefixlen)
    assert parse_prefix(str(prefix)) == prefix


def test_an_interface_address_keeps_its_host_bits() -> None:
    assert str(parse_interface_address("10.8.0.1/24")) == "10.8.0.1/24"
    assert str(parse_interface_address("fd00:8::1/64")) == "fd00:8::1/64"
    assert str(parse_interface_address("10.8.0.1")) == "10.8.0.1/32"


@pytest.mark.parametrize("text", ["::ffff:10.0.0.1/128", "10.8.0.1/33", "fe80::1%lo/64", None, "10.8.0/24"])
def test_an_interface_address_is_read_as_strictly(text: object) -> None:
    with pytest.raises(ValueError):
        parse_interface_address(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("2026-11-24T03:00:00.000Z", 1_795_489_200.0),
        ("2026-11-24t03:00:00z", 1_795_489_200.0),
        ("2026-11-24T05:30:00+02:30", 1_795_489_200.0),
        ("2026-11-23T22:00:00-05:00", 1_795_489_200.0),
        ("2026-11-24T03:00:00.5Z", 1_795_489_200.5),
        ("2026-11-24T03:00:00.123456789Z", 1_795_489_200.123456),
        ("2024-02-29T00:00:00Z", 1_709_164_800.0),
    ],
)
def test_a_time_is_read_with_its_offset(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds, abs=2e-6)


@pytest.mark.parametrize(
    "text",
    [
        None,
        1_795_489_200,
        "",
        "2026-11-24T03:00:00",
        "2026-11-24",
        "2026-11-24 03:00:00Z",
        "20261124T030000Z",
        "2026-W48-2T03:00:00Z",
        "2026-11-24T03:00Z",
        "2026-11-24T03:00:00.Z",
        "2026-11-24T03:00:00,5Z",
        "2026-11-24T03:00:00+02",
        "2026-11-24T03:00:00+0230",
        "2026-11-24T03:00:00+02:30:10",
        "2026-11-24T03:00:00 Z",
        "2026-11-24T03:00:00Z\n",
        " 2026-11-24T03:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-02-29T00:00:00Z",
        "2026-11-24T24:00:00Z",
        "2026-11-24T03:60:00Z",
        "2026-11-24T23:59:60Z",
        "2026-11-24T03:00:00+24:00",
        "2026-11-24T03:00:00+02:60",
        "2026-11-24T03:00:00+23:99",
        "٢٠٢٦-11-24T03:00:00Z",
        "1969-12-31T23:59:59Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59-23:59",
        "+2026-11-24T03:00:00Z",
    ],
)
def test_a_time_without_an_offset_out_of_range_or_not_of_rfc_3339_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_time(text)


@given(st.integers(0, 23), st.characters())
def test_a_time_of_the_usual_length_is_read_like_any_other(place: int, character: str) -> None:
    usual = "2026-11-24T03:00:00.000Z"
    text = usual[:place] + character + usual[place + 1 :]
    try:
        expected = parse_time(text.replace("Z", "+00:00"))
    except ValueError:
        with pytest.raises(ValueError, match="time"):
            parse_time(text)
    else:
        assert parse_time(text) == expected


@given(
    st.integers(86_400, 220_000_000_000),
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
)
def test_a_time_means_the_same_moment_at_every_offset(seconds: int, minutes: int) -> None:
    there = datetime.fromtimestamp(seconds, UTC).astimezone(timezone(timedelta(minutes=minutes)))
    assert parse_time(there.isoformat()) == seconds


@given(st.integers(0, 200_000_000_000_000))
@example(1_795_489_200_000)
def test_a_written_time_is_utc_with_milliseconds_and_reads_back(milliseconds: int) -> None:
    text = format_time(milliseconds / 1000)
    assert text.endswith("Z")
    assert parse_time(text) == pytest.approx(milliseconds / 1000, abs=0.0011)


@given(st.text() | st.integers() | st.none() | st.binary())
@example("\ud800" * 100)
@example("\U0010ffff" * 64)
def test_a_name_never_refuses_and_is_at_most_64_printable_characters(name: object) -> None:
    shown = clean_name(name)
    assert len(shown) <= 64
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("alice-laptop", "alice-laptop"),
        ("Zoë 笔记本", "Zoë 笔记本"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("evil\u202egnp", "evil\\u202egnp"),
        ("x" * 70, "x" * 64),
        (None, ""),
        (["a"], ""),
    ],
)
def test_a_name_is_cut_and_its_control_characters_escaped(name: object, shown: str) -> None:
    assert clean_name(name) == shown


def test_the_network_of_an_address_has_its_host_bits_cleared() -> None:
    networks = {
        "10.8.0.1/16": "10.8.0.0/16",
        "10.8.77.255/31": "10.8.77.254/31",
        "192.0.2.7": "192.0.2.7/32",
        "192.0.2.7/0": "0.0.0.0/0",
        "fd00:8::1/64": "fd00:8::/64",
        "fd00:8:ffff::1/33": "fd00:8:8000::/33",
    }
    for address, network in networks.items():
        assert str(network_of(parse_interface_address(address))) == network
