"""One agent for each interface: an exclusive lock that ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.errors import LockHeld, cannot_start
from agent.folders import private_folder


class InterfaceLock:
    """The held lock of an interface; close it, or leave its ``with``, to let go.

    The file stays when the lock goes: to remove it would let two agents hold locks on two files.
    """

    def __init__(self, runtime: Path, interface: str) -> None:
        """Take the lock ``INTERFACE.lock`` in the runtime folder, which is made if missing.

        Raises LockHeld if another process has it, ConfigError if the file can't be made, or AgentError
        if that may pass.
        """
        private_folder(runtime, "paths.runtime")
        path = runtime / f"{interface}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise cannot_start(
                error,
                f"paths.runtime: {path} can't be opened: {error.strerror}",
                "remove it, or run as the user that made it",
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 20).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            who = f" (process {holder})" if holder.isdigit() else ""
            raise LockHeld(f"another agent{who} runs on {interface}", "stop that one first") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode("ascii"), 0)

    def close(self) -> None:
        """Let go of the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
