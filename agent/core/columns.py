"""A list of peers read by column: of a thousand entries all keys at once, then all prefixes, all times.

Nearly all entries of a large list look alike, and what Python does for each of them is most of a cold sync
(``cold_sync_10k``). So the usual is read in few calls of C; a list with anything else in it is not read here.
"""

from __future__ import annotations

import binascii
import operator
import socket
import struct
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain, repeat
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from agent.encoding import (
    EARLIEST,
    KEY_TEXT_SIZE,
    LATEST,
    NAME_SIZE,
    V4_MAPPED,
    parse_prefix,
)
from agent.model import KEY_SIZE, Grant, Peer, Prefix, PresharedKey, PublicKey

ID_SIZE: Final = 128
_KEYS: Final = struct.Struct(f"{KEY_SIZE}sx")
_NO_KEY: Final = bytes(KEY_SIZE)
_TIME_MARKS: Final = {
    size: ((4, "-"), (7, "-"), (10, "T"), (13, ":"), (16, ":"), (19, "Z" if size == 20 else "."), (-1, "Z"))
    for size in (20, 24, 27)
}
"""Where 2026-11-24T03:00:00.000Z has what, by its size; the rest are digits, which the parser sees to."""


class UnusualError(Exception):
    """Something in the list is not as usual: wrong, or only written in another way."""


