import base64
import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from agent import expiry
from agent.expiry import expiries_of, token_claims, token_expiry

NAME = x509.Name(
    [x509.NameAttribute(NameOID.COMMON_NAME, "gw1"), x509.NameAttribute(NameOID.LOCALITY_NAME, "é")]
)
PEM = serialization.Encoding.PEM


def certificate(
    until: datetime, key: CertificateIssuerPrivateKeyTypes | None = None, *, ca: bool = False
) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(NAME, NAME, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(datetime(2020, 1, 1, tzinfo=UTC)).not_valid_after(until)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(PEM)


@pytest.mark.parametrize(
    "until",
    [
        datetime(2026, 11, 29, 7, 40, 59, tzinfo=UTC),
        datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC),
        datetime(2050, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
    ],
)
@pytest.mark.parametrize("ca", [False, True])
def test_the_end_of_a_certificate_is_what_cryptography_reads(until: datetime, ca: bool) -> None:
    assert expiries_of(certificate(until, ca=ca)) == (until.timestamp(),)


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()],
    ids=["RSA", "Ed25519"],
)
def test_the_kind_of_key_does_not_matter(key: CertificateIssuerPrivateKeyTypes) -> None:
    until = datetime(2030, 5, 6, 7, 8, 9, tzinfo=UTC)

    assert expiries_of(certificate(until, key)) == (until.timestamp(),)


@given(st.integers(1_600_000_000, 7_300_000_000))
def test_every_moment_is_read_to_the_second(seconds: int) -> None:
    until = datetime.fromtimestamp(seconds, UTC)

    assert expiries_of(certificate(until)) == (until.timestamp(),)


def test_a_files_certificates_come_in_its_order_whatever_stands_between_them() -> None:
    first, second = (datetime(year, 1, 1, tzinfo=UTC) for year in (2031, 2029))
    file = b"subject=gw1\n" + certificate(first) + b"\r\n# its authority\n" + certificate(second, ca=True)

    assert expiries_of(file) == (first.timestamp(), second.timestamp())


def test_the_authorities_of_this_host_are_read_as_openssl_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    authorities = [trustme.CA() for _ in range(3)]
    path.write_bytes(b"".join(ca.cert_pem.bytes() for ca in authorities))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(path)

    by_openssl = [ssl.cert_time_to_seconds(str(ca["notAfter"])) for ca in context.get_ca_certs()]

    assert sorted(expiries_of(path.read_bytes())) == sorted(by_openssl)


def element(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return bytes([tag, len(content)]) + content


def of_version_1(tag: int, not_after: bytes) -> bytes:
    """A certificate as it was before there were versions, as far as its validity."""
    validity = element(0x30, element(0x17, b"490101000000Z"), element(tag, not_after))
    body = element(0x30, element(0x02, b"\1"), element(0x30), element(0x30), validity)
    return ssl.DER_cert_to_PEM_cert(element(0x30, body)).encode()


@pytest.mark.parametrize(
    ("tag", "text", "moment"),
    [
        (0x17, b"491231235959Z", datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (0x17, b"500101000000Z", datetime(1950, 1, 1, tzinfo=UTC)),
        (0x17, b"991231235959Z", datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (0x18, b"20500101000000Z", datetime(2050, 1, 1, tzinfo=UTC)),
    ],
)
def test_years_of_two_digits_are_those_of_1950_to_2049(tag: int, text: bytes, moment: datetime) -> None:
    assert expiries_of(of_version_1(tag, text)) == (moment.timestamp(),)


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (0x17, b"4912312359Z"),
        (0x17, b"491231235959+0100"),
        (0x17, b"4912312359 9Z"),
        (0x17, b"491331235959Z"),
        (0x18, b"491231235959Z"),
        (0x18, b"20491231235959.5Z"),
        (0x16, b"491231235959Z"),
    ],
)
def test_a_time_in_another_form_is_an_error(tag: int, text: bytes) -> None:
    with pytest.raises(ValueError):
        expiries_of(of_version_1(tag, text))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nnot base64!\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n\xff\xfe\n-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n",
    ],
)
def test_what_is_no_certificate_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        expiries_of(text)


DER = ssl.PEM_cert_to_DER_cert(certificate(datetime(2030, 1, 1, tzinfo=UTC)).decode())


@given(st.integers(0, len(DER) - 1))
def test_a_certificate_that_was_cut_is_an_error(size: int) -> None:
    with pytest.raises(ValueError):
        expiries_of(ssl.DER_cert_to_PEM_cert(DER[:size]).encode())


@given(st.binary(max_size=200))
def test_rubbish_is_an_error_and_nothing_else(rubbish: bytes) -> None:
    with pytest.raises(ValueError):
        expiries_of(ssl.DER_cert_to_PEM_cert(rubbish).encode())


@given(st.integers(0, len(DER) - 1), st.integers(0, 255))
def test_a_changed_byte_gives_a_time_or_a_value_error(at: int, byte: int) -> None:
    changed = ssl.DER_cert_to_PEM_cert(DER[:at] + bytes([byte]) + DER[at + 1 :]).encode()
    try:
        [moment] = expiries_of(changed)
    except ValueError:
        return
    assert abs(moment) < timedelta(days=366 * 10_000).total_seconds()


def jwt(claims: Any) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl"


@pytest.mark.parametrize("length", range(8))
def test_a_jwt_is_read_however_much_padding_it_goes_without(length: int) -> None:
    assert token_claims(jwt({"sub": "x" * length})) == {"sub": "x" * length}


def test_characters_that_are_not_of_a_jwt_are_not_skipped_over() -> None:
    head, _, rest = jwt({"exp": 1_900_000_000}).partition(".")
    assert token_claims(f"{head}.{rest}") == {"exp": 1_900_000_000}
    for odd in "\n!":
        # Four of them, so that what is left would be padded well.
        assert token_claims(f"{head}.{rest[:4]}{odd * 4}{rest[4:]}") == {}


def test_an_element_of_indefinite_length_is_refused_as_long_as_it_may_be() -> None:
    with pytest.raises(ValueError, match="not a certificate"):
        expiry._element(b"\x30\x80" + bytes(200), 0x30)


def test_a_jwts_end_is_read() -> None:
    assert token_expiry(jwt({"sub": "DEFGUARD-NETWORK-1", "exp": 1_900_000_000})) == 1_900_000_000.0
    assert token_expiry(jwt({"exp": 1_900_000_000.5})) == 1_900_000_000.5


@pytest.mark.parametrize(
    "token",
    [
        "an-opaque-token",
        "a.b.c",
        "",
        "..",
        jwt({}),
        jwt({"exp": None}),
        jwt({"exp": "1900000000"}),
        jwt({"exp": True}),
        jwt({"exp": -1}),
        jwt({"exp": float("inf")}),
        jwt({"exp": float("nan")}),
        jwt({"exp": 10**400}),
        jwt([1900000000]),
        jwt({"exp": 1_900_000_000}).rpartition(".")[0],
    ],
)
def test_any_other_token_has_no_end(token: str) -> None:
    assert token_expiry(token) is None


@given(st.text(max_size=60))
def test_any_text_has_claims_or_none(text: str) -> None:
    assert isinstance(token_claims(f"e30.{text}.x"), dict)
