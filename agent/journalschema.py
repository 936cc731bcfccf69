"""The journal's tables, and what of another version's journal goes on in one of this version."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from agent.journalrows import checked, parse_end

VERSION: Final = 3
SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sessions (
  id TEXT, public_key BLOB, record BLOB, PRIMARY KEY (id, public_key)
) WITHOUT ROWID;
CREATE TABLE ended (id TEXT PRIMARY KEY, granted_at REAL) WITHOUT ROWID;
CREATE TABLE unreported_ends (
  id TEXT UNIQUE, public_key BLOB, reason TEXT, ended_at REAL, latest_handshake REAL,
  rx_bytes INTEGER, tx_bytes INTEGER
);
CREATE TABLE traffic (
  public_key BLOB PRIMARY KEY, rx_bytes INTEGER, tx_bytes INTEGER, kernel_rx INTEGER, kernel_tx INTEGER,
  latest_handshake REAL
) WITHOUT ROWID;
CREATE TABLE peers (public_key BLOB PRIMARY KEY, record BLOB) WITHOUT ROWID;
"""


def _parse_ended(row: tuple[Any, ...]) -> None:
    checked(row, (str, float))


_KEPT: Final[dict[str, Callable[[tuple[Any, ...]], object]]] = {
    "ended": _parse_ended,
    "unreported_ends": parse_end,
}
"""What is taken over from other versions (rules 6 and 21); each with what raises ValueError for a bad row.

So a later version that gives another meaning to a column has to give it another name.
"""


def kept_rows(connection: sqlite3.Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Return those tables' rows that are as this version would have written them; raises sqlite3.Error."""
    kept = {}
    with contextlib.closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(SCHEMA)
        for table, parse in _KEPT.items():
            columns = f"PRAGMA table_info({table})"
            if connection.execute(columns).fetchall() != ours.execute(columns).fetchall():
                continue
            rows = connection.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608 (a name of ours)
            with contextlib.suppress(ValueError):
                for row in rows:
                    parse(row)
                kept[table] = rows
    return kept


def begin_anew(connection: sqlite3.Connection, kept: dict[str, list[tuple[Any, ...]]]) -> None:
    """Make the journal one of this version that holds these rows, and commit; raises sqlite3.Error."""
    tables = (
        "SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT GLOB 'sqlite_*'"
    )
    for kind, name in connection.execute(tables).fetchall():
        connection.execute('DROP {} "{}"'.format(kind, name.replace('"', '""')))
    for statement in SCHEMA.split(";"):
        connection.execute(statement)
    for table, rows in kept.items():
        if rows:
            values = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({values})", rows)  # noqa: S608 (as above)
    connection.execute(f"PRAGMA user_version={VERSION}")
    connection.execute("COMMIT")


def copy_journal(journal: Path, copy: Path) -> None:
    """Copy what is committed, also what is still in the write-ahead log; raises sqlite3.Error."""
    with (
        contextlib.closing(sqlite3.connect(journal)) as source,
        contextlib.closing(sqlite3.connect(copy)) as to,
    ):
        source.backup(to)
