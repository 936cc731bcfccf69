from __future__ import annotations

import contextlib
import math
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from agent.errors import JournalError
from agent.journal import Contact, Entry, Journal, Loaded
from agent.lives import Lives
from agent.model import (
    EndReason,
    InterfaceAddress,
    InterfaceSettings,
    Location,
    Now,
    Refusal,
    SessionEnd,
    SessionPolicy,
)
from agent.sessions import Deadline, Liveness, Session
from agent.state import Restored
from agent.traffic import Traffic
from tests.support.builders import grant, key, peer, psk

SETTINGS = InterfaceSettings((InterfaceAddress(b"\x0a\x08\x00\x01", 24),), 443, 1380, 7)
PLACE = (Location("7", "hq", mfa_required=True), SETTINGS, SessionPolicy(1.5, 2.0, 3.0, "core"))


def session(number: int, **members: object) -> Session:
    held = Session(
        id=f"s{number}",
        public_key=key(number),
        preshared_key=None,
        journalled_digest=psk(number).digest(),
        granted_at=1_800_000_000.125,
        expires_at=1_800_003_600.25,
        ends_at=1_800_003_000.5,
        deadline=Deadline(4_000.0625, 1_800_003_000.75),
        in_use=True,
        base_rx=11,
        base_tx=12,
    )
    return replace(held, **members)


def end(number: int, reason: EndReason = EndReason.EXPIRED) -> SessionEnd:
    return SessionEnd(f"s{number}", key(number), reason, 1_800_000_100.5, 1_800_000_050.25, 1 << 40, 7)


def written(folder: Path, *entries: Entry, boot_id: str = "boot") -> None:
    journal = Journal(folder, boot_id)
    for entry in entries:
        journal.write(entry)
    journal.close()


def read(folder: Path, boot_id: str = "boot") -> Loaded:
    journal = Journal(folder, boot_id)
    try:
        return journal.load()
    finally:
        journal.close()


def test_an_empty_journal_holds_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == Loaded(read(tmp_path).restored)
    assert read(tmp_path).restored.location is None
    assert read(tmp_path).restored.sessions == ()


@pytest.mark.parametrize(
    "held",
    [
        session(1),
        session(1, in_use=False),
        session(1, deadline=Deadline(None, 1_800_000_000.5)),
        session(1, former_digest=psk(2).digest()),
    ],
    ids=["in use", "held only", "of another boot", "renewed"],
)
@pytest.mark.parametrize(
    "liveness",
    [None, Liveness(10.5), Liveness(10.5, 1_800_000_001.123456789, 20.25, 30.125)],
    ids=["none", "added", "alive"],
)
def test_a_session_comes_back_as_it_was(tmp_path: Path, held: Session, liveness: Liveness | None) -> None:
    if held.deadline.boot is None:
        liveness = None
    written(tmp_path, Entry(sessions=[(held, liveness)]))
    assert read(tmp_path).restored.sessions == ((held, liveness),)


def test_the_psk_does_not_come_back(tmp_path: Path) -> None:
    written(tmp_path, Entry(sessions=[(session(1, preshared_key=psk(1)), None)]))
    [(held, _)] = read(tmp_path).restored.sessions
    assert held.preshared_key is None
    assert held.psk_digest == psk(1).digest()


def test_a_later_row_of_a_session_replaces_the_earlier(tmp_path: Path) -> None:
    later = session(1, expires_at=2e9, deadline=Deadline(9.0, 10.0))
    written(tmp_path, Entry(sessions=[(session(1), Liveness(1.0))]), Entry(sessions=[(later, Liveness(2.0))]))
    assert read(tmp_path).restored.sessions == ((later, Liveness(2.0)),)


def test_one_id_on_two_keys_is_two_rows(tmp_path: Path) -> None:
    other = session(1, public_key=key(2))
    written(tmp_path, Entry(sessions=[(session(1), None), (other, None)]))
    assert {held.public_key for held, _ in read(tmp_path).restored.sessions} == {key(1), key(2)}


