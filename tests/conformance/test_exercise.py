"""The program that has core make changes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from agent.conformance import exercise
from agent.errors import ConfigError


def script(folder: Path, text: str) -> str:
    path = folder / "with space.py"
    path.write_text(text)
    return f"{sys.executable} -SE '{path}' --location hq"


def test_it_is_run_with_the_action_and_the_keys_after_its_own_arguments(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    run = exercise.command(
        script(tmp_path, f"import sys\nopen({str(seen)!r}, 'w').write(repr(sys.argv[1:]))")
    )
    assert asyncio.run(run("move", "one=", "other="))
    assert seen.read_text() == "['--location', 'hq', 'move', 'one=', 'other=']"


def test_77_says_that_there_is_no_way_and_anything_else_ends_the_check(tmp_path: Path) -> None:
    assert not asyncio.run(exercise.command(script(tmp_path, "raise SystemExit(77)"))("restart"))
    with pytest.raises(ConfigError, match="restart ended with 3"):
        asyncio.run(exercise.command(script(tmp_path, "raise SystemExit(3)"))("restart"))


def test_one_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise, "_PATIENCE", 0.5)
    with pytest.raises(ConfigError, match="grant took more than"):
        asyncio.run(exercise.command(script(tmp_path, "import time\ntime.sleep(600)"))("grant"))
