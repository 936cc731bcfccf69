"""A small real core with MFA, a client and a mail server, to run wg-agent against."""

import sys
from pathlib import Path


def program(command: str = "") -> str:
    """Return what usage calls the sandbox, and its command if one is given: as it was called."""
    module = Path(sys.argv[0]).name == "__main__.py"
    return f"{'python -m agent.sandbox' if module else 'wg-agent-sandbox'} {command}".rstrip()
