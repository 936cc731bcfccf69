"""Having core make changes, by a program of whoever runs it: ``COMMAND ACTION [KEY] [KEY]``."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Callable, Coroutine
from typing import Any, Final

from agent.errors import ConfigError

Exercise = Callable[..., Coroutine[Any, Any, bool]]
"""Called with an action and public keys; False where the program has no way to do it."""
CANNOT: Final = 77
"""The exit status that says so."""
_PATIENCE: Final = 90.0


def command(line: str) -> Exercise:
    """Return what runs a command line with the action and the keys after it; raises ConfigError.

    The program's stderr is the check's own. It has to end with 0 once core has made the change, or
    with 77 if there is no way to make it. Anything else raises ConfigError.
    """
    try:
        argv = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"--exercise can't be read: {error}", "quote it as for a shell") from None
    if not argv:
        raise ConfigError("--exercise is empty", "name a program")

    async def run(action: str, *keys: str) -> bool:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                action,
                *keys,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            raise ConfigError(
                f"--exercise: {argv[0]} can't be run: {error.strerror}", "name an executable program"
            ) from None
        try:
            async with asyncio.timeout(_PATIENCE):
                code = await process.wait()
        except TimeoutError:
            raise ConfigError(
                f"--exercise: {action} took more than {_PATIENCE:.0f} s", "see what it waits for"
            ) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if code not in {0, CANNOT}:
            raise ConfigError(
                f"--exercise: {action} ended with {code}",
                f"it ends with 0 once the change is made, and with {CANNOT} where that can't be done",
            )
        return code == 0

    return run
