"""``wg-agent conformance``: walks a core through the core API, clause by clause.

It needs no configuration and no gateway, but speaks to core as one: use a token of a location that
nobody's tunnels depend on.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from typing import Final

from rich.console import Console

from agent.commands.output import console, print_json, say, signs
from agent.conformance import exercise
from agent.conformance.clauses import SECTIONS
from agent.conformance.verdicts import Ledger, Mark
from agent.conformance.walk import Walk
from agent.conformance.wire import Wire
from agent.core.endpoint import TlsFiles
from agent.errors import ConfigError
from agent.hardening import forbid_core_dumps
from agent.keys import check_secret_mode, read_secret_file

_TOKEN: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
_STYLES: Final = {Mark.PASS: ("tick", "green"), Mark.FAIL: ("bad", "red"), Mark.SKIP: ("skipped", "dim")}


def execute(arguments: argparse.Namespace) -> int:
    """Walk, and print what was found; 1 if a clause was broken.

    Raises ConfigError for wrong usage, and for an exercise that fails; CoreUnavailable for a core that
    goes away meanwhile. What was found before that, or before Ctrl-C, is printed first.
    """
    if arguments.list:
        _list(as_json=arguments.json)
        return 0
    forbid_core_dumps()  # it is given PSKs
    if arguments.core is None or arguments.token_file is None:
        raise ConfigError(
            "it takes a core and a token",
            "wg-agent conformance --core https://HOST/path/ --token-file FILE",
        )
    if arguments.watch and arguments.exercise is not None:
        raise ConfigError("--watch and --exercise don't go together", "the exercise makes its own changes")
    if not 0 <= arguments.watch < float("inf"):
        raise ConfigError("--watch is not a number of seconds", "such as --watch 60")
    token = _read_token(arguments)
    run = None if arguments.exercise is None else exercise.command(arguments.exercise)
    ledger = Ledger([token])
    complete = False
    try:
        asyncio.run(_walk(arguments, token, ledger, run))
        complete = True
    finally:
        if ledger:
            _print(arguments, ledger, complete=complete)
    return 1 if ledger.failures() else 0


def _print(arguments: argparse.Namespace, ledger: Ledger, *, complete: bool) -> None:
    if not arguments.json:
        _show(ledger)
        return
    ok = complete and not ledger.failures()
    counts = {mark.value: count for mark, count in ledger.counts().items()}
    print_json(
        {
            "core": arguments.core,
            "ok": ok,
            "complete": complete,
            **counts,
            "clauses": ledger.document(),
        }
    )


async def _walk(
    arguments: argparse.Namespace, token: str, ledger: Ledger, run: exercise.Exercise | None
) -> None:
    if arguments.client_key_file is not None:
        check_secret_mode(arguments.client_key_file, "--client-key-file")
    tls = TlsFiles(arguments.ca_file, arguments.client_cert_file, arguments.client_key_file)
    wire = Wire(arguments.core, token, tls)
    walk = Walk(wire, token, ledger)
    try:
        await walk.run(watch=arguments.watch, exercise=run)
    finally:
        if walk.left:
            aside = Console(stderr=True, markup=False, emoji=False, highlight=False)
            say(
                aside,
                f"wg-agent: core may still list the check's own peers: remove {' and '.join(walk.left)}",
            )
        await wire.close()


def _read_token(arguments: argparse.Namespace) -> str:
    token = read_secret_file(arguments.token_file, "--token-file").decode("utf-8", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"--token-file: {arguments.token_file} does not hold a token", "write the token as its only line"
        )
    return token


def _list(*, as_json: bool) -> None:
    if as_json:
        clauses = [
            {"section": section.title, "id": clause.id, "clause": clause.text}
            for section in SECTIONS
            for clause in section.clauses
        ]
        print_json({"clauses": clauses})
        return
    to = console()
    for section in SECTIONS:
        say(to, section.title, "bold")
        for clause in section.clauses:
            say(to, f"  {clause.id}: {clause.text}")


def _show(ledger: Ledger) -> None:
    to = console()
    drawn = signs(to)
    for section in SECTIONS:
        say(to, section.title, "bold")
        for clause in section.clauses:
            mark, seen = ledger.verdict(clause.id)
            sign, style = _STYLES[mark]
            say(to, f"  {getattr(drawn, sign)} {clause.id}: {clause.text}", style)
            say(to, f"      {seen}", "dim")
            if mark is Mark.FAIL:
                say(to, f"      {drawn.arrow} {clause.remedy}")
    counts = ledger.counts()
    say(to, f"{counts[Mark.PASS]} passed, {counts[Mark.FAIL]} failed, {counts[Mark.SKIP]} skipped")
