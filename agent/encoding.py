"""Text forms of keys, prefixes and times, read strictly and written in one way.

The standard parsers are lenient (base64 skips junk and takes non-canonical keys, ``fromisoformat``
takes times without an offset), so each value is checked to be exactly what it says it is.
All parsers raise ValueError with a short reason that does not quote the input.
"""

from __future__ import annotations

import binascii
import math
import re
import socket
from datetime import UTC, datetime
from typing import Final

from agent.model import (
    KEY_SIZE,
    InterfaceAddress,
    Prefix,
    PresharedKey,
    PublicKey,
)

KEY_TEXT_SIZE: Final = 44
NAME_SIZE: Final = 64
V4_MAPPED: Final = bytes(10) + b"\xff\xff"
# RFC 3339, section 5.6: full-date "T" full-time, the offset required.
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-5][0-9])",
    re.ASCII,
)
_LENGTHS: Final = {str(length): length for length in range(129)}
# A time beyond these is a fault of the sender, not a date that a session can have.
EARLIEST: Final = 0.0
LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC).timestamp()


def parse_key(text: object) -> bytes:
    """Return the 32 raw bytes of a key in base64: 44 characters that encode back to themselves."""
    if not isinstance(text, str) or len(text) != KEY_TEXT_SIZE or not text.isascii():
        raise ValueError("a key is 44 characters of base64")
    try:
        raw = binascii.a2b_base64(text)
    except binascii.Error:
        raise ValueError("a key is 44 characters of base64") from None
    if len(raw) != KEY_SIZE or format_key(raw) != text:
        raise ValueError("a key is 32 bytes in canonical base64")
    return raw


def parse_public_key(text: object) -> PublicKey:
    """Return a peer's public key; the all-zero key is none."""
    raw = parse_key(text)
    if not any(raw):
        raise ValueError("the all-zero key is not a public key")
    return PublicKey(raw)


def parse_preshared_key(text: object) -> PresharedKey:
    """Return a PSK; the all-zero key, which means "no PSK" to WireGuard, is none."""
    return PresharedKey(parse_key(text))


def format_key(raw: bytes) -> str:
    """Return a raw key as the 44 characters that WireGuard's tools show."""
    return binascii.b2a_base64(raw, newline=False).decode("ascii")


def _parse_network(text: object) -> tuple[bytes, int]:
    if not isinstance(text, str):
        raise ValueError("a prefix is a string")
    address, slash, length_text = text.partition("/")
    try:
        if ":" in address:
            packed, bits = socket.inet_pton(socket.AF_INET6, address), 128
        else:
            packed, bits = socket.inet_pton(socket.AF_INET, address), 32
    except (OSError, ValueError, UnicodeError):
        raise ValueError("not an IP address") from None
    if not slash:
        return packed, bits
    length = _LENGTHS.get(length_text)
    if length is None or length > bits:
        raise ValueError("not a prefix length")
    return packed, length


def parse_prefix(text: object) -> Prefix:
    """Return a CIDR prefix; a bare address is one host.

    Host bits, zones and IPv4-mapped addresses are faults.
    """
    return check_prefix(Prefix(*_parse_network(text)))


def check_prefix(prefix: Prefix) -> Prefix:
    """Return the prefix; ValueError if it has host bits, or is none."""
    packed, length = prefix
    bits = len(packed) * 8
    if length == bits == 32:
        return prefix
    if bits not in {32, 128} or not 0 <= length <= bits:
        raise ValueError("not a prefix")
    if length != bits and int.from_bytes(packed, "big") & ((1 << (bits - length)) - 1):
        raise ValueError("the prefix has host bits set")
    if bits == 128 and length >= 96 and packed[:12] == V4_MAPPED:
        raise ValueError("an IPv4-mapped address is not a prefix of its own")
    return prefix


def parse_interface_address(text: object) -> InterfaceAddress:
    """Return an address of the interface with its network's length (a bare address: one host)."""
    packed, length = _parse_network(text)
    if packed[:12] == V4_MAPPED and len(packed) == 16:
        raise ValueError("an IPv4-mapped address is not an interface address")
    return InterfaceAddress(packed, length)


def network_of(address: InterfaceAddress) -> Prefix:
    """Return the network that an address of the interface is in."""
    packed, length = address
    host_bits = len(packed) * 8 - length
    number = int.from_bytes(packed, "big") >> host_bits << host_bits
    return Prefix(number.to_bytes(len(packed), "big"), length)


def parse_time(text: object) -> float:
    """Return an RFC 3339 time as Unix seconds; one without an offset or out of range is a fault."""
    if not isinstance(text, str):
        raise ValueError("a time is RFC 3339 with an offset")
    # Nearly every time is written as 2026-11-24T03:00:00.000Z; that the rest are digits the parser sees.
    usual = len(text) == 24 and text[4:20:3] == "--T::." and text[23] == "Z"
    if not usual and not _TIME.fullmatch(text):
        raise ValueError("a time is RFC 3339 with an offset")
    try:
        seconds = datetime.fromisoformat(text if usual else text.upper()).timestamp()
    except (ValueError, OverflowError):
        raise ValueError("a time that does not exist") from None
    if not math.isfinite(seconds) or not EARLIEST <= seconds < LATEST:
        raise ValueError("a time out of range")
    return seconds


def format_time(seconds: float) -> str:
    """Return Unix seconds as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_span(seconds: float) -> str:
    """A duration in its two largest units, rounded down: ``45s``, ``3m05s``, ``2h14m``, ``3d04h``."""
    whole = max(0, int(seconds))
    for unit, size, below, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02}{below}"
    return f"{whole}s"


def clean_name(text: object) -> str:
    """Return a name from core that is safe to show: at most 64 characters, control characters escaped.

    A name never refuses a peer: what is not a string becomes the empty name.
    """
    if not isinstance(text, str):
        return ""
    if len(text) <= NAME_SIZE and text.isprintable():
        return text
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text[:NAME_SIZE]
    )
    return shown[:NAME_SIZE]
