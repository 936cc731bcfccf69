"""The core's SQLite database: schema, transactions, and the changelog the stream is resumed from.

Live sessions' PSKs are in it, because a core that forgot them at a restart could only drop every
tunnel. So the file is readable by its owner alone (0600, in a folder of 0700), deleted content is
overwritten, and a PSK is erased soon after its session's end. (The agent, which runs on the
gateway, writes none to disk.)

Every mutation and its event are one transaction, and commits are synchronous: a revision that was
served can't be lost, so within an epoch revisions never go back. A new database is a new epoch.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.encoding import format_key, format_time

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS locations (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, mfa_required INTEGER NOT NULL,
  epoch TEXT NOT NULL, revision INTEGER NOT NULL,
  interface TEXT NOT NULL, policy TEXT NOT NULL,
  endpoint TEXT, server_public_key TEXT, routes TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS announced (
  location_id INTEGER PRIMARY KEY REFERENCES locations, liveness TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS users (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, email TEXT,
  totp_secret TEXT, totp_last_step INTEGER NOT NULL DEFAULT 0,
  email_enabled INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS devices (
  id INTEGER PRIMARY KEY, user_id INTEGER REFERENCES users, location_id INTEGER NOT NULL
  REFERENCES locations, name TEXT NOT NULL, public_key TEXT NOT NULL UNIQUE,
  allowed_ips TEXT NOT NULL, persistent_keepalive INTEGER NOT NULL, mfa_exempt INTEGER NOT NULL,
  preshared_key TEXT);
CREATE INDEX IF NOT EXISTS devices_location ON devices (location_id);
CREATE TABLE IF NOT EXISTS sessions (
  id TEXT PRIMARY KEY, location_id INTEGER NOT NULL, public_key TEXT NOT NULL, psk BLOB,
  method TEXT NOT NULL, granted_at REAL NOT NULL, expires_at REAL NOT NULL,
  alive_at REAL, ended_at REAL, reason TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS sessions_live ON sessions (public_key) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS sessions_psk ON sessions (ended_at) WHERE psk IS NOT NULL;
CREATE TABLE IF NOT EXISTS changes (
  location_id INTEGER NOT NULL, revision INTEGER NOT NULL, event TEXT NOT NULL,
  data TEXT NOT NULL, session_id TEXT, PRIMARY KEY (location_id, revision)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS challenges (
  token_hash TEXT PRIMARY KEY, user_id INTEGER NOT NULL, public_key TEXT NOT NULL,
  method TEXT NOT NULL, code_hash TEXT, created_at REAL NOT NULL, expires_at REAL NOT NULL,
  used_at REAL, superseded INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS attempts (
  user_id INTEGER NOT NULL, kind TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS attempts_user ON attempts (user_id, kind, at);
CREATE TABLE IF NOT EXISTS applied (
  gateway TEXT PRIMARY KEY, epoch TEXT NOT NULL, revision INTEGER NOT NULL, applied_at TEXT NOT NULL,
  refused TEXT NOT NULL, received_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS stats (
  gateway TEXT NOT NULL, public_key TEXT NOT NULL, session_id TEXT, endpoint TEXT,
  latest_handshake REAL, rx_bytes INTEGER NOT NULL, tx_bytes INTEGER NOT NULL,
  received_at REAL NOT NULL, PRIMARY KEY (gateway, public_key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS session_ends (
  session_id TEXT NOT NULL, gateway TEXT NOT NULL, public_key TEXT NOT NULL, reason TEXT NOT NULL,
  ended_at TEXT NOT NULL, latest_handshake TEXT, rx_bytes INTEGER NOT NULL,
  tx_bytes INTEGER NOT NULL, received_at REAL NOT NULL, PRIMARY KEY (session_id, gateway)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a location's stream. ``data`` is what goes over the wire, PSKs included."""

    epoch: str
    revision: int
    event: str
    data: dict[str, Any]

    @property
    def id(self) -> str:
        """The event's id, EPOCH:REVISION."""
        return f"{self.epoch}:{self.revision}"

    def __repr__(self) -> str:
        return f"Change({self.id} {self.event})"


