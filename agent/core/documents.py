"""What the agent says to core: model values to the bodies of its reports."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from agent.encoding import format_key, format_time
from agent.model import PeerStats, RefusedPeer, SessionEnd


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _optional_time(seconds: float) -> str | None:
    return format_time(seconds) if seconds else None


def refused_json(refused: Iterable[RefusedPeer]) -> list[dict[str, str]]:
    """Refused peers as the API's ``refused`` lists them."""
    return [{"public_key": peer.public_key, "reason": peer.reason} for peer in refused]


def encode_applied(epoch: str, revision: int, applied_at: float, refused: Iterable[RefusedPeer]) -> bytes:
    """Write the body of POST applied; ``applied_at`` in Unix seconds."""
    return _dump(
        {
            "epoch": epoch,
            "revision": revision,
            "applied_at": format_time(applied_at),
            "refused": refused_json(refused),
        }
    )


def encode_stats(
    epoch: str,
    revision: int,
    sent_at: float,
    peers: Iterable[PeerStats],
    *,
    version: str,
    started_at: float,
) -> bytes:
    """Write the body of POST stats; times in Unix seconds, counters in bytes."""
    return _dump(
        {
            "sent_at": format_time(sent_at),
            "epoch": epoch,
            "revision": revision,
            "agent": {"version": version, "started_at": format_time(started_at)},
            "peers": [
                {
                    "public_key": format_key(peer.public_key),
                    "session_id": peer.session_id,
                    "endpoint": None if peer.endpoint is None else str(peer.endpoint),
                    "latest_handshake": _optional_time(peer.latest_handshake),
                    "rx_bytes": peer.rx_bytes,
                    "tx_bytes": peer.tx_bytes,
                }
                for peer in peers
            ],
        }
    )


def encode_ends(ends: Iterable[SessionEnd]) -> bytes:
    """Write the body of POST session-ends."""
    return _dump(
        {
            "ends": [
                {
                    "session_id": end.session_id,
                    "public_key": format_key(end.public_key),
                    "reason": end.reason.value,
                    "ended_at": format_time(end.ended_at),
                    "latest_handshake": _optional_time(end.latest_handshake),
                    "rx_bytes": end.rx_bytes,
                    "tx_bytes": end.tx_bytes,
                }
                for end in ends
            ]
        }
    )