class _Session(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    id: str
    preshared_key: str
    granted_at: str
    expires_at: str


class _Entry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    public_key: str
    allowed_ips: list[str]
    name: str | UnsetType = UNSET
    persistent_keepalive: int | UnsetType | None = UNSET
    mfa_exempt: bool | UnsetType | None = UNSET
    preshared_key: str | UnsetType | None = UNSET
    session: _Session | UnsetType | None = UNSET


_DECODER: Final = msgspec.json.Decoder(list[_Entry])


def read_peers(text: bytes) -> list[Peer]:
    """Read a JSON list of entries of the peer list, all of them faultless; raises UnusualError otherwise."""
    try:
        entries = _DECODER.decode(text)
        if text.count(b'"') != _quotes(entries):
            raise UnusualError
        return _peers(entries)
    except (ValueError, OSError, RecursionError):
        # Their own words may hold a PSK.
        pass
    raise UnusualError


def _quotes(entries: Sequence[_Entry]) -> int:
    """How many quotes the entries are written with, if none repeats a key or has a quote in a string."""
    count = sum(6 + 2 * len(entry.allowed_ips) for entry in entries)
    count += sum(4 for entry in entries if entry.name is not UNSET)
    count += sum(2 for entry in entries if entry.persistent_keepalive is not UNSET)
    count += sum(2 for entry in entries if entry.mfa_exempt is not UNSET)
    count += sum(4 if entry.preshared_key else 2 for entry in entries if entry.preshared_key is not UNSET)
    return count + sum(18 if entry.session else 2 for entry in entries if entry.session is not UNSET)


def _peers(entries: Sequence[_Entry]) -> list[Peer]:
    keys = _keys([entry.public_key for entry in entries])
    names = [entry.name or "" for entry in entries]
    keepalives = [entry.persistent_keepalive or 0 for entry in entries]
    if not all(map(str.isprintable, names)) or max(map(len, names), default=0) > NAME_SIZE:
        raise UnusualError
    if not 0 <= min(keepalives, default=0) <= max(keepalives, default=0) <= 65_535:
        raise UnusualError
    statics: Iterable[PresharedKey | None] = repeat(None)
    if any(entry.preshared_key for entry in entries):
        given = iter(_preshared_keys([entry.preshared_key for entry in entries if entry.preshared_key]))
        statics = [next(given) if entry.preshared_key else None for entry in entries]
    sessions = [entry.session for entry in entries if entry.session]
    grants: Iterable[Grant | None] = _grants(sessions)
    if len(sessions) != len(entries):
        some = iter(grants)
        grants = [next(some) if entry.session else None for entry in entries]
    columns = zip(
        keys,
        _allowed_ips([entry.allowed_ips for entry in entries]),
        names,
        keepalives,
        [entry.mfa_exempt is True for entry in entries],
        statics,
        grants,
        repeat(None),
        repeat(None),
        repeat(False),
    )
    return list(map(tuple.__new__, repeat(Peer), columns))


def _keys(texts: Sequence[str]) -> list[PublicKey]:
    """Decode keys, each 32 bytes that are not all zero in canonical base64."""
    joined = "".join(texts)
    if not set(map(len, texts)) <= {KEY_TEXT_SIZE} or joined.count("=") != len(texts):
        raise UnusualError
    if joined[KEY_TEXT_SIZE - 1 :: KEY_TEXT_SIZE].count("=") != len(texts):
        raise UnusualError
    # Padded by six more bits of zeros in the text, and so with a zero byte behind each key; what else is in
    # that byte are bits that the canonical form has not.
    raw = binascii.a2b_base64(joined.replace("=", "A"), strict_mode=True)
    if raw[KEY_SIZE :: KEY_SIZE + 1].count(0) != len(texts):
        raise UnusualError
    keys = [PublicKey(key) for (key,) in _KEYS.iter_unpack(raw)]
    if _NO_KEY in keys:
        raise UnusualError
    return keys


def _preshared_keys(texts: Sequence[str]) -> list[PresharedKey]:
    return list(map(PresharedKey, _keys(texts)))


def _grants(sessions: Sequence[_Session]) -> list[Grant]:
    ids = [session.id for session in sessions]
    if not all(map(str.isprintable, ids)) or not set(map(len, ids)) <= _ID_SIZES:
        raise UnusualError
    granted_at = _times([session.granted_at for session in sessions])
    expires_at = _times([session.expires_at for session in sessions])
    if not all(map(operator.lt, granted_at, expires_at)):
        raise UnusualError
    preshared_keys = _preshared_keys([session.preshared_key for session in sessions])
    return list(map(Grant, ids, preshared_keys, granted_at, expires_at))


_ID_SIZES: Final = frozenset(range(1, ID_SIZE + 1))


def _times(texts: Sequence[str]) -> list[float]:
    """Read times that are written as nearly all are, and all alike, as Unix seconds."""
    if not texts:
        return []
    joined, size = "".join(texts), len(texts[0])
    if len(set(map(len, texts))) > 1 or size not in _TIME_MARKS:
        raise UnusualError
    if any(joined[at % size :: size].count(mark) != len(texts) for at, mark in _TIME_MARKS[size]):
        raise UnusualError
    seconds = list(map(datetime.timestamp, map(datetime.fromisoformat, texts)))
    if not EARLIEST <= min(seconds) <= max(seconds) < LATEST:
        raise UnusualError
    return seconds


def _allowed_ips(lists: Sequence[list[str]]) -> list[tuple[Prefix, ...]]:
    """Read lists of prefixes, most of which are single hosts, written with their length."""
    texts = list(chain.from_iterable(lists))
    v4 = [text for text in texts if text.endswith("/32") and ":" not in text]
    v6 = [text for text in texts if text.endswith("/128")]
    prefixes = dict(zip(v4, _hosts(socket.AF_INET, [text[:-3] for text in v4], 32), strict=True))
    hosts = _hosts(socket.AF_INET6, [text[:-4] for text in v6], 128)
    if any(packed.startswith(V4_MAPPED) for packed, _ in hosts):
        raise UnusualError
    prefixes.update(zip(v6, hosts, strict=True))
    if len(v4) + len(v6) != len(texts):
        prefixes.update((text, parse_prefix(text)) for text in texts if text not in prefixes)
    of = prefixes.__getitem__
    return [_in_order(tuple(map(of, texts))) for texts in lists]


def _hosts(family: socket.AddressFamily, texts: Sequence[str], length: int) -> list[Prefix]:
    packed = map(socket.inet_pton, repeat(int(family)), texts)
    return list(map(tuple.__new__, repeat(Prefix), zip(packed, repeat(length))))


def _in_order(prefixes: tuple[Prefix, ...]) -> tuple[Prefix, ...]:
    """The same in their order, each once."""
    if len(prefixes) < 2 or (len(prefixes) == 2 and prefixes[0] < prefixes[1]):
        return prefixes
    return tuple(sorted(set(prefixes)))