class Store:
    """One open database. Not shared between processes; used from one event loop."""

    def __init__(self, path: Path, *, changelog: int = 10_000) -> None:
        """Open or create the database; ``changelog`` is how many events a location keeps."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its journal files the mode of the database, which must be right from the start.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=ON;"
            "PRAGMA foreign_keys=ON;" + _SCHEMA
        )
        self._keep = changelog
        self._touched: set[int] = set()
        self._depth = 0
        self._watchers: dict[int, set[asyncio.Event]] = {}

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def rows(self, sql: str, *parameters: object) -> list[sqlite3.Row]:
        """Return all rows of a query."""
        return self._db.execute(sql, parameters).fetchall()

    def row(self, sql: str, *parameters: object) -> sqlite3.Row | None:
        """Return the first row of a query, or None."""
        row: sqlite3.Row | None = self._db.execute(sql, parameters).fetchone()
        return row

    def execute(self, sql: str, *parameters: object) -> int:
        """Execute a statement and return how many rows it changed."""
        return self._db.execute(sql, parameters).rowcount

    def insert(self, sql: str, *parameters: object) -> int:
        """Execute an INSERT and return the new row's id."""
        rowid = self._db.execute(sql, parameters).lastrowid
        if rowid is None:
            raise sqlite3.DatabaseError("no row was inserted")
        return rowid

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written as one; streams hear of new revisions after the commit."""
        if self._depth:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            self._touched.clear()
            raise
        else:
            self._db.execute("COMMIT")
            touched, self._touched = self._touched, set()
            for location_id in touched:
                for event in self._watchers.get(location_id, ()):
                    event.set()
        finally:
            self._depth = 0

    def append(
        self,
        location_id: int,
        event: str,
        data: dict[str, Any],
        *,
        session_id: str | None = None,
    ) -> int:
        """Add an event to a location's changelog, in the running transaction; return its revision.

        ``session_id`` names the session in ``data``: its PSK is put in when the event is read, so
        that the changelog holds none.
        """
        row = self._db.execute(
            "UPDATE locations SET revision = revision + 1 WHERE id = ? RETURNING revision",
            (location_id,),
        ).fetchone()
        revision = int(row[0])
        self._db.execute(
            "INSERT INTO changes VALUES (?, ?, ?, ?, ?)",
            (location_id, revision, event, json.dumps(data), session_id),
        )
        self._db.execute(
            "DELETE FROM changes WHERE location_id = ? AND revision <= ?",
            (location_id, revision - self._keep),
        )
        self._touched.add(location_id)
        return revision

    def position(self, location_id: int) -> tuple[str, int]:
        """Return a location's epoch and revision."""
        row = self.row("SELECT epoch, revision FROM locations WHERE id = ?", location_id)
        if row is None:
            raise LookupError("no such location")
        return row["epoch"], row["revision"]

    def changes_after(
        self, location_id: int, epoch: str, revision: int, *, limit: int = 500
    ) -> list[Change] | None:
        """Return the events after a revision, oldest first; None if they can't be replayed.

        That is: another epoch, a revision of the future or one trimmed away, or a grant whose
        session has ended so long ago that its PSK is erased.
        """
        current_epoch, current = self.position(location_id)
        if epoch != current_epoch or not 0 <= revision <= current:
            return None
        found = self.rows(
            "SELECT changes.*, psk FROM changes LEFT JOIN sessions ON sessions.id = session_id"
            " WHERE changes.location_id = ? AND revision > ? ORDER BY revision LIMIT ?",
            location_id,
            revision,
            limit,
        )
        if revision < current and (not found or found[0]["revision"] != revision + 1):
            return None
        changes: list[Change] = []
        for row in found:
            data = json.loads(row["data"])
            if row["session_id"] is not None:
                if row["psk"] is None:
                    return changes or None
                data["session"]["preshared_key"] = format_key(row["psk"])
            changes.append(Change(epoch, row["revision"], row["event"], data))
        return changes

    def wake(self) -> None:
        """Set the events of all watchers."""
        for watchers in self._watchers.values():
            for event in watchers:
                event.set()

    @contextmanager
    def watch(self, location_id: int) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever the location gets a new revision."""
        event = asyncio.Event()
        watchers = self._watchers.setdefault(location_id, set())
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)


def session_object(row: sqlite3.Row, *, psk: str) -> dict[str, Any]:
    """Return a session's row as the protocol's object with the given ``preshared_key``."""
    return {
        "id": row["id"],
        "preshared_key": psk,
        "granted_at": format_time(row["granted_at"]),
        "expires_at": format_time(row["expires_at"]),
    }
