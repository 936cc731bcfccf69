"""``wg-agent conformance`` as a program, against a core of ours and against what is none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.__main__ import main
from agent.conformance.clauses import CLAUSES, SECTIONS
from tests.commands.parts import a_core, beside, wg_agent
from tests.conformance.site import Site, site
from tests.core.fakes import TOKEN, answer

PROGRAM = Path(__file__).parents[1] / "conformance" / "ask_site.py"


@dataclass
class Shown:
    site: Site
    token_file: Path
    exercise: str

    def conformance(self, *argv: str) -> subprocess.CompletedProcess[str]:
        url = self.site.service.gateway_url
        return wg_agent("conformance", "--core", url, "--token-file", self.token_file, *argv)

    def devices(self) -> set[str]:
        """The names of what core lists."""
        with closing(sqlite3.connect(self.site.service.config.database)) as database:
            return {name for (name,) in database.execute("SELECT name FROM devices")}

    def secrets(self) -> list[str]:
        """The token and every PSK that core has given."""
        with closing(sqlite3.connect(self.site.service.config.database)) as database:
            psks = database.execute("SELECT psk FROM sessions WHERE psk IS NOT NULL").fetchall()
        return [self.site.service.gateway_token, *(b64encode(psk).decode() for (psk,) in psks)]


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Shown]:
    """A core on a unix socket beside the test, whose exercise listens on another."""

    @asynccontextmanager
    async def serving() -> AsyncIterator[Shown]:
        async with site(listen=f"unix:{tmp_path}/core.sock") as running:

            async def exercise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                action, *keys = (await reader.readline()).decode().split()
                # A new database would take the PSKs along that the output is searched for.
                done = action != "new-history" and await running(action, *keys)
                writer.write(b"0" if done else b"77")
                await writer.drain()
                writer.close()

            server = await asyncio.start_unix_server(exercise, tmp_path / "exercise.sock")
            token_file = tmp_path / "token"
            token_file.write_text(running.service.gateway_token)
            token_file.chmod(0o600)
            yield Shown(running, token_file, f"{sys.executable} -SE {PROGRAM} {tmp_path}/exercise.sock")
            server.close()

    with beside(serving) as shown:
        yield shown


def test_a_good_core_ends_with_0_and_no_secret_is_shown(core: Shown) -> None:
    done = core.conformance("--exercise", core.exercise)

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{len(CLAUSES) - 1} passed, 0 failed, 1 skipped"
    for section in SECTIONS:
        assert section.title in lines
    for clause in CLAUSES.values():
        sign = "-" if clause.id == "restart.new-epoch" else "✓"
        assert f"  {sign} {clause.id}: {clause.text}" in lines
    secrets = core.secrets()
    assert len(secrets) >= 4
    assert not [secret for secret in secrets if secret in done.stdout]


def test_json_has_every_clause_with_what_was_seen_and_what_takes_changes_is_skipped(core: Shown) -> None:
    done = core.conformance("--json")

    assert done.returncode == 0
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["ok"] is document["complete"] is True
    clauses = {entry["id"]: entry for entry in document["clauses"]}
    assert list(clauses) == list(CLAUSES)
    skipped = {name for name, entry in clauses.items() if entry["mark"] == "skip"}
    assert document["skip"] == len(skipped)
    # Core has a session, of which alone nothing can be told.
    assert skipped == {name for name in CLAUSES if name.startswith(("change.", "session.", "restart."))} | {
        "ends.taken",
        "stream.complete",
    }
    assert clauses["state.etag"]["seen"].startswith("ETag is ")
    assert not [secret for secret in core.secrets() if secret in done.stdout]


def test_a_watch_judges_the_changes_that_are_made_meanwhile(core: Shown) -> None:
    url = core.site.service.gateway_url
    argv = [sys.executable, "-m", "agent", "conformance", "--core", url, "--watch", "4", "--json"]
    argv += ["--token-file", str(core.token_file)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        ask = [*core.exercise.split(), "location"]
        while process.poll() is None:
            subprocess.run(ask, check=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        assert process.stdout is not None
        document = json.loads(process.stdout.read())

    marks = {entry["id"]: entry["mark"] for entry in document["clauses"]}
    assert document["ok"] is True
    assert marks["change.location-changed"] == marks["change.snapshot-agrees"] == "pass"
    assert marks["change.session-granted"] == "skip"


def test_a_core_that_is_not_there_ends_with_1_and_all_else_is_skipped(tmp_path: Path) -> None:
    token = _token(tmp_path)
    done = wg_agent("conformance", "--core", "http://127.0.0.1:1/", "--token-file", token)

    assert done.returncode == 1
    assert "✗ connection.reachable" in done.stdout
    assert "Connection refused" in done.stdout
    assert done.stdout.count("✗") == 1
    assert f"0 passed, 1 failed, {len(CLAUSES) - 1} skipped" not in done.stdout
    assert f"1 passed, 1 failed, {len(CLAUSES) - 2} skipped" in done.stdout  # no redirect came


@pytest.mark.parametrize(
    ("status", "headers", "clause", "seen"),
    [
        (401, {}, "connection.reachable", "core refuses the token (401)"),
        (503, {}, "connection.reachable", "core answered 503"),
        (302, {"Location": "https://elsewhere.example/"}, "connection.no-redirects", "core redirects (302)"),
        (302, {"Location": "https:login"}, "connection.reachable", "headers that can't be read"),
    ],
)
def test_what_keeps_the_state_away_is_the_one_failure(
    status: int, headers: dict[str, str], clause: str, seen: str, tmp_path: Path
) -> None:
    with a_core() as told:
        told.on("state", answer(status, TOKEN.encode(), **headers))
        done = wg_agent("conformance", "--core", told.url, "--token-file", _token(tmp_path), "--json")

    assert done.returncode == 1
    (failed,) = [entry for entry in json.loads(done.stdout)["clauses"] if entry["mark"] == "fail"]
    assert failed["id"] == clause
    assert seen in failed["seen"]
    assert failed["remedy"] == CLAUSES[clause].remedy
    assert TOKEN not in done.stdout


def _token(folder: Path, mode: int = 0o600) -> str:
    path = folder / "token"
    path.write_text(TOKEN)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "it takes a core and a token"),
        (["--core", "https://core.example.com/"], "it takes a core and a token"),
        (["--core", "http://core.example.com/", "TOKEN"], "anybody on the way reads PSKs"),
        (["--core", "core.example.com", "TOKEN"], "is not an https:// URL"),
        (["--core", "http://127.0.0.1:1/", "TOKEN", "--watch", "-1"], "--watch is not a number of seconds"),
        (
            ["--core", "http://127.0.0.1:1/", "TOKEN", "--exercise", "true", "--watch", "9"],
            "don't go together",
        ),
        (["--core", "http://127.0.0.1:1/", "TOKEN", "--exercise", " "], "--exercise is empty"),
        (["--core", "http://127.0.0.1:1/", "TOKEN", "--exercise", "a 'b"], "--exercise can't be read"),
        (["--core", "https://127.0.0.1:1/", "TOKEN", "--ca-file", "/nowhere"], "core.ca_file /nowhere"),
    ],
)
def test_wrong_usage_ends_with_2_and_the_remedy(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = ["--token-file", _token(tmp_path)]
    given = [part for arg in argv for part in (token if arg == "TOKEN" else [arg])]

    assert main(["conformance", *given]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_files_that_others_may_read_hold_no_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["conformance", "--core", "https://127.0.0.1:1/", "--token-file"]
    assert main([*argv, _token(tmp_path, 0o644)]) == 2
    assert "so others may read it" in capsys.readouterr().err

    key = tmp_path / "key.pem"
    key.write_text("a key")
    key.chmod(0o640)
    assert main([*argv, _token(tmp_path), "--client-key-file", str(key)]) == 2
    assert "--client-key-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "said"), [("/nowhere/x", "/nowhere/x can't be run"), ("false", "upsert ended with 1")]
)
def test_an_exercise_that_fails_is_wrong_usage_and_not_cores_fault(
    program: str, said: str, core: Shown
) -> None:
    done = core.conformance("--exercise", program)

    assert done.returncode == 2
    assert said in done.stderr
    lines = done.stdout.splitlines()
    assert f"  ✓ state.json: {CLAUSES['state.json'].text}" in lines
    assert f"  - restart.continues: {CLAUSES['restart.continues'].text}" in lines
    assert any(line.startswith(f"      not reached: --exercise: {said}") for line in lines)
    assert "      not reached: upsert did not come to a good end" in lines
    assert lines[-1].endswith(" skipped")
    # The program can't be asked to remove what it may have made.
    assert "wg-agent: core may still list the check's own peers: remove " in done.stderr


def test_ctrl_c_shows_what_was_seen_until_then(core: Shown) -> None:
    url = core.site.service.gateway_url
    argv = [sys.executable, "-m", "agent", "conformance", "--core", url, "--watch", "600", "--json"]
    argv += ["--token-file", str(core.token_file)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # Until the change is in the stream that is being watched.
        for _ in range(8):
            subprocess.run([*core.exercise.split(), "location"], check=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, err) == (130, "")
    document = json.loads(out)
    assert (document["ok"], document["complete"], document["fail"]) == (False, False, 0)
    clauses = {entry["id"]: entry for entry in document["clauses"]}
    assert clauses["state.json"]["mark"] == clauses["change.location-changed"]["mark"] == "pass"
    assert clauses["change.session-granted"]["seen"] == "not reached: the check was interrupted"


def test_ctrl_c_while_the_exercise_runs_takes_its_peers_out_of_core(core: Shown, tmp_path: Path) -> None:
    program = tmp_path / "slow"
    program.write_text(f'{core.exercise} "$@" || exit; test $1 != grant || sleep 600\n')
    before = core.devices()
    url = core.site.service.gateway_url
    argv = [sys.executable, "-m", "agent", "conformance", "--core", url, "--exercise", f"sh {program}"]
    argv += ["--token-file", str(core.token_file)]
    # A terminal's Ctrl-C is for the program of the exercise as well.
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while core.devices() == before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert core.devices() > before
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "wg-agent: " not in err  # the program may have said that it was interrupted
    assert f"  ✓ state.json: {CLAUSES['state.json'].text}" in out.splitlines()
    assert core.devices() == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_signs_gets_others(encoding: str, tmp_path: Path) -> None:
    argv = ["conformance", "--core", "http://127.0.0.1:1/", "--token-file", _token(tmp_path)]
    done = wg_agent(*argv, env={"PYTHONIOENCODING": encoding})

    lines = done.stdout.splitlines()
    assert f"  x connection.reachable: {CLAUSES['connection.reachable'].text}" in lines
    assert f"  + connection.no-redirects: {CLAUSES['connection.no-redirects'].text}" in lines
    assert f"      -> {CLAUSES['connection.reachable'].remedy}" in lines
    assert "\\u" not in done.stdout


def test_the_list_asks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--list"]) == 0
    shown = capsys.readouterr().out
    for clause in CLAUSES.values():
        assert f"  {clause.id}: {clause.text}\n" in shown

    assert main(["conformance", "--list", "--json"]) == 0
    assert [entry["id"] for entry in json.loads(capsys.readouterr().out)["clauses"]] == list(CLAUSES)


def test_it_takes_neither_the_sandbox_nor_what_that_needs() -> None:
    code = "import sys, agent.commands.conformance; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = done.stdout.split()
    assert "agent.conformance.walk" in loaded
    assert not [name for name in loaded if name.startswith(("agent.sandbox", "pyotp", "aiosmtp"))]
