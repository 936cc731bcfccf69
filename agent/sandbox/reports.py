"""What gateways report: applied revisions, counters and signs of life, and ends of sessions."""

from __future__ import annotations

import json
import math
import sqlite3
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from agent.encoding import clean_name, format_time, parse_public_key, parse_time
from agent.sandbox.errors import Refusal
from agent.sandbox.sessions import Sessions
from agent.sandbox.store import Store

MAX_STATS_PEERS: Final = 5000
# WireGuard rejects transport keys of this age: with an older handshake, what comes in is no data.
_REJECT_AFTER: Final = 180.0

Counter = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Revision = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Epoch = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]


class RefusedPeer(Struct):
    """A peer that a gateway does not admit, and why."""

    public_key: str
    reason: str


class Applied(Struct):
    """Body of POST applied."""

    epoch: Epoch
    revision: Revision
    applied_at: str
    refused: list[RefusedPeer]


class AgentInfo(Struct):
    """The agent's own part of a report."""

    version: str
    started_at: str


class PeerStats(Struct):
    """One peer's counters, cumulative since the gateway first saw it; rx was received from it."""

    public_key: str
    session_id: str | None
    endpoint: str | None
    latest_handshake: str | None
    rx_bytes: Counter
    tx_bytes: Counter


class Stats(Struct):
    """Body of POST stats."""

    sent_at: str
    epoch: Epoch
    revision: Revision
    agent: AgentInfo
    peers: list[PeerStats]


class SessionEnd(Struct):
    """An end of a session, with the session's own counters."""

    session_id: str
    public_key: str
    reason: str
    ended_at: str
    latest_handshake: str | None
    rx_bytes: Counter
    tx_bytes: Counter


class SessionEnds(Struct):
    """Body of POST session-ends."""

    ends: list[SessionEnd]