def test_times_of_another_boot_are_void(tmp_path: Path) -> None:
    alive = Liveness(10.0, 1_800_000_001.5, 20.0, 30.0)
    never = Liveness(10.0)
    entry = Entry(sessions=[(session(1), alive), (session(2), never)], contact=Now(50.0, 1_800_000_000.0))
    written(tmp_path, entry)
    loaded = read(tmp_path, "another boot")
    sessions = {held.id: (held, life) for held, life in loaded.restored.sessions}
    assert sessions["s1"][0].deadline == Deadline(None, 1_800_003_000.75)
    # The kernel's stamp stays, to see it change; that there was life stays, the moment does not.
    assert sessions["s1"][1] == Liveness(0.0, 1_800_000_001.5, None, 0.0)
    assert sessions["s2"][1] == Liveness(0.0)
    assert loaded.contact == Contact(None, 1_800_000_000.0)
    assert read(tmp_path).contact == Contact(50.0, 1_800_000_000.0)


def test_an_end_takes_the_session_keeps_its_id_dead_and_waits_to_be_reported(tmp_path: Path) -> None:
    written(
        tmp_path,
        Entry(sessions=[(session(1), None), (session(2), None)]),
        Entry(ends=[(end(1), 1_800_000_000.125)]),
    )
    loaded = read(tmp_path)
    assert [held.id for held, _ in loaded.restored.sessions] == ["s2"]
    assert loaded.restored.ended == (("s1", 1_800_000_000.125),)
    assert loaded.ends == (end(1),)


def test_ends_come_back_in_their_order_and_each_once(tmp_path: Path) -> None:
    numbers = [5, 3, 9, 1]
    written(
        tmp_path,
        *(Entry(ends=[(end(n, reason), 1.0)]) for n, reason in zip(numbers, EndReason, strict=False)),
        Entry(ends=[(end(3, EndReason.OPERATOR), 2.0)]),
    )
    assert [e.session_id for e in read(tmp_path).ends] == ["s5", "s3", "s9", "s1"]
    assert [e.reason for e in read(tmp_path).ends] == list(EndReason)[:4]
    assert dict(read(tmp_path).restored.ended)["s3"] == 1.0


def test_a_reported_end_is_dead_all_the_same(tmp_path: Path) -> None:
    written(tmp_path, Entry(ends=[(end(1), 1.0), (end(2), 1.0)]), Entry(reported=["s1"]))
    assert [e.session_id for e in read(tmp_path).ends] == ["s2"]
    assert {id_ for id_, _ in read(tmp_path).restored.ended} == {"s1", "s2"}


def test_forgotten_ids_are_forgotten(tmp_path: Path) -> None:
    written(tmp_path, Entry(ends=[(end(1), 1.0), (end(2), 1.0)]), Entry(forgotten=["s1"]))
    assert read(tmp_path).restored.ended == (("s2", 1.0),)


def test_traffic_comes_back_without_the_endpoint(tmp_path: Path) -> None:
    held = Traffic(1 << 50, 2, 3, 4, 1_800_000_000.5)
    written(tmp_path, Entry(traffic=[(key(1), Traffic(9, 9, 9, 9))]), Entry(traffic=[(key(1), held)]))
    assert read(tmp_path).traffic == ((key(1), held),)


def test_location_settings_and_policy_come_back(tmp_path: Path) -> None:
    written(tmp_path, Entry(location=PLACE))
    restored = read(tmp_path).restored
    assert (restored.location, restored.interface, restored.session_policy) == PLACE


