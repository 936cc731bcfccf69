"""When credentials expire, read from their bytes; nothing is verified here.

The standard library shows a certificate's validity only of authorities and of verified peers, and
``cryptography`` is an extra: so the few bytes on the way to it are walked here.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import ssl
from datetime import UTC, datetime
from typing import Any, Final

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
# DER tags, X.690 8; a certificate's fields are in RFC 5280, 4.1.
_INTEGER: Final = 0x02
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_TIMES: Final = {_UTC_TIME: (13, "%y%m%d%H%M%SZ"), 0x18: (15, "%Y%m%d%H%M%SZ")}
"""Their size and form, RFC 5280, 4.1.2.5."""
_LONG: Final = 0x80


def expiries_of(pem: bytes) -> tuple[float, ...]:
    """Return when each certificate of a PEM file expires, in Unix seconds and the file's order.

    ValueError if there is none, or one can't be read.
    """
    found = [ssl.PEM_cert_to_DER_cert(text.decode("ascii")) for text in _PEM.findall(pem)]
    if not found:
        raise ValueError("there is no certificate in it")
    return tuple(map(_not_after, found))


def _not_after(der: bytes) -> float:
    certificate, _ = _element(der, _SEQUENCE)
    rest, _ = _element(certificate, _SEQUENCE)
    if rest[:1] == bytes([_VERSION]):
        _, rest = _element(rest, _VERSION)
    for tag in (_INTEGER, _SEQUENCE, _SEQUENCE):  # serial number, algorithm, issuer
        _, rest = _element(rest, tag)
    validity, _ = _element(rest, _SEQUENCE)
    _, rest = _element(validity, *_TIMES)
    text, _ = _element(rest, *_TIMES)
    size, form = _TIMES[rest[0]]
    if len(text) != size or not text[:-1].isdigit():
        raise ValueError("not the time of a certificate")
    moment = datetime.strptime(text.decode("ascii"), form)  # noqa: DTZ007 it ends in Z
    if rest[0] == _UTC_TIME and moment.year >= 2050:
        moment = moment.replace(year=moment.year - 100)
    return moment.replace(tzinfo=UTC).timestamp()


def _element(data: bytes, *tags: int) -> tuple[bytes, bytes]:
    """Return the content of the first element, which has one of these tags, and what follows it."""
    if len(data) < 2 or data[0] not in tags:
        raise ValueError("not a certificate")
    size, start = data[1], 2
    if size > _LONG:
        start += size - _LONG
        size = int.from_bytes(data[2:start])
    end = start + size
    if data[1] == _LONG or end > len(data):
        raise ValueError("not a certificate, or not all of one")
    return data[start:end], data[end:]


def token_claims(token: str) -> dict[str, Any]:
    """Return what a JSON Web Token says of itself; empty for a token of any other kind.

    Whether it is true is for whoever takes the token to judge.
    """
    _, _, rest = token.partition(".")
    payload, dot, _ = rest.partition(".")
    if not dot:
        return {}
    try:
        claims = json.loads(base64.b64decode(payload + "=" * (-len(payload) % 4), b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def token_expiry(token: str) -> float | None:
    """Return when a token says that it expires, in Unix seconds; None if it does not say."""
    expires_at = token_claims(token).get("exp")
    if isinstance(expires_at, bool) or not isinstance(expires_at, int | float):
        return None
    return float(expires_at) if 0 < expires_at < 1e15 else None