class Reports:
    """Stores gateways' reports and what follows from them. Malformed ones raise Refusal (400)."""

    def __init__(self, store: Store, sessions: Sessions) -> None:
        self._store = store
        self._sessions = sessions
        self.agents: dict[str, AgentInfo] = {}

    def applied(self, gateway: str, report: Applied, now: float) -> dict[str, str]:
        """Store an applied revision; return the refused peers, public key to reason."""
        with malformed():
            parse_time(report.applied_at)
            refused = {peer.public_key: clean_name(peer.reason) for peer in report.refused}
        self._store.execute(
            "INSERT OR REPLACE INTO applied VALUES (?, ?, ?, ?, ?, ?)",
            gateway,
            report.epoch,
            report.revision,
            report.applied_at,
            json.dumps(refused),
            now,
        )
        return refused

    def stats(self, gateway: str, report: Stats, now: float, *, since: float = -math.inf) -> float | None:
        """Store peers' counters; note signs of life of their sessions, when they were.

        A sign of life is a changed handshake, at its time, or growing rx_bytes while the handshake is
        recent: a client without the PSK grows rx_bytes too. What has grown did so after ``since``, up to
        when this gateway had told of everything. Returns up to when it has now; None if more is to come.
        """
        if len(report.peers) > MAX_STATS_PEERS:
            raise Refusal(413, "too_many_peers", f"Send at most {MAX_STATS_PEERS} peers at once.")
        with malformed():
            sent_at = parse_time(report.sent_at)
            parse_time(report.agent.started_at)
            handshakes = [_checked(peer.public_key, peer.latest_handshake) for peer in report.peers]
        self.agents[gateway] = report.agent
        with self._store.transaction():
            for peer, handshake in zip(report.peers, handshakes, strict=True):
                before = self._store.row(
                    "SELECT * FROM stats WHERE gateway = ? AND public_key = ?",
                    gateway,
                    peer.public_key,
                )
                sign = _sign_of_life(peer, handshake, before, sent_at, since)
                if peer.session_id is not None and sign is not None:
                    # By clocks that differ a little a sign may be before the grant, or still to come.
                    self._store.execute(
                        "UPDATE sessions SET alive_at = max(coalesce(alive_at, granted_at), ?)"
                        " WHERE id = ? AND public_key = ?",
                        min(sign, now),
                        peer.session_id,
                        peer.public_key,
                    )
                self._store.execute(
                    "INSERT OR REPLACE INTO stats VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    gateway,
                    peer.public_key,
                    peer.session_id,
                    peer.endpoint,
                    handshake,
                    peer.rx_bytes,
                    peer.tx_bytes,
                    now,
                )
        return min(sent_at, now) if len(report.peers) < MAX_STATS_PEERS else None

    def session_ends(self, gateway: str, report: SessionEnds, now: float) -> None:
        """Store ends; one that is reported again changes nothing. A live session ends with it."""
        with malformed():
            for end in report.ends:
                _checked(end.public_key, end.latest_handshake)
                parse_time(end.ended_at)
        with self._store.transaction():
            for end in report.ends:
                self._store.execute(
                    "INSERT OR IGNORE INTO session_ends VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    end.session_id,
                    gateway,
                    end.public_key,
                    clean_name(end.reason),
                    end.ended_at,
                    end.latest_handshake,
                    end.rx_bytes,
                    end.tx_bytes,
                    now,
                )
                known = self._store.row(
                    "SELECT 1 FROM sessions WHERE id = ? AND public_key = ? AND ended_at IS NULL",
                    end.session_id,
                    end.public_key,
                )
                if known is not None:
                    self._sessions.end(end.session_id, clean_name(end.reason), now)

    def list_applied(self) -> dict[str, dict[str, Any]]:
        """Return each gateway's last applied revision."""
        return {
            row["gateway"]: {
                "epoch": row["epoch"],
                "revision": row["revision"],
                "applied_at": row["applied_at"],
                "refused": json.loads(row["refused"]),
                "received_at": format_time(row["received_at"]),
            }
            for row in self._store.rows("SELECT * FROM applied")
        }

    def list_stats(self) -> list[dict[str, Any]]:
        """Return the last counters of every peer at every gateway."""
        return [
            {
                **dict(row),
                "latest_handshake": None
                if row["latest_handshake"] is None
                else format_time(row["latest_handshake"]),
                "received_at": format_time(row["received_at"]),
            }
            for row in self._store.rows("SELECT * FROM stats ORDER BY gateway, public_key")
        ]

    def list_traffic(self) -> list[dict[str, Any]]:
        """Return every peer's bytes over all gateways, and the gateway where its newest handshake is.

        Each gateway's counters are cumulative and its own, so the last of each add up, however often
        they were reported.
        """
        return [
            {
                "public_key": row["public_key"],
                "gateway": row["gateway"],
                "endpoint": row["endpoint"],
                "latest_handshake": None if row["newest"] is None else format_time(row["newest"]),
                "rx_bytes": row["rx"],
                "tx_bytes": row["tx"],
            }
            # The columns beside max() are of the row that has the maximum: so SQLite has it.
            for row in self._store.rows(
                "SELECT public_key, gateway, endpoint, max(latest_handshake) AS newest,"
                " sum(rx_bytes) AS rx, sum(tx_bytes) AS tx FROM stats GROUP BY public_key"
            )
        ]

    def list_session_ends(self) -> list[dict[str, Any]]:
        """Return all reported ends in the order of their arrival."""
        return [
            {**dict(row), "received_at": format_time(row["received_at"])}
            for row in self._store.rows("SELECT * FROM session_ends ORDER BY received_at")
        ]


class malformed:  # noqa: N801 (reads as a statement: `with malformed():`)
    """Turn a parser's ValueError into a Refusal with status 400."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise Refusal(400, "malformed", f"The report can't be used: {error}.") from None


def _checked(public_key: str, handshake: str | None) -> float | None:
    parse_public_key(public_key)
    return None if handshake is None else parse_time(handshake)


def _sign_of_life(
    peer: PeerStats, handshake: float | None, before: sqlite3.Row | None, sent_at: float, since: float
) -> float | None:
    """Return when the newest sign of life was that the report shows, None if it shows none."""
    if handshake is None:
        return None
    grown = before is not None and peer.rx_bytes > before["rx_bytes"] and sent_at - handshake < _REJECT_AFTER
    if grown:
        return max(handshake, since)
    changed = before is None or before["latest_handshake"] != handshake
    return handshake if changed else None