def test_core_s_list_comes_back_without_keys_and_sessions(tmp_path: Path) -> None:
    listed = [
        peer(1, "10.8.0.1", "fd00::/64", name="ä\u202ename", persistent_keepalive=25, mfa_exempt=True),
        peer(2, preshared_key=psk(2)),
        peer(3, session=grant("s3", 3)),
        peer(4, fault=Refusal.INVALID_ALLOWED_IPS),
        peer(5, session_fault=Refusal.INVALID_TIME),
        peer(6),
    ]
    written(tmp_path, Entry(peers=listed), Entry(unlisted=[key(6)]))
    expected = [
        listed[0],
        listed[1]._replace(preshared_key=None, static_key_unknown=True),
        listed[2]._replace(session=None),
        listed[3],
        listed[4]._replace(session_fault=None, fault=Refusal.INVALID_TIME),
    ]
    assert sorted(read(tmp_path).restored.peers, key=lambda p: p.public_key) == expected


def test_a_static_key_that_only_core_knows_stays_known_as_such(tmp_path: Path) -> None:
    written(tmp_path, Entry(peers=[peer(1, preshared_key=psk(1))]))
    written(tmp_path, Entry(peers=list(read(tmp_path).restored.peers)))
    assert [p.static_key_unknown for p in read(tmp_path).restored.peers] == [True]


@pytest.mark.parametrize("addresses", [SETTINGS.addresses, ()], ids=["some", "none"])
def test_the_agents_own_addresses_come_back(tmp_path: Path, addresses: tuple[InterfaceAddress, ...]) -> None:
    written(tmp_path, Entry(addresses=(InterfaceAddress(b"\x01\x02\x03\x04", 32),)))
    written(tmp_path, Entry(addresses=addresses))
    assert read(tmp_path).addresses == addresses


def test_an_empty_entry_writes_nothing(tmp_path: Path) -> None:
    written(tmp_path, Entry())
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "boot")
    journal.write(Entry(sessions=[(session(1), None)]))
    broken = session(3, id=object())
    with pytest.raises(JournalError):
        journal.write(Entry(sessions=[(session(2), None), (broken, None)]))
    journal.close()
    assert [held.id for held, _ in read(tmp_path).restored.sessions] == ["s1"]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nobody_else_may_read_any_of_its_files(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        journal = Journal(tmp_path, "boot")
        journal.write(Entry(location=PLACE))
    finally:
        os.umask(before)
    names = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert names == dict.fromkeys(("journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"), 0o600)
    journal.close()


# Durability.


def test_a_process_that_is_killed_right_after_a_write_has_written(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; from agent.journal import *; "
        "j = Journal(pathlib.Path(sys.argv[1]), 'boot'); "
        "j.write(Entry(reported=['x'], forgotten=['y'], probe=True)); "
        "print(j._connection.execute('PRAGMA journal_mode').fetchone()[0], "
        "j._connection.execute('PRAGMA synchronous').fetchone()[0], flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.strip()) == (-9, "wal 2")
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    with contextlib.closing(connection):
        assert connection.execute("SELECT name FROM meta").fetchall() == [("probe",)]


# Faults.


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_journal_error_and_over_when_there_is_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "boot")
    journal.write(Entry(sessions=[(session(1), None)]))
    many = Entry(sessions=[(session(n), None) for n in range(2, 400)])
    with full_disk(100_000), pytest.raises(JournalError) as caught:
        journal.write(many)
    assert "journal.sqlite" in str(caught.value)
    journal.write(Entry(sessions=[(session(500), None)]))
    journal.close()
    assert {held.id for held, _ in read(tmp_path).restored.sessions} == {"s1", "s500"}


def test_no_room_for_even_the_first_byte_is_no_corruption(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "boot")
    with full_disk(0), pytest.raises(JournalError):
        journal.load()
    assert journal.set_aside is None
    assert journal.load().restored.sessions == ()
    journal.close()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own on ``folder``."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def can_be_written(journal: Journal) -> bool:
    return journal.unwritable is None


@pytest.mark.parametrize("disk", ["read-only", "full"])
def test_a_disk_that_can_only_be_read_is_read(tmp_path: Path, disk: str) -> None:
    state, scratch = tmp_path / "state", tmp_path / "scratch"
    state.mkdir()
    scratch.mkdir()
    with small_disk(state):
        # Not closed: what was written last is in the write-ahead log.
        before = Journal(state, "boot")
        before.write(Entry(sessions=[(session(1), None)], location=PLACE))
        crash = [(file, file.read_bytes()) for file in state.iterdir() if not file.name.endswith("-shm")]
        before.close()
        for file, content in crash:
            file.write_bytes(content)
        if disk == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", state], check=True)
        else:
            with contextlib.suppress(OSError), (state / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
        journal = Journal(state, "boot", scratch)
        loaded = journal.load()
        assert [held.id for held, _ in loaded.restored.sessions] == ["s1"]
        assert loaded.restored.location == PLACE[0]
        assert can_be_written(journal) is False
        assert list(scratch.iterdir()) == []
        with pytest.raises(JournalError, match="can't be used"):
            journal.write(Entry(sessions=[(session(2), None)]))
        if disk == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", state], check=True)
        else:
            (state / "filler").unlink()
        journal.write(Entry(sessions=[(session(2), None)]))
        assert [held.id for held, _ in journal.load().restored.sessions] == ["s1", "s2"]
        assert can_be_written(journal)
        journal.close()


@pytest.mark.parametrize("call", ["load", "write"])
def test_a_folder_that_is_not_there_is_a_journal_error_until_it_is(tmp_path: Path, call: str) -> None:
    folder = tmp_path / "later"
    journal = Journal(folder, "boot")
    with pytest.raises(JournalError):
        journal.load() if call == "load" else journal.write(Entry(probe=True))
    folder.mkdir()
    journal.write(Entry(sessions=[(session(1), None)]))
    journal.close()
    assert len(read(folder).restored.sessions) == 1


def test_a_locked_journal_is_a_journal_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, Entry(sessions=[(session(1), None)]))
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **kw: connect(path, **{**kw, "timeout": 0.05}))
    holder = connect(tmp_path / "journal.sqlite")
    holder.execute("BEGIN IMMEDIATE")
    journal = Journal(tmp_path, "boot")
    with pytest.raises(JournalError):
        journal.write(Entry(probe=True))
    assert journal.set_aside is None
    holder.close()
    journal.write(Entry(probe=True))
    journal.close()


