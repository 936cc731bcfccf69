"""pipx installs from the checkout, as docs/install.md says: no lock, the newest libraries that fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent import __version__
from tests.support.package import ROOT


@pytest.mark.timeout(900)
def test_pipx_installs_from_the_checkout_a_command_that_works(tmp_path: Path) -> None:
    places = {
        "PIPX_HOME": tmp_path / "home",
        "PIPX_BIN_DIR": tmp_path / "bin",
        "PIPX_MAN_DIR": tmp_path / "man",
    }
    pipx = [sys.executable, "-m", "pipx"]
    env = {**os.environ, **{name: str(place) for name, place in places.items()}}
    env = {name: value for name, value in env.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}

    done = subprocess.run(
        [*pipx, "install", f"{ROOT}[defguard,sandbox]"], env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    command = tmp_path / "bin/wg-agent"
    assert subprocess.check_output([command, "--version"], text=True, cwd="/") == f"wg-agent {__version__}\n"
    # Its own code and not the checkout's, with the extras.
    python = tmp_path / "home/venvs/wg-agent/bin/python"
    where = "import agent.daemon, agent.core.defguard.connection, agent.sandbox.demo; print(agent.__file__)"
    printed = subprocess.check_output([python, "-Ic", where], text=True, cwd="/").strip()
    assert Path(printed).is_relative_to(tmp_path)
    subprocess.run([*pipx, "uninstall", "wg-agent"], env=env, capture_output=True, check=True)
    assert not command.exists()
