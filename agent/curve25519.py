"""The arithmetic behind WireGuard's key pairs: RFC 7748."""

from __future__ import annotations

from agent.model import PublicKey


def clamp(raw: bytes) -> bytes:
    """Return 32 bytes as a Curve25519 private key (RFC 7748, section 5), as ``wg genkey`` does."""
    return bytes([raw[0] & 248, *raw[1:31], raw[31] & 127 | 64])


def public_key(private_key: bytes) -> PublicKey:
    """Return the public key of a raw private key: X25519 with the base point 9 (RFC 7748).

    Not constant in time: for the one key at start, on the host that holds it anyway.
    """
    prime = 2**255 - 19
    scalar = int.from_bytes(clamp(private_key), "little")
    x2, z2, x3, z3, swapped = 1, 0, 9, 1, 0
    for position in range(254, -1, -1):
        bit = scalar >> position & 1
        if bit != swapped:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swapped = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % prime, b * b % prime, d * a % prime, c * b % prime
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % prime, 9 * (da - cb) ** 2 % prime
        x2, z2 = aa * bb % prime, e * (aa + 121665 * e) % prime
    if swapped:
        x2, z2 = x3, z3
    return PublicKey((x2 * pow(z2, prime - 2, prime) % prime).to_bytes(32, "little"))
