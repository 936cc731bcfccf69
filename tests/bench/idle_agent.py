"""The real daemon with ``StandInLink`` in WireGuard's place; the guard and the journal are the real ones.

``python -m tests.bench.idle_agent FOLDER``. It imports nothing else, since its memory is measured.
"""

import sys
from pathlib import Path

from agent.commands.run import load_daemon
from agent.configfile import load_config
from agent.curve25519 import public_key
from tests.bench.stand_in import StandInLink


def run(folder: Path) -> int:
    """Run it until it is told to stop."""
    daemon, path = load_daemon(), folder / "agent.toml"
    config = load_config(path)

    def link(_: object, private_key: bytes, *__: object) -> StandInLink:
        return StandInLink(config.interface.name, public_key(private_key))

    vars(daemon)["WireGuardLink"] = link
    code: int = daemon.run(config, path, None)
    return code


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
