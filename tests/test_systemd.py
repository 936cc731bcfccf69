from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.systemd import Notifier, take_service_result, watchdog_interval

UNIT = Path(__file__).parents[1] / "systemd" / "wg-agent@.service"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(2)
        yield sock


def notifier(manager: socket.socket) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": manager.getsockname()})


def test_each_state_is_told_in_systemds_words(manager: socket.socket) -> None:
    told = notifier(manager)

    told.ready("3 peers")
    told.status("core is away")
    told.watchdog()
    told.stopping()

    messages = [manager.recv(4096).decode() for _ in range(4)]
    assert messages == [
        "READY=1\nSTATUS=3 peers",
        "STATUS=core is away",
        "WATCHDOG=1",
        "STOPPING=1",
    ]
    told.close()


def test_a_reload_carries_the_monotonic_time_in_microseconds(manager: socket.socket) -> None:
    told = notifier(manager)
    before = time.monotonic_ns() // 1000
    told.reloading()
    after = time.monotonic_ns() // 1000

    first, second = manager.recv(4096).decode().split("\n")

    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= after
    told.close()


def test_a_status_cannot_forge_a_second_line(manager: socket.socket) -> None:
    told = notifier(manager)

    told.status("a\nMAINPID=1\r\nb")

    assert manager.recv(4096) == b"STATUS=a MAINPID=1 b"
    told.close()


def test_an_abstract_socket_is_reached() -> None:
    name = f"wg-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(2)
        told = Notifier({"NOTIFY_SOCKET": "@" + name})
        told.ready()
        assert sock.recv(4096) == b"READY=1"
        told.close()


def test_telling_a_manager_that_is_not_there_raises_nothing(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        told = Notifier(environ)
        told.ready("up")
        told.watchdog()
        told.close()
        told.stopping()


def test_a_manager_that_does_not_read_does_not_block_the_agent(manager: socket.socket) -> None:
    told = notifier(manager)
    began = time.monotonic()

    for _ in range(5000):
        told.status("x" * 1000)

    assert time.monotonic() - began < 10
    told.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_the_one_of_this_process(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_interval(environ) == seconds


def test_the_unit_says_what_the_agent_relies_on() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    service = dict(unit["Service"])

    expected = {
        "Type": "notify",
        "ExecStart": "/usr/bin/wg-agent run -i %i",
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "Restart": "always",
        "RestartPreventExitStatus": "2",
        "DynamicUser": "yes",
        "AmbientCapabilities": "CAP_NET_ADMIN",
        "CapabilityBoundingSet": "CAP_NET_ADMIN",
        "StateDirectory": "wg-agent/%i",
        "RuntimeDirectory": "wg-agent/%i",
        "StateDirectoryMode": "0700",
        "RuntimeDirectoryMode": "0700",
        "RuntimeDirectoryPreserve": "yes",
        "UMask": "0077",
        "LimitCORE": "0",
    }
    assert {name: service.get(name) for name in expected} == expected
    assert int(service["WatchdogSec"]) >= 10


def test_the_units_credentials_are_keys_of_the_configuration() -> None:
    from agent.config import KEYS

    named = re.findall(r"LoadCredential=([\w.]+):", UNIT.read_text())

    assert named
    assert {f"{name}_file" for name in named} <= set(KEYS)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_exposed_at_no_more_than_1_8() -> None:
    scored = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "Unknown option" in scored.stderr or "unrecognized" in scored.stderr:
        pytest.skip("this systemd-analyze can't judge a file")

    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", scored.stdout)

    assert found, scored.stderr
    assert float(found[1]) <= 1.8


def test_what_the_unit_left_of_the_last_process_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "service-result").write_text("watchdog\n")

    assert [take_service_result(tmp_path) for _ in range(2)] == ["watchdog", ""]


def test_a_result_that_is_none_is_not_believed_and_does_not_stop_the_agent(tmp_path: Path) -> None:
    (tmp_path / "service-result").write_bytes(b"\xff" * 100)

    assert len(take_service_result(tmp_path)) == 64
    assert take_service_result(tmp_path / "missing") == ""


def test_the_unit_leaves_its_result_where_the_agent_looks_for_it(tmp_path: Path) -> None:
    [line] = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStopPost=")]
    argv = shlex.split(line.partition("=")[2].removeprefix("-").replace("$$", "$"))
    environ = {"SERVICE_RESULT": "oom-kill", "RUNTIME_DIRECTORY": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(argv, check=True, env=environ)

    assert take_service_result(tmp_path) == "oom-kill"
