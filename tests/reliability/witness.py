"""Watches the arguments and the environment of every process there is, in a process of its own."""

import contextlib
import json
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL = 0.02


class Witness:
    """Watches while its block runs; ``seen`` is then all that it saw, and ``programs`` the names."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seen = b""
        self.programs: set[str] = set()

    def __enter__(self) -> Self:
        argv = (sys.executable, "-m", "tests.reliability.witness", str(self._file))
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        told, _ = self._process.communicate(timeout=20)
        self.seen = self._file.read_bytes()
        self.programs = set(json.loads(told))
        self._file.unlink()


def watch(file: Path) -> None:
    """Write down each process's arguments and environment, and whenever they change, until stdin ends."""
    known: dict[str, bytes] = {}
    programs: set[str] = set()
    with file.open("wb") as out:
        print("watching", flush=True)
        while not _stdin_ended():
            for folder in Path("/proc").iterdir():
                if not folder.name.isdigit():
                    continue
                with contextlib.suppress(OSError):
                    argv = (folder / "cmdline").read_bytes()
                    if known.get(folder.name) != argv:
                        known[folder.name] = argv
                        programs.add(Path(argv.partition(b"\0")[0].decode(errors="replace")).name)
                        out.write(argv + b"\n" + (folder / "environ").read_bytes() + b"\n")
            time.sleep(INTERVAL)
    print(json.dumps(sorted(programs)))


def _stdin_ended() -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
