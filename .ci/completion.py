"""Prints the shell completion of wg-agent: ``completion.py bash|zsh|fish``."""

import argparse
import sys

import shtab

from agent.__main__ import _parser

# The interfaces that have a configuration; for whoever may not list that folder, those that are there.
INTERFACES = {
    "bash": """
_wg_agent_interfaces() {
  local file found=()
  for file in /etc/wg-agent/*.toml; do [ ! -e "$file" ] || found+=("$(basename "$file" .toml)"); done
  [ ${#found[@]} -gt 0 ] || found=($(ls /sys/class/net))
  compgen -W "${found[*]}" -- "$1"
}
""",
    "zsh": """
_wg_agent_interfaces() {
  local -a found
  found=(/etc/wg-agent/*.toml(N:t:r))
  (( $#found )) || found=(/sys/class/net/*(N:t))
  compadd -a found
}
""",
    "fish": """
function _wg_agent_interfaces
  set -l found /etc/wg-agent/*.toml
  test (count $found) -gt 0; or set found /sys/class/net/*
  string replace -r '.*/' '' $found | string replace -r '[.]toml$' ''
end
""",
}


def main() -> None:
    """Write the completion for the shell that is named to stdout."""
    shell = sys.argv[1]
    parser = _parser()
    _mark(parser)
    sys.stdout.write(shtab.complete(parser, shell=shell, preamble=INTERFACES))


def _mark(parser: argparse.ArgumentParser) -> None:
    """Say of each option what its value is."""
    for action in parser._actions:  # noqa: SLF001 (argparse has no other way to walk them)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                _mark(command)
        elif action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest == "interface":
            names = dict.fromkeys(INTERFACES, "_wg_agent_interfaces") | {"fish": "(_wg_agent_interfaces)"}
            action.complete = names  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
