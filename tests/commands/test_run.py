import os
import subprocess
import sys
import time
from pathlib import Path


def test_run_is_undumpable_before_it_has_read_a_line_of_its_configuration(tmp_path: Path) -> None:
    config = tmp_path / "wg0.toml"
    os.mkfifo(config)
    process = subprocess.Popen([sys.executable, "-m", "agent", "run", "-c", str(config)])
    try:
        writer = opened(config, process)
        # It waits for the first byte.
        [limit] = [
            line.split()[4:6]
            for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines()
            if line.startswith("Max core file size")
        ]
        os.close(writer)
    finally:
        process.kill()
        process.wait()
    assert limit == ["0", "0"]


def opened(fifo: Path, process: "subprocess.Popen[bytes]") -> int:
    """Open the writing end once the process has the reading end."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.02)
    raise AssertionError("it did not open its configuration")
