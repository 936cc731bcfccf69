"""The demo as it is run: a process that ends by itself, or by a signal, and leaves nothing behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.sandbox import demo

HEADER = re.compile(r"^WireGuard: (.+)\. Namespaces: wg-demo-([0-9a-f]{6})-gateway, wg-demo-\2-client\.$")
STEP = re.compile(r"^(\S) (\d) (.+?) +(\d+\.\d\d) s(?:  (.*))?$")

# Answers whatever happens to the tunnel.
FAKE_PING = """\
#!/bin/sh
n=0
while :; do
  n=$((n + 1))
  echo "[$(date +%s.%N)] 64 bytes from 10.8.0.1: icmp_seq=$n ttl=64 time=1.00 ms"
  sleep 0.05
done
"""


@dataclass
class Demo:
    """A running demo. ``root`` is on its PATH: how its processes are told from others."""

    process: "subprocess.Popen[str]"
    root: Path

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def rest(self) -> list[str]:
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        self.process.wait(10)
        return lines

    def interrupt(self, number: int) -> None:
        """As a terminal does it: the whole process group gets the signal."""
        os.killpg(self.process.pid, number)

    def processes(self) -> list[str]:
        """The processes that are the demo's or were started by it, ``wireguard-go`` included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.root).encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def left(self, token: str) -> list[str]:
        """What there still is of it."""
        netns = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        return [
            *(line for line in (netns + links).splitlines() if token in line),
            *(str(path) for path in Path("/var/run/wireguard").glob(f"*{token}*")),
            *(str(path) for path in (self.root / "tmp").iterdir()),
            *self.processes(),
        ]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: the path of a unix socket has 107 bytes, and pytest's folders leave too few of them."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def playing(root: Path, *command: str) -> Iterator[Demo]:
    for folder in ("tmp", "bin"):
        (root / folder).mkdir(exist_ok=True)
    environment = {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(root / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        yield Demo(process, root)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)
        if process.stdout is not None:
            process.stdout.close()


def token_in(line: str) -> str:
    found = HEADER.match(line)
    assert found is not None, line
    return found[2]


def marks(lines: list[str]) -> dict[int, str]:
    return {int(found[2]): found[1] for line in lines if (found := STEP.match(line))}


@pytest.mark.netns
@pytest.mark.userspace
def test_the_demo_passes_every_step_in_under_a_minute_and_leaves_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    with playing(tmp_path, "agent", "demo") as run:
        token = token_in(run.line())
        lines = run.rest()
    assert run.process.returncode == 0, "\n".join(lines)
    assert marks(lines) == dict.fromkeys(range(1, 8), "✔")
    assert all(found[5] for line in lines if (found := STEP.match(line))), "a step without a measurement"
    assert not any("\x1b" in line for line in lines)
    assert run.left(token) == []
    assert time.monotonic() - began < 60


@pytest.mark.netns
@pytest.mark.userspace
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing_and_says_so(tmp_path: Path, number: int, code: int) -> None:
    with playing(tmp_path, "agent.sandbox", "demo") as run:
        token = token_in(run.line())
        if number == signal.SIGINT:
            # In the fourth step core and agent are killed and started.
            while not run.line().startswith("✔ 3"):
                assert run.process.poll() is None
            time.sleep(0.9)
            assert len(run.processes()) > 4
        run.interrupt(number)
        lines = run.rest()
    assert run.process.returncode == code, "\n".join(lines)
    assert any("interrupted" in line for line in lines)
    assert run.left(token) == []


@pytest.mark.netns
@pytest.mark.userspace
def test_a_step_that_sees_something_else_gets_a_cross_and_the_demo_fails(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    ping = tmp_path / "bin" / "ping"
    ping.write_text(FAKE_PING)
    ping.chmod(0o755)
    with playing(tmp_path, "agent.sandbox", "demo") as run:
        token = token_in(run.line())
        lines = run.rest()
    assert run.process.returncode == 1, "\n".join(lines)
    found = marks(lines)
    # Who is always answered sees that as proof of an open gateway wherever it should be closed.
    assert [found[step] for step in (1, 5, 6, 7)] == ["✘"] * 4
    assert any(line.strip().startswith("seen: ") for line in lines)
    assert any(line.strip().startswith("look: agent's log") for line in lines)
    assert run.left(token) == []


def test_without_root_and_sudo_the_demo_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs root"):
        demo.main([])
