"""The lease journal: what must outlive the process, in SQLite, without a secret in it (rules 14, 15, 22).

One row a session with its deadlines on both clocks, its signs of life and the SHA-256 of its PSK;
the ids that are dead for good; session ends that core has not acknowledged; each peer's traffic; and
core's last list without its keys, for a restart that finds core gone. WAL with synchronous=FULL: what
``write`` returned from has survived a power cut.

The calls block for the disk's fsync: the reconciler makes them in a thread of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from agent.errors import JournalError
from agent.journalrows import (
    checked,
    end_row,
    parse_end,
    parse_peer,
    parse_session,
    parse_traffic,
    peer_row,
    session_row,
)
from agent.journalschema import SCHEMA, VERSION, begin_anew, copy_journal, kept_rows
from agent.lives import Lives
from agent.model import (
    InterfaceAddress,
    InterfaceSettings,
    Location,
    Now,
    Peer,
    PublicKey,
    SessionEnd,
    SessionPolicy,
)
from agent.sessions import Liveness, Session
from agent.state import Restored
from agent.traffic import Traffic

_log = structlog.get_logger(__name__)

_MANY: Final = 1000


@dataclass(frozen=True, slots=True)
class Contact:
    """The last life sign of core, on the host's clocks; ``boot`` is None if it was under another boot."""

    boot: float | None
    wall: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that the journal held."""

    restored: Restored
    traffic: tuple[tuple[PublicKey, Traffic], ...] = ()
    ends: tuple[SessionEnd, ...] = ()
    contact: Contact | None = None
    addresses: tuple[InterfaceAddress, ...] = ()
    """The addresses that the agent itself has put on the interface."""
    lives: Lives | None = None
    """How the last process ended; None if there was none."""


@dataclass(slots=True)
class Entry:
    """What one transaction writes. Empty parts cost nothing."""

    sessions: list[tuple[Session, Liveness | None]] = field(default_factory=list)
    ends: list[tuple[SessionEnd, float]] = field(default_factory=list)
    """Each with the session's first ``granted_at``; its row goes, its id stays dead, the report waits."""
    traffic: list[tuple[PublicKey, Traffic]] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    unlisted: list[PublicKey] = field(default_factory=list)
    location: tuple[Location, InterfaceSettings, SessionPolicy] | None = None
    contact: Now | None = None
    addresses: tuple[InterfaceAddress, ...] | None = None
    lives: Lives | None = None
    forgotten: list[str] = field(default_factory=list)
    """Dead ids that need not be remembered any longer."""
    reported: list[str] = field(default_factory=list)
    """Ids of ends that core has acknowledged."""
    probe: bool = False
    """Write something even if there is nothing to say, to see whether that works."""

    def __bool__(self) -> bool:
        return self.addresses is not None or any(getattr(self, name) for name in self.__slots__)


