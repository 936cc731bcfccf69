"""Sessions as core keeps them: granted, renewed, revoked, ended; and the snapshot they are part of.

Whatever ends a session here is one transaction with its event. An end that the gateway reported
first gets a ``session_revoked`` too: the gateway ignores it, and the revision names the new state.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from agent.encoding import format_key, format_time
from agent.sandbox.directory import Device, Location, peer_message
from agent.sandbox.errors import Refusal
from agent.sandbox.liveness import Witness, known_silence
from agent.sandbox.store import Store, session_object

# Core lets the gateway end a session at its deadline first, so that both give the same reason.
EXPIRY_GRACE: Final = 2.0
# The same for the idle rules of a location whose gateway applies them itself.
IDLE_GRACE: Final = 60.0
# How long an ended session's PSK is kept, for gateways that resume the stream from before its end.
PSK_RETENTION: Final = 300.0


@dataclass(frozen=True, slots=True, repr=False)
class Session:
    """A session; times are Unix seconds. ``alive_at``: when a report last showed a sign of life.

    ``preshared_key`` is the raw key, None once erased.
    """

    id: str
    location_id: int
    public_key: str
    preshared_key: bytes | None
    method: str
    granted_at: float
    expires_at: float
    alive_at: float | None
    ended_at: float | None
    reason: str | None

    def __repr__(self) -> str:
        return f"Session({self.id!r}, ended_at={self.ended_at}, reason={self.reason!r})"


@dataclass(frozen=True, slots=True)
class Grant:
    """A session that was just granted, and the revision at which gateways get it."""

    session: Session
    epoch: str
    revision: int


class Sessions:
    """All sessions. ``now`` is in Unix seconds everywhere; refused requests raise Refusal."""

    def __init__(self, store: Store, lifetime: float) -> None:
        """``lifetime``: seconds that a grant lasts, unless the location's ceiling is lower."""
        self._store = store
        self._lifetime = lifetime
        self._snapshots: dict[int, tuple[str, int, bytes]] = {}

    def grant(
        self, device: Device, location: Location, method: str, now: float, *, lifetime: float = 0
    ) -> Grant:
        """Grant a session with a fresh PSK; one that is still live is replaced by it."""
        lasts = min(lifetime or self._lifetime, location.policy["max_lifetime"])
        session_id = "s-" + secrets.token_hex(8)
        with self._store.transaction():
            self._store.execute(
                "UPDATE sessions SET ended_at = ?, reason = 'replaced'"
                " WHERE public_key = ? AND ended_at IS NULL",
                now,
                device.public_key,
            )
            self._store.insert(
                "INSERT INTO sessions (id, location_id, public_key, psk, method, granted_at,"
                " expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                session_id,
                location.id,
                device.public_key,
                _new_psk(),
                method,
                now,
                now + lasts,
            )
            return self._announce(session_id)

    def renew(
        self, session_id: str, lifetime: float, now: float, *, ceiling: float, rotate: bool = False
    ) -> Grant:
        """Let a live session run ``lifetime`` seconds from now, at most ``ceiling`` from its grant."""
        session = self.get(session_id)
        if session.ended_at is not None:
            raise Refusal(409, "session_ended", "The session has ended; authenticate again.")
        with self._store.transaction():
            self._store.execute(
                "UPDATE sessions SET expires_at = ?, psk = ? WHERE id = ?",
                min(now + lifetime, session.granted_at + ceiling),
                _new_psk() if rotate else session.preshared_key,
                session_id,
            )
            return self._announce(session_id)

    def _announce(self, session_id: str) -> Grant:
        row = self._row(session_id)
        revision = self._store.append(
            row["location_id"],
            "session_granted",
            {"public_key": row["public_key"], "session": session_object(row, psk="")},
            session_id=session_id,
        )
        epoch, _ = self._store.position(row["location_id"])
        return Grant(_session(row), epoch, revision)

    def end(self, session_id: str, reason: str, now: float) -> bool:
        """End a session, sent as ``session_revoked``; False if it had ended before."""
        with self._store.transaction():
            row = self._row(session_id)
            if row["ended_at"] is not None:
                return False
            self._store.execute(
                "UPDATE sessions SET ended_at = ?, reason = ? WHERE id = ?", now, reason, session_id
            )
            self._store.append(
                row["location_id"],
                "session_revoked",
                {"public_key": row["public_key"], "session_id": session_id},
            )
        return True

    def get(self, session_id: str) -> Session:
        """Return a session, live or ended."""
        return _session(self._row(session_id))

    def all(self, *, location_id: int | None = None, live: bool = False) -> list[Session]:
        """Return sessions, oldest first."""
        rows = self._store.rows(
            "SELECT * FROM sessions WHERE (?1 IS NULL OR location_id = ?1)"
            " AND (NOT ?2 OR ended_at IS NULL) ORDER BY granted_at",
            location_id,
            live,
        )
        return [_session(row) for row in rows]

    def sweep(
        self,
        locations: list[Location],
        witnesses: Callable[[Location], list[Witness]],
        now: float,
    ) -> list[tuple[str, str]]:
        """End every session whose time is up or whose client has gone; return ids and reasons.

        ``witnesses`` are a location's gateways: silence counts only as far as all that could have heard a
        session have told. Where core judges, ``idle_timeout`` has to be longer than the gateways'
        ``stats.interval``.
        """
        due: list[tuple[str, str]] = []
        for location in locations:
            due += self._over(location, now)
            due += self._silent(location, witnesses(location), now)
        with self._store.transaction():
            for session_id, reason in due:
                self.end(session_id, reason, now)
            self._store.execute(
                "UPDATE sessions SET psk = NULL WHERE psk IS NOT NULL AND ended_at <= ?",
                now - PSK_RETENTION,
            )
        return due

    def _over(self, location: Location, now: float) -> list[tuple[str, str]]:
        rows = self._store.rows(
            "SELECT id FROM sessions WHERE location_id = ? AND ended_at IS NULL"
            " AND min(expires_at, granted_at + ?) + ? <= ?",
            location.id,
            location.policy["max_lifetime"],
            EXPIRY_GRACE,
            now,
        )
        return [(row["id"], "expired") for row in rows]

    def _silent(self, location: Location, witnesses: list[Witness], now: float) -> list[tuple[str, str]]:
        policy = location.policy
        reports = policy["liveness"] == "core"
        grace = 0.0 if reports else IDLE_GRACE
        rows = self._store.rows(
            "SELECT * FROM (SELECT id, alive_at IS NULL AS unseen,"
            " coalesce(alive_at, granted_at) AS last_sign,"
            " CASE WHEN alive_at IS NULL THEN ?2 ELSE ?3 END + ?4 AS patience FROM sessions"
            " WHERE location_id = ?1 AND ended_at IS NULL AND min(expires_at, granted_at + ?5) + ?6 > ?7)"
            " WHERE last_sign + patience <= ?7",
            location.id,
            policy["connect_timeout"],
            policy["idle_timeout"],
            grace,
            policy["max_lifetime"],
            EXPIRY_GRACE,
            now,
        )
        return [
            (row["id"], "never_connected" if row["unseen"] else "idle")
            for row in rows
            if known_silence(row["last_sign"], witnesses, now, reports=reports) >= row["patience"]
        ]

    def snapshot(self, location: Location, now: float) -> bytes:
        """Return the body of GET state: JSON with every peer and its live session.

        All but ``server_time`` depends on the revision alone and is encoded once for each.
        """
        held = self._snapshots.get(location.id)
        if held is None or held[:2] != (location.epoch, location.revision):
            peers = self._peers(location.id)
            body = msgspec.json.encode(
                {
                    "epoch": location.epoch,
                    "revision": location.revision,
                    **location.message(),
                    "peer_count": len(peers),
                    "peers": peers,
                }
            )
            held = (location.epoch, location.revision, body)
            self._snapshots[location.id] = held
        return b'{"server_time":"' + format_time(now).encode() + b'",' + held[2][1:]

    def peer_count(self, location_id: int) -> int:
        """Return how many devices a location has."""
        row = self._store.row("SELECT count(*) FROM devices WHERE location_id = ?", location_id)
        return 0 if row is None else int(row[0])

    def _peers(self, location_id: int) -> list[dict[str, Any]]:
        rows = self._store.rows(
            "SELECT devices.*, sessions.id AS session, psk, granted_at, expires_at FROM devices"
            " LEFT JOIN sessions ON sessions.public_key = devices.public_key AND ended_at IS NULL"
            " WHERE devices.location_id = ? ORDER BY devices.id",
            location_id,
        )
        return [
            peer_message(
                row,
                None
                if row["session"] is None
                else {
                    "id": row["session"],
                    "preshared_key": format_key(row["psk"]),
                    "granted_at": format_time(row["granted_at"]),
                    "expires_at": format_time(row["expires_at"]),
                },
            )
            for row in rows
        ]

    def _row(self, session_id: str) -> sqlite3.Row:
        row = self._store.row("SELECT * FROM sessions WHERE id = ?", session_id)
        if row is None:
            raise Refusal(404, "unknown_session", "There is no such session.")
        return row


def _new_psk() -> bytes:
    return os.urandom(32)


def _session(row: sqlite3.Row) -> Session:
    return Session(
        id=row["id"],
        location_id=row["location_id"],
        public_key=row["public_key"],
        preshared_key=row["psk"],
        method=row["method"],
        granted_at=row["granted_at"],
        expires_at=row["expires_at"],
        alive_at=row["alive_at"],
        ended_at=row["ended_at"],
        reason=row["reason"],
    )