def damaged(folder: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as connection, connection:
        connection.execute(statement, values)


def record(fields: dict[str, object], changed: dict[str, object]) -> bytes:
    """As ``agent.journalrows`` writes it, in the order of its fields."""
    assert changed.keys() <= fields.keys()
    return msgspec.msgpack.encode(list((fields | changed).values()))


def session_record(**changed: object) -> bytes:
    fields: dict[str, object] = {
        "psk_digest": bytes(32),
        "former_digest": None,
        "granted_at": 1.0,
        "expires_at": 2.0,
        "ends_at": 2.0,
        "boot_id": "boot",
        "deadline_boot": 1.0,
        "deadline_wall": 1.0,
        "in_use": True,
        "base_rx": 0,
        "base_tx": 0,
        "life": (1.0, 0.0, None, None),
    }
    return record(fields, changed)


def peer_record(**changed: object) -> bytes:
    fields: dict[str, object] = {
        "name": "alice",
        "allowed_ips": ((b"\n\x08\0\1", 32),),
        "persistent_keepalive": 0,
        "mfa_exempt": False,
        "has_preshared_key": False,
        "fault": None,
    }
    return record(fields, changed)


FILLED = Entry(
    sessions=[(session(1), Liveness(1.0))],
    ends=[(end(2), 1.0)],
    traffic=[(key(1), Traffic(1, 2, 3, 4))],
    peers=[peer(1)],
    location=PLACE,
    contact=Now(1.0, 2.0),
    addresses=SETTINGS.addresses,
)


@pytest.mark.parametrize(
    ("statement", "value"),
    [("UPDATE sessions SET record = ?", session_record()), ("UPDATE peers SET record = ?", peer_record())],
)
def test_a_record_as_it_should_be_is_read(tmp_path: Path, statement: str, value: bytes) -> None:
    written(tmp_path, FILLED)
    damaged(tmp_path, statement, value)
    journal = Journal(tmp_path, "boot")
    assert len(journal.load().restored.sessions) == len(journal.load().restored.peers) == 1
    assert journal.set_aside is None
    journal.close()


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE sessions SET public_key = ?", b"short"),
        ("UPDATE sessions SET public_key = ?", "text"),
        ("UPDATE sessions SET record = ?", None),
        ("UPDATE sessions SET record = ?", "text"),
        ("UPDATE sessions SET record = ?", b""),
        ("UPDATE sessions SET record = ?", session_record(deadline_wall=None)),
        ("UPDATE sessions SET record = ?", session_record(expires_at="soon")),
        ("UPDATE sessions SET record = ?", session_record(psk_digest=b"short")),
        ("UPDATE sessions SET record = ?", session_record(former_digest=b"")),
        ("UPDATE sessions SET record = ?", session_record(life=("text", 0.0, None, None))),
        ("UPDATE sessions SET record = ?", session_record() + b"\0"),
        ("UPDATE sessions SET record = ?", session_record(deadline_wall=math.nan)),
        ("UPDATE sessions SET record = ?", session_record(deadline_boot=math.nan)),
        ("UPDATE sessions SET record = ?", session_record(ends_at=math.inf)),
        ("UPDATE sessions SET record = ?", session_record(life=(1.0, math.nan, None, None))),
        ("UPDATE unreported_ends SET reason = ?", "boredom"),
        ("UPDATE unreported_ends SET rx_bytes = ?", "many"),
        ("UPDATE ended SET granted_at = ?", None),
        ("UPDATE traffic SET rx_bytes = ?", b"\xff"),
        ("UPDATE peers SET public_key = ?", b""),
        ("UPDATE peers SET record = ?", "text"),
        ("UPDATE peers SET record = ?", peer_record(allowed_ips=((b"\n\x08\0\1", 33),))),
        ("UPDATE peers SET record = ?", peer_record(allowed_ips=((b"\n\x08\0\1", 24),))),
        ("UPDATE peers SET record = ?", peer_record(allowed_ips=((b"\n\x08\0", 24),))),
        ("UPDATE peers SET record = ?", peer_record(fault="boredom")),
        ("UPDATE peers SET record = ?", peer_record(name=b"\xff\xfe")),
        ("UPDATE meta SET value = ? WHERE name = 'location'", "{"),
        ("UPDATE meta SET value = ? WHERE name = 'contact'", '["boot", "x", 1]'),
        ("UPDATE meta SET value = ? WHERE name = 'addresses'", "[1]"),
    ],
)
def test_a_damaged_row_sets_the_journal_aside(tmp_path: Path, statement: str, value: object) -> None:
    written(tmp_path, FILLED)
    damaged(tmp_path, statement, value)
    journal = Journal(tmp_path, "boot")
    assert journal.load() == Loaded(journal.load().restored)
    assert journal.set_aside == tmp_path / "journal.sqlite.unreadable-1"
    assert journal.set_aside.exists()
    journal.write(FILLED)
    journal.close()
    assert len(read(tmp_path).restored.sessions) == 1


