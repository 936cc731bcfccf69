from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent import __version__, configfile
from agent.__main__ import main
from agent.lock import InterfaceLock
from tests.commands.parts import Agent, an_agent, wg_agent, write_config

HEAVY = {"pyroute2", "uvicorn", "apscheduler", "httpx", "prometheus_client"}


def usage_error(*argv: str) -> bool:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code == 2


def test_the_version_is_the_packages() -> None:
    assert wg_agent("--version").stdout == f"wg-agent {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("fly",),
        ("status", "--jsn"),
        ("plan", "wg0"),
        ("status", "--state", "gone"),
        ("status", "--sort", "luck"),
        ("plan", "--watch"),
    ],
)
def test_wrong_usage_ends_with_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(*argv)
    assert "usage: wg-agent" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "check", "status", "plan", "end", "purge"])
def test_a_configuration_that_cannot_be_read_ends_with_2_and_the_remedy(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "none.toml")
    more = ["--all"] if command == "end" else []

    assert main([command, "-c", missing, *more]) == 2
    assert main(["-c", missing, command, *more]) == 2

    captured = capsys.readouterr()
    assert f"{missing} does not exist" in captured.err
    assert "copy config.example.toml there" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["run", "status", "plan", "purge"])
def test_a_configuration_with_a_fault_ends_with_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, more="[stats]\nintervall = 3")

    assert main([command, "-c", str(path)]) == 2
    assert "unknown key stats.intervall; did you mean stats.interval?" in capsys.readouterr().err


def test_the_configuration_may_be_named_before_or_after_the_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path))

    with an_agent(Path(path), Agent()):
        for argv in (
            ["-c", path, "status", "--json"],
            ["status", "-c", path, "--json"],
            ["status", "--json", "-c", path],
            ["--config", path, "-i", "wg0", "status", "--json"],
        ):
            assert main(argv) == 0
            assert '"core_connected": true' in capsys.readouterr().out


def test_an_interface_names_its_file_and_the_only_file_needs_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configfile, "FOLDER", tmp_path)
    write_config(tmp_path).rename(tmp_path / "wg7.toml")

    for argv in (["status"], ["status", "-i", "wg7"], ["-i", "wg7", "status"]):
        assert main(argv) == 1
        assert f"no agent answers at {tmp_path}/run/wg7.sock" in capsys.readouterr().err


def test_several_files_without_a_name_are_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configfile, "FOLDER", tmp_path)
    (tmp_path / "wg7.toml").touch()
    (tmp_path / "wg8.toml").touch()

    assert main(["status"]) == 2
    assert "name one: -i wg7, -i wg8" in capsys.readouterr().err


def test_an_interface_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "-i", "../etc"]) == 2
    assert "-i: " in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["status"], ["status", "--watch"], ["plan"], ["end", "--all"]])
def test_without_a_running_agent_it_ends_with_1_and_says_what_to_do(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "-c", str(write_config(tmp_path))]) == 1
    captured = capsys.readouterr()
    assert "no agent answers" in captured.err
    assert "systemctl status wg-agent@wg0" in captured.err
    assert captured.out == ""


def test_run_without_its_token_ends_with_2(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    (tmp_path / "token").unlink()

    done = wg_agent("run", "-c", path)

    assert done.returncode == 2
    assert "core.token_file" in done.stderr
    assert "create it with mode 600" in done.stderr


def test_run_beside_another_agent_ends_with_1(tmp_path: Path) -> None:
    path = write_config(tmp_path)

    with InterfaceLock(tmp_path / "run", "wg0"):
        done = wg_agent("run", "-c", path)

    assert done.returncode == 1
    assert "runs on wg0" in done.stderr
    assert "stop that one first" in done.stderr


def test_asking_a_running_agent_imports_none_of_its_machinery(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    argv = ["status", "-c", str(path)]
    code = f"import sys\nfrom agent.__main__ import main\nmain({argv})\nprint(*sys.modules)"

    with an_agent(path, Agent()):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_the_demo_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyotp", None)  # as where it is not installed

    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "pyotp" in error
    assert "pipx install '.[sandbox]'" in error


def test_a_reader_that_has_gone_is_no_traceback(tmp_path: Path) -> None:
    path = write_config(tmp_path)

    with an_agent(path, Agent()):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "agent", "status", "--json", "-c", str(path)],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writer)

    assert (done.returncode, done.stderr) == (1, b"")


def test_the_daemon_does_without_what_only_its_libraries_would_import() -> None:
    code = """
import sys
from agent.commands.run import load_daemon
daemon = load_daemon()
unused = {"rich", "pygments", "httpx._main", "pyroute2.ndb.main", "unittest.case"}
print(daemon.__name__, unused & sys.modules.keys())
import rich, httpx._main
import unittest
print(unittest.mock.__name__, unittest.TestCase.__module__)
from pyroute2 import netns, NDB, WireGuard
import pyroute2
print(netns.__name__, NDB.__name__, pyroute2.WireGuard is WireGuard, "__getattr__" in vars(pyroute2))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "agent.daemon set()\nunittest.mock unittest.case\npyroute2.netns NDB True False\n"
