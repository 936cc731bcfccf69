from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import daemon, folders
from agent.configfile import load_config
from agent.errors import ConfigError
from agent.folders import claim_state, owner_file, refuse_others_state, write_whole
from tests.commands.parts import write_config


def test_a_state_folder_is_the_first_ones_who_claims_it(tmp_path: Path) -> None:
    refuse_others_state(tmp_path, "wg1")
    claim_state(tmp_path, "wg0")
    claim_state(tmp_path, "wg0")

    with pytest.raises(ConfigError, match="belongs to the interface 'wg0', and this is the agent of wg1"):
        refuse_others_state(tmp_path, "wg1")
    with pytest.raises(ConfigError, match="belongs to the interface 'wg0'"):
        claim_state(tmp_path, "wg1")
    assert owner_file(tmp_path).read_text() == "wg0\n"
    assert owner_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_not_there_is_nobodys(tmp_path: Path) -> None:
    refuse_others_state(tmp_path / "none", "wg0")
    assert not (tmp_path / "none").exists()


@contextmanager
def full_disk() -> Iterator[None]:
    """Files can be made in here, and nothing can be written to them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_takes_no_files_keeps_nobody_from_starting(tmp_path: Path) -> None:
    with full_disk():
        claim_state(tmp_path, "wg0")
        claim_state(tmp_path / "none", "wg0")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_claimed_at_the_next_start_after_a_disk_was_full(tmp_path: Path) -> None:
    # What a start on a full disk used to leave.
    owner_file(tmp_path).touch()
    with full_disk():
        claim_state(tmp_path, "wg0")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("interface", "")]

    claim_state(tmp_path, "wg0")

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("interface", "wg0\n")]
    assert owner_file(tmp_path).stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="belongs to the interface 'wg0'"):
        claim_state(tmp_path, "wg1")


def test_of_two_who_claim_a_folder_at_once_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path, content: bytes, *, replace: bool) -> None:
        owner_file(tmp_path).write_text("wg0\n")
        write_whole(path, content, replace=replace)

    monkeypatch.setattr(folders, "write_whole", late)

    with pytest.raises(ConfigError, match="belongs to the interface 'wg0'"):
        claim_state(tmp_path, "wg1")
    assert [path.name for path in tmp_path.iterdir()] == ["interface"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "one", b"before")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "one", b"after", replace=False)
    with full_disk(), pytest.raises(OSError, match="too large"):
        write_whole(tmp_path / "one", b"after")

    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("one", b"before")]


def test_the_agent_touches_nothing_of_another_interfaces(tmp_path: Path) -> None:
    path = write_config(tmp_path, name="wg1")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    claim_state(state, "wg0")
    (state / "journal.sqlite").write_text("wg0's")

    with pytest.raises(ConfigError, match="leave") as caught:
        daemon.run(load_config(path), path, None)

    assert "belongs to the interface 'wg0'" in caught.value.message
    assert {one.name for one in state.iterdir()} == {"interface", "journal.sqlite"}
    assert (state / "journal.sqlite").read_text() == "wg0's"
