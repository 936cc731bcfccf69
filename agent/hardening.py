"""Keeps the process's memory, where the keys are, out of core dumps and other users' debuggers."""

from __future__ import annotations

import ctypes
import resource
from typing import Final

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h


def forbid_core_dumps(*, quietly: bool = False) -> None:
    """Make the process undumpable; where the system forbids that, it is logged unless ``quietly``."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    except (OSError, ValueError) as error:
        if quietly:
            return
        # `run` calls this before anything else, and its modules are imported as agent.commands.run has it.
        import structlog  # noqa: PLC0415

        structlog.get_logger(__name__).warning("core dumps could not be turned off", error=str(error))
