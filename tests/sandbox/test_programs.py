"""The programs as they are run: processes on loopback, ended by signals."""

import contextlib
import json
import signal
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agent.sandbox.mail import messages, wait_for_code

CONFIG = """
database = "{folder}/core/core.db"
listen = ["{listen}", "unix:{folder}/core.sock"]
[admin]
token = "admin"
[[gateways]]
name = "gw1"
location = "hq"
token = "gateway"
"""


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A running subcommand and the address in the line it prints when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "agent.sandbox", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait(5)
        process.stdout.close()


def test_a_killed_core_comes_back_with_the_same_epoch_and_revision(tmp_path: Path) -> None:
    settings = tmp_path / "core.toml"
    settings.write_text(CONFIG.format(folder=tmp_path, listen="127.0.0.1:0"))
    admin = {"authorization": "Bearer admin"}
    gateway = {"authorization": "Bearer gateway"}
    with program("core", "--config", str(settings)) as (process, address):
        created = httpx.post(f"http://{address}/admin/v1/locations", json={"name": "hq"}, headers=admin)
        assert created.status_code == 201
        before = httpx.get(f"http://{address}/gateway/v1/state", headers=gateway).json()
        process.send_signal(signal.SIGKILL)
        process.wait(5)
    with program("core", "--config", str(settings)) as (process, _):
        transport = httpx.HTTPTransport(uds=str(tmp_path / "core.sock"))
        with httpx.Client(transport=transport, base_url="http://core") as client:
            after = client.get("/gateway/v1/state", headers=gateway).json()
        assert (after["epoch"], after["revision"]) == (before["epoch"], before["revision"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_a_core_that_ends_leaves_no_socket_behind_and_takes_no_other_cores(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    shared = tmp_path / "core.sock"
    for name in (tmp_path, folder):
        text = CONFIG.format(folder=name, listen="127.0.0.1:0").replace(f"{folder}/core.sock", str(shared))
        (name / "core.toml").write_text(text)
    with (
        program("core", "--config", str(tmp_path / "core.toml")) as (first, _),
        program("core", "--config", str(folder / "core.toml")) as (second, _),
    ):
        first.send_signal(signal.SIGTERM)
        assert first.wait(5) == 0
        assert shared.is_socket()
        second.send_signal(signal.SIGTERM)
        assert second.wait(5) == 0
        assert not shared.exists()


def test_the_mail_server_keeps_messages_as_files(tmp_path: Path) -> None:
    folder = tmp_path / "mail"
    with program("mail", "--listen", "127.0.0.1:0", "--dir", str(folder)) as (process, address):
        host, _, port = address.rpartition(":")
        with smtplib.SMTP(host, int(port)) as smtp:
            smtp.sendmail("a@example.com", "b@example.com", "Subject: x\n\nYour code is 123456\n")
        assert wait_for_code(folder) == "123456"
        [message] = messages(folder)
        assert b"X-Envelope-To: b@example.com" in message.read_bytes()
        with pytest.raises(TimeoutError):
            wait_for_code(folder, after=1, timeout=0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0


def test_a_configuration_fault_ends_with_2_and_a_sentence(tmp_path: Path) -> None:
    settings = tmp_path / "core.toml"
    settings.write_text("databse = 1")
    ended = subprocess.run(
        [sys.executable, "-m", "agent.sandbox", "core", "--config", str(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "not a core's configuration" in ended.stderr


def test_the_clients_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    key = tmp_path / "device.key"
    shown = [
        subprocess.run(
            [sys.executable, "-m", "agent.sandbox", "client", "key", "--device-key", str(key)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0].strip()) == 44
    assert key.stat().st_mode & 0o777 == 0o600
    assert json.dumps(key.read_text()) != json.dumps(shown[0])