@pytest.mark.parametrize("statement", ["DROP TABLE sessions", "ALTER TABLE peers DROP COLUMN record"])
def test_a_journal_without_what_this_version_has_is_set_aside(tmp_path: Path, statement: str) -> None:
    written(tmp_path, FILLED)
    damaged(tmp_path, statement)
    journal = Journal(tmp_path, "boot")
    assert journal.load().restored.sessions == ()
    assert journal.set_aside is not None
    journal.close()


# Of another version.

OTHER = Entry(
    sessions=[(session(1), Liveness(1.0))],
    ends=[(end(n), n / 4) for n in (5, 2, 9)],
    peers=[peer(1)],
    location=PLACE,
)


def of_another_version(folder: Path, *statements: str, version: int = 99) -> None:
    """Of its ends s5 has been reported."""
    written(folder, OTHER, Entry(reported=["s5"]))
    for statement in (*statements, f"PRAGMA user_version = {version}"):
        damaged(folder, statement)


@pytest.mark.parametrize("version", [2, 4, 99])
def test_the_dead_and_the_unreported_ends_of_another_version_are_taken_over(
    tmp_path: Path, version: int
) -> None:
    of_another_version(
        tmp_path,
        "ALTER TABLE sessions ADD COLUMN colour TEXT",
        'CREATE TABLE "of ""later" (id INTEGER PRIMARY KEY AUTOINCREMENT)',
        "CREATE VIEW seen AS SELECT id FROM sessions",
        "CREATE TABLE meta2 (name TEXT)",
        "DROP TABLE peers",
        version=version,
    )
    journal = Journal(tmp_path, "boot")
    loaded = journal.load()
    assert dict(loaded.restored.ended) == {"s5": 1.25, "s2": 0.5, "s9": 2.25}
    assert loaded.ends == (end(2), end(9))
    assert loaded == Loaded(Restored(ended=loaded.restored.ended), ends=loaded.ends)
    assert journal.set_aside == tmp_path / "journal.sqlite.unreadable-1"
    assert journal.set_aside.stat().st_mode & 0o777 == 0o600
    journal.write(Entry(sessions=[(session(3), None)], ends=[(end(4), 4.0)], peers=[peer(1)]))
    journal.close()
    again = read(tmp_path)
    assert (len(again.restored.ended), len(again.ends), len(again.restored.peers)) == (4, 3, 1)
    with contextlib.closing(sqlite3.connect(journal.set_aside)) as former:
        assert former.execute("PRAGMA user_version").fetchone() == (version,)
        assert former.execute("SELECT id, colour FROM sessions").fetchall() == [("s1", None)]
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as anew:
        assert not anew.execute("SELECT name FROM sqlite_master WHERE name IN ('meta2', 'seen')").fetchall()


