"""``wg-agent demo``: hands over to the sandbox, whose dependencies are an extra."""

from __future__ import annotations

import argparse
import importlib
from importlib.util import find_spec
from typing import Final

from agent.errors import ConfigError

_EXTRA: Final = ("aiosmtpd", "aiosmtplib", "pyotp")


def execute(arguments: argparse.Namespace) -> int:
    """Run the demo with the arguments that follow the command."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs the extra [sandbox]: {', '.join(missing)} not installed",
            "the Debian package has it; from a checkout: pipx install '.[sandbox]'",
        )
    code: int = importlib.import_module("agent.sandbox.demo").main(arguments.rest)
    return code
