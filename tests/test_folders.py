from __future__ import annotations

from pathlib import Path

import pytest

from agent import daemon
from agent.configfile import load_config
from agent.errors import ConfigError
from agent.folders import claim_state, owner_file, refuse_others_state
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


def test_a_folder_that_takes_no_files_keeps_nobody_from_starting(tmp_path: Path) -> None:
    # As when a disk was full: made, and with nothing in it.
    owner_file(tmp_path).touch()

    claim_state(tmp_path, "wg0")
    claim_state(tmp_path / "none", "wg0")
    assert owner_file(tmp_path).read_text() == ""
    assert not (tmp_path / "none").exists()


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