@pytest.mark.parametrize(
    ("statement", "dead", "ends"),
    [
        ("ALTER TABLE ended ADD COLUMN realm TEXT", 0, 2),
        ("ALTER TABLE ended RENAME COLUMN granted_at TO born", 0, 2),
        ("DROP TABLE ended", 0, 2),
        ("UPDATE ended SET granted_at = NULL WHERE id = 's9'", 0, 2),
        ("ALTER TABLE unreported_ends DROP COLUMN tx_bytes", 3, 0),
        ("UPDATE unreported_ends SET reason = 'boredom' WHERE id = 's9'", 3, 0),
    ],
)
def test_a_table_that_is_not_as_in_this_version_is_not_taken_over(
    tmp_path: Path, statement: str, dead: int, ends: int
) -> None:
    of_another_version(tmp_path, statement)
    loaded = read(tmp_path)
    assert (len(loaded.restored.ended), len(loaded.ends)) == (dead, ends)


def test_another_versions_journal_without_either_is_set_aside(tmp_path: Path) -> None:
    of_another_version(tmp_path, "DROP TABLE ended", "DROP TABLE unreported_ends")
    journal = Journal(tmp_path, "boot")
    assert journal.load() == Loaded(Restored())
    assert journal.set_aside is not None
    journal.close()