class Journal:
    """The journal of one interface, in ``folder``; ``boot_id`` names this boot of the host.

    It opens when first used and again after a fault, so that a disk that comes back is used.
    ``scratch`` is a private folder on another file system, for a disk that only lets itself be read.
    """

    def __init__(self, folder: Path, boot_id: str, scratch: Path | None = None) -> None:
        self.path = folder / "journal.sqlite"
        self.boot_id = boot_id
        self.set_aside: Path | None = None
        """Where a journal that could not be read was moved, if one was."""
        self.unwritable: JournalError | None = None
        """Why the journal was read and can't be written, if that is so."""
        self._scratch = scratch
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        """Device and inode of the file that is open."""

    def load(self) -> Loaded:
        """Return what the journal holds; one that is corrupt is set aside, and then it holds nothing.

        One of another version is set aside too; the dead ids and the ends to report are taken over from it.
        On a full or a read-only disk ``unwritable`` says so. Raises JournalError if the journal can't
        even be read.
        """
        self.unwritable = None
        try:
            with self._faults():
                return self._load(self._open())
        except JournalError as error:
            begun_anew = isinstance(error.__cause__, _OtherVersionError) and self._take_over()
            if not begun_anew and not _is_corruption(error.__cause__):
                loaded = self._load_copy(error)
                self.unwritable = error
                return loaded
        except (ValueError, msgspec.DecodeError):
            begun_anew = False
        if not begun_anew:
            self._put_aside()
        with self._faults():
            return self._load(self._open())

    def write(self, entry: Entry) -> None:
        """Write all of it or nothing, durably; raises JournalError."""
        if not entry:
            return
        with self._faults():
            self._put_back()
            connection = self._open()
            with connection:
                self._write(connection, entry)
            if len(entry.sessions) + len(entry.peers) + len(entry.traffic) > _MANY:
                # SQLite would keep the pages of all these rows (``rss_10k``: 2 MB).
                connection.execute("PRAGMA shrink_memory")

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            with contextlib.suppress(sqlite3.Error):
                self.close()
            raise JournalError(
                f"the journal {self.path} can't be used: {error}",
                "no new session is admitted until it can be written; free the disk or mend the folder",
            ) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        # The file is made here, with its mode, before SQLite would make it with the umask's.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self.path, timeout=5.0, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                with connection:
                    connection.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version={VERSION};COMMIT;")
            elif version != VERSION:
                raise _OtherVersionError(f"it has version {version}, not {VERSION}")
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._file = _identity(self.path)
        return connection

    def _put_back(self) -> None:
        """Write the journal out anew where somebody has removed or replaced its file.

        SQLite would go on in the file that has no name any more, and the next process would know nothing.
        """
        if self._connection is None or _identity(self.path) == self._file:
            return
        with tempfile.TemporaryDirectory(prefix="journal-", dir=self.path.parent) as folder:
            copy = Path(folder) / self.path.name
            copy.touch(0o600)
            self._connection.execute("VACUUM INTO ?", (str(copy),))
            with copy.open("rb") as written:
                os.fsync(written.fileno())
            self.close()
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            copy.replace(self.path)
        _log.warning("the journal's file was removed or replaced: it is written anew", path=str(self.path))

    def _load_copy(self, fault: JournalError) -> Loaded:
        """Read a copy, since SQLite needs room beside the file even to read it; or raise ``fault``.

        Nobody else writes the journal: there is one agent to an interface.
        """
        if getattr(fault.__cause__, "sqlite_errorcode", None) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise fault
        try:
            with tempfile.TemporaryDirectory(prefix="journal-", dir=self._scratch) as folder:
                copy = Path(folder) / "copy.sqlite"
                copy.write_bytes(self.path.read_bytes())
                wal = self.path.with_name(f"{self.path.name}-wal")
                if wal.exists():
                    copy.with_name(f"{copy.name}-wal").write_bytes(wal.read_bytes())
                with contextlib.closing(sqlite3.connect(copy)) as connection:
                    if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                        raise fault
                    return self._load(connection)
        except (OSError, sqlite3.Error, ValueError, msgspec.DecodeError):
            raise fault from fault.__cause__

    def _take_over(self) -> bool:
        """Begin anew in place with what can be kept of another version's journal; False if that is nothing.

        It is one transaction, so that no crash and no full disk can lose what is kept; the former journal is
        copied aside before it.
        """
        try:
            with self._faults(), contextlib.closing(sqlite3.connect(self.path, timeout=5.0)) as connection:
                connection.isolation_level = None
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("BEGIN IMMEDIATE")
                if not (kept := kept_rows(connection)):
                    return False
                aside = self._free_name()
                try:
                    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                    copy_journal(self.path, aside)
                    begin_anew(connection, kept)
                except BaseException:
                    aside.unlink(missing_ok=True)
                    raise
        except JournalError as error:
            if _is_corruption(error.__cause__):
                return False
            raise
        self.set_aside = aside
        return True

    def _free_name(self) -> Path:
        names = (self.path.with_name(f"{self.path.name}.unreadable-{n}") for n in itertools.count(1))
        return next(name for name in names if not name.exists())

    def _put_aside(self) -> None:
        self.close()
        with self._faults():
            self.set_aside = self._free_name()
            self.path.rename(self.set_aside)
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _load(self, connection: sqlite3.Connection) -> Loaded:
        def rows(query: str) -> list[Any]:
            return connection.execute(query).fetchall()

        # As bytes: SQLite would give up all rows for a text that is none.
        meta = dict(rows("SELECT name, CAST(value AS BLOB) FROM meta"))
        location, interface, policy = None, InterfaceSettings(), SessionPolicy()
        if "location" in meta:
            location, interface, policy = msgspec.json.decode(
                meta["location"], type=tuple[Location, InterfaceSettings, SessionPolicy]
            )
        restored = Restored(
            location=location,
            interface=interface,
            session_policy=policy,
            peers=tuple(map(parse_peer, rows("SELECT public_key, record FROM peers"))),
            sessions=tuple(
                parse_session(row, self.boot_id)
                for row in rows("SELECT id, public_key, record FROM sessions")
            ),
            ended=tuple(checked(row, (str, float)) for row in rows("SELECT id, granted_at FROM ended")),
        )
        ends = rows(
            "SELECT id, public_key, reason, ended_at, latest_handshake, rx_bytes, tx_bytes"
            " FROM unreported_ends ORDER BY rowid"
        )
        contact = None
        if "contact" in meta:
            boot_id, boot, wall = msgspec.json.decode(meta["contact"], type=tuple[str, float, float])
            contact = Contact(boot if boot_id == self.boot_id else None, wall)
        addresses = msgspec.json.decode(meta.get("addresses", b"[]"), type=list[tuple[bytes, int]])
        return Loaded(
            restored=restored,
            traffic=tuple(map(parse_traffic, rows("SELECT * FROM traffic"))),
            ends=tuple(map(parse_end, ends)),
            contact=contact,
            addresses=tuple(InterfaceAddress(*address) for address in addresses),
            lives=_lives(meta.get("lives")),
        )

    def _write(self, connection: sqlite3.Connection, entry: Entry) -> None:
        def many(query: str, rows: Iterable[tuple[Any, ...]]) -> None:
            connection.executemany(query, rows)

        def remember(name: str, value: bytes) -> None:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value.decode()))

        if entry.sessions:
            many(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)",
                (session_row(session, liveness, self.boot_id) for session, liveness in entry.sessions),
            )
        if entry.ends:
            many("DELETE FROM sessions WHERE id = ?", ((end.session_id,) for end, _ in entry.ends))
            many("INSERT OR IGNORE INTO ended VALUES (?, ?)", ((e.session_id, at) for e, at in entry.ends))
            many(
                "INSERT OR IGNORE INTO unreported_ends VALUES (?, ?, ?, ?, ?, ?, ?)",
                (end_row(end) for end, _ in entry.ends),
            )
        if entry.traffic:
            many(
                "INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?, ?, ?)",
                ((key, *traffic[:5]) for key, traffic in entry.traffic),
            )
        if entry.unlisted:
            many("DELETE FROM peers WHERE public_key = ?", ((key,) for key in entry.unlisted))
        if entry.peers:
            many("INSERT OR REPLACE INTO peers VALUES (?, ?)", map(peer_row, entry.peers))
        if entry.location is not None:
            remember("location", msgspec.json.encode(entry.location))
        if entry.contact is not None:
            remember("contact", msgspec.json.encode((self.boot_id, *entry.contact)))
        if entry.addresses is not None:
            remember("addresses", msgspec.json.encode([tuple(address) for address in entry.addresses]))
        if entry.lives is not None:
            remember("lives", msgspec.json.encode(entry.lives))
        if entry.probe:
            remember("probe", b"")
        if entry.forgotten:
            many("DELETE FROM ended WHERE id = ?", ((id_,) for id_ in entry.forgotten))
        if entry.reported:
            many("DELETE FROM unreported_ends WHERE id = ?", ((id_,) for id_ in entry.reported))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class _OtherVersionError(sqlite3.DatabaseError):
    """The journal was made by another version of the agent."""


def _lives(value: bytes | None) -> Lives | None:
    """Only metrics ask for it, so damage to it is no reason to give up sessions."""
    try:
        return None if value is None else msgspec.json.decode(value, type=Lives)
    except (ValueError, msgspec.DecodeError):
        return None


def _is_corruption(cause: BaseException | None) -> bool:
    """Whether the file itself is at fault, and not what is around it (a full disk, a lock, rights)."""
    if isinstance(cause, sqlite3.OperationalError):
        # Tables that are not there; text that is none has no code at all.
        return getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
    return isinstance(cause, sqlite3.DatabaseError)
