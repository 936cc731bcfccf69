"""Peers by the thousand, as core lists them and as ``wg setconf`` reads them."""

import json
import random
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from agent.curve25519 import clamp
from agent.encoding import format_key

POLICY = {"idle_timeout": 86_400, "connect_timeout": 86_400, "max_lifetime": 86_400}


class BenchPeer(NamedTuple):
    """One device; all texts as they stand in messages and files."""

    number: int
    public_key: str
    preshared_key: str
    allowed_ips: tuple[str, str]


class Population:
    """All that is drawn for one run: ``seed`` decides it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._peers: list[BenchPeer] = []

    def private_key(self) -> bytes:
        """A private key of an interface, clamped as ``wg genkey`` does."""
        return clamp(self._random.randbytes(32))

    def first(self, count: int) -> list[BenchPeer]:
        """The first so many peers, the same ones in each call."""
        while len(self._peers) < count:
            number = len(self._peers)
            key, psk = (format_key(self._random.randbytes(32)) for _ in range(2))
            # 10.0.0.0/8 but for the gateway's own address.
            v4 = f"10.{(number + 256) >> 16}.{(number + 256) >> 8 & 255}.{number & 255}/32"
            self._peers.append(
                BenchPeer(number, key, psk, (v4, f"fd00:8::{number >> 16:x}:{number & 0xFFFF:x}/128"))
            )
        return self._peers[:count]


def when(seconds: float) -> str:
    """Unix seconds as the API writes them."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def session(
    peer: BenchPeer, lasts: float, *, generation: int = 0, began: float | None = None
) -> dict[str, str]:
    """A session that began now, or at another moment (Unix seconds)."""
    now = time.time() if began is None else began
    return {
        "id": f"s-{generation}-{peer.number}",
        "preshared_key": peer.preshared_key,
        "granted_at": when(now),
        "expires_at": when(now + lasts),
    }


def entry(peer: BenchPeer, granted: dict[str, str] | None) -> dict[str, Any]:
    """One peer of core's list."""
    return {
        "public_key": peer.public_key,
        "name": f"device-{peer.number}",
        "allowed_ips": list(peer.allowed_ips),
        "session": granted,
    }


def state(entries: Sequence[dict[str, Any]], revision: int) -> bytes:
    """The body of GET state."""
    return json.dumps(
        {
            "epoch": "bench",
            "revision": revision,
            "server_time": when(time.time()),
            "location": {"id": "1", "name": "hq", "mfa_required": True},
            "interface": {"addresses": ["10.0.0.1/8", "fd00:8::1/64"]},
            "session_policy": POLICY,
            "peer_count": len(entries),
            "peers": entries,
        },
        separators=(",", ":"),
    ).encode()


def setconf(private_key: bytes, port: int, peers: Iterable[BenchPeer]) -> str:
    """The same peers for ``wg setconf`` and ``wg syncconf``."""
    lines = [f"[Interface]\nPrivateKey = {format_key(private_key)}\nListenPort = {port}\n"]
    lines += [
        f"[Peer]\nPublicKey = {p.public_key}\nPresharedKey = {p.preshared_key}\n"
        f"AllowedIPs = {', '.join(p.allowed_ips)}\n"
        for p in peers
    ]
    return "".join(lines)