def test_a_disk_that_has_no_room_to_take_over_loses_nothing(tmp_path: Path) -> None:
    of_another_version(tmp_path)
    before = (tmp_path / "journal.sqlite").read_bytes()
    journal = Journal(tmp_path, "boot")
    with full_disk(len(before) // 2), pytest.raises(JournalError):
        journal.load()
    assert journal.set_aside is None
    assert not list(tmp_path.glob("*unreadable*"))
    assert len(journal.load().restored.ended) == 3
    journal.close()


@pytest.mark.parametrize("value", ["{", b"\xff\xfe", '{"boot_id": 1, "stopped": false, "starts": {}}'])
def test_damage_to_what_only_metrics_ask_for_costs_nothing_else(tmp_path: Path, value: str | bytes) -> None:
    written(tmp_path, FILLED, Entry(lives=Lives("boot", stopped=False, starts={"first": 1})))
    assert read(tmp_path).lives is not None
    damaged(tmp_path, "UPDATE meta SET value = CAST(? AS TEXT) WHERE name = 'lives'", value)
    journal = Journal(tmp_path, "boot")
    loaded = journal.load()
    assert loaded.lives is None
    assert [held.id for held, _ in loaded.restored.sessions] == ["s1"]
    assert journal.set_aside is None
    journal.close()


@pytest.mark.parametrize(
    "content", [b"not a database, not at all" * 99, b"SQLite format 3\x00" + b"\xff" * 9000]
)
def test_a_file_that_is_no_database_is_set_aside_and_none_is_lost(tmp_path: Path, content: bytes) -> None:
    for number in (1, 2):
        (tmp_path / "journal.sqlite").write_bytes(content)
        journal = Journal(tmp_path, "boot")
        assert journal.load().restored.sessions == ()
        assert journal.set_aside == tmp_path / f"journal.sqlite.unreadable-{number}"
        assert journal.set_aside.read_bytes() == content
        journal.close()


@pytest.mark.parametrize("page", range(8))
def test_a_garbled_page_is_never_fatal_and_the_journal_goes_on(tmp_path: Path, page: int) -> None:
    written(tmp_path, FILLED, Entry(sessions=[(session(n), Liveness(1.0)) for n in range(3, 90)]))
    file = tmp_path / "journal.sqlite"
    content = bytearray(file.read_bytes())
    content[page * 4096 : page * 4096 + 600] = b"\xa5" * 600
    file.write_bytes(content)
    journal = Journal(tmp_path, "boot")
    journal.load()
    journal.write(Entry(sessions=[(session(1000), None)]))
    journal.close()
    assert "s1000" in {held.id for held, _ in read(tmp_path).restored.sessions}


@pytest.mark.parametrize("gone", ["the file", "all files", "replaced"])
def test_a_journal_whose_file_is_taken_away_is_written_anew_with_all_that_it_held(
    tmp_path: Path, gone: str
) -> None:
    journal = Journal(tmp_path, "boot")
    journal.load()
    journal.write(Entry(sessions=[(session(1), None)], ends=[(end(2), 1.0)]))
    journal.write(Entry(sessions=[(session(3), None)]))
    if gone == "replaced":
        (tmp_path / "other").mkdir()
        written(tmp_path / "other", Entry(sessions=[(session(9), None)]))
        (tmp_path / "other" / "journal.sqlite").replace(journal.path)
    else:
        for file in [journal.path] if gone == "the file" else list(tmp_path.glob("journal.sqlite*")):
            file.unlink()
    journal.write(Entry(probe=True))
    journal.write(Entry(sessions=[(session(4), None)]))
    journal.close()
    loaded = Journal(tmp_path, "boot").load()
    assert sorted(held.id for held, _ in loaded.restored.sessions) == ["s1", "s3", "s4"]
    assert (dict(loaded.restored.ended), [one.session_id for one in loaded.ends]) == ({"s2": 1.0}, ["s2"])
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("journal.sqlite*")} == {0o600}
    assert not list(tmp_path.glob("journal-*"))


def test_a_file_that_was_cut_to_nothing_is_begun_anew(tmp_path: Path) -> None:
    written(tmp_path, FILLED)
    (tmp_path / "journal.sqlite").write_bytes(b"")
    assert read(tmp_path).restored.sessions == ()
