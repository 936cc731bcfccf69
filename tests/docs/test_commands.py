"""Every command in README.md and docs/ is run, and prints what the documentation shows."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from tests.docs.commands import SHELL, command_lines, commands, execute, printed_as_shown
from tests.docs.gateway import Gateway
from tests.docs.host import Host
from tests.docs.markdown import ROOT, Block, documents, parse
from tests.docs.places import (
    ELSEWHERE,
    EXCEPTIONS,
    LAST,
    PLACES,
    SCENES,
    WALK,
    Place,
    not_run,
    place_of,
    run_elsewhere,
)

LANGUAGES = {*SHELL, "toml", "ini", "json", "yaml", "sse", "python", "nginx", "text"}
PICTURES = {"docs/ARCHITECTURE.md"}
"""Documents whose blocks without a language are pictures drawn in text."""
_BLOCKS = [block for document in documents().values() for block in document.blocks]
_SYSTEMD = re.compile(r"(?m)^(?:\$ )?[^#\n]*\b(systemctl|journalctl|systemd-\w+)\b")


def _sections(place: Place) -> dict[str, list[Block]]:
    """The shell blocks of a place, by document and section."""
    of_place = [block for block in _BLOCKS if block.language in SHELL and place_of(block) is place]
    return {name: list(blocks) for name, blocks in groupby(of_place, _section)}


def _section(block: Block) -> str:
    return f"{block.document}#{block.section}"


def _walk() -> dict[str, list[Block]]:
    found = _sections(Place.HOST)

    def turn(name: str) -> tuple[bool, int]:
        document = name.partition("#")[0]
        return name in LAST, WALK.index(document) if document in WALK else len(WALK)

    return {name: found[name] for name in sorted(found, key=turn)}


def _named(sections: dict[str, list[Block]]) -> list[ParameterSet]:
    return [pytest.param(blocks, id=name.removeprefix("docs/")) for name, blocks in sections.items()]


def test_every_block_has_a_language_and_every_shell_block_a_place() -> None:
    for block in _BLOCKS:
        assert block.language in LANGUAGES or block.document in PICTURES, (
            f"{block.where}: begin the block with the language of what is in it, ```sh or ```console for "
            f"commands (tests/docs/commands.py says what they mean), else one of {sorted(LANGUAGES)}"
        )
        if block.language in SHELL and not run_elsewhere(block):
            assert place_of(block) is not None, (
                f"{block.where}: nobody has said where these commands are run: add {block.document!r} or "
                f"'{block.document}#{block.section}' to PLACES in tests/docs/places.py, with a scene if "
                "something has to be the case for them; or name the test that does the same in ELSEWHERE"
            )


def test_no_command_hides_in_an_indented_block() -> None:
    for document in documents().values():
        for number, line in document.prose:
            assert not line.startswith("    ") or line.lstrip()[0] in "-*0123456789|", (
                f"{document.name}:{number}: a block is fenced, so that its commands are run"
            )


def test_what_is_not_run_is_in_the_documents() -> None:
    lines = {(name, line) for b in _BLOCKS for name in (b.document, _section(b)) for line in command_lines(b)}

    assert set(EXCEPTIONS) <= lines
    targets = {line.split()[1] for _, line in EXCEPTIONS if line.startswith("make ")}
    assert targets <= set(re.findall(r"(?m)^(\w+):", (ROOT / "Makefile").read_text()))


def test_the_places_are_those_of_sections_that_exist() -> None:
    known = {name: document.anchors for name, document in documents().items()}
    for test, _ in ELSEWHERE.values():
        assert (ROOT / test).exists(), test
    for name in (*PLACES, *ELSEWHERE, *SCENES, *LAST):
        document, _, section = name.partition("#")
        assert document in known, name
        assert not section or section in known[document], name


def test_systemd_is_asked_where_there_is_one() -> None:
    for block in _BLOCKS:
        if block.language not in SHELL or run_elsewhere(block) or place_of(block) is Place.HOST:
            continue
        if _SYSTEMD.search(block.text):
            left = [line for line in command_lines(block) if line not in not_run(block)]
            assert not _SYSTEMD.search("\n".join(left)), (
                f"{block.where}: systemd runs on the lab's machine only: '{block.document}#{block.section}' "
                "belongs there (Place.HOST in tests/docs/places.py)"
            )


@pytest.mark.parametrize("blocks", _named(_sections(Place.CHECKOUT)))
def test_a_sections_commands_work_in_the_checkout(blocks: list[Block]) -> None:
    def run(script: str, stdin: str) -> "subprocess.CompletedProcess[str]":
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # A make that was called by another one, as by `make test`, says so.
        outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name not in outer} | {"PATH": path},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )

    for block in blocks:
        execute(block, run, skipped=not_run(block))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """For sections that take things as they are: each finds them like that."""
    with Gateway(tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway


@pytest.fixture
def gateway(request: pytest.FixtureRequest, blocks: list[Block], tmp_path: Path) -> Iterator[Gateway]:
    scene = SCENES.get(_section(blocks[0]))
    if scene is None:
        gateway: Gateway = request.getfixturevalue("shared")
        gateway.restore()
        yield gateway
    else:
        with Gateway(tmp_path) as gateway, scene(gateway):
            yield gateway


@pytest.mark.netns
@pytest.mark.userspace
@pytest.mark.parametrize("blocks", _named(_sections(Place.GATEWAY)))
def test_a_sections_commands_work_on_a_gateway(blocks: list[Block], gateway: Gateway) -> None:
    for block in blocks:
        execute(_with_words(block, gateway), gateway.run, skipped=not_run(block))


def _with_words(block: Block, gateway: Gateway) -> Block:
    """The block with KEY as Alice's key."""
    lines = tuple(re.sub(r"\bKEY\b", gateway.alice.public_key, line) for line in block.lines)
    return Block(block.document, block.section, block.line, block.language, lines)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.mark.systemd
@pytest.mark.lab
@pytest.mark.parametrize("blocks", _named(_walk()))
def test_a_sections_commands_work_on_a_host(blocks: list[Block], host: Host) -> None:
    for block in blocks:
        stdin: Callable[[], str] = host.authenticator if "client connect" in block.text else str
        execute(block, host.run, stdin, skipped=not_run(block))


# The means themselves.


def block_of(language: str, text: str) -> Block:
    [block] = parse("x.md", f"```{language}\n{text}\n```\n").blocks
    return block


def run_here(script: str, stdin: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_a_dialogue_is_cut_into_its_commands_and_what_they_print() -> None:
    block = block_of("console", "$ cat <<EOF\na\nEOF\na\n$ true\n$ echo a \\\n  b\na …")

    assert [(command.text, command.shown) for command in commands(block)] == [
        ("cat <<EOF\na\nEOF", ("a",)),
        ("true", None),
        ("echo a \\\n  b", ("a …",)),
    ]
    assert execute(block, run_here) == "a\na b\n"


@pytest.mark.parametrize(
    ("printed", "shown", "fits"),
    [
        ("a  b\n", ["a b"], True),
        ("a 17 b\n", ["a … b"], True),
        ("a 17 c\n", ["a … b"], False),
        ("a\n", [], False),
        ("a\nb\nc\n", ["a", "…", "c"], True),
        ("a\nc\n", ["a", "…", "c"], True),
        ("a\nb\n", ["a", "…", "c"], False),
        ("a\nb\n", ["a"], False),
        ("a (b)\n", ["a (b)"], True),
    ],
)
def test_output_is_what_is_shown_but_for_ellipses(printed: str, shown: list[str], fits: bool) -> None:
    assert printed_as_shown(printed, shown) is fits


@pytest.mark.parametrize(
    ("language", "text"),
    [("sh", "false\ntrue"), ("sh", "cat < /nowhere"), ("console", "$ false"), ("console", "$ echo a\nb")],
)
def test_a_command_that_fails_or_prints_something_else_is_a_fault(language: str, text: str) -> None:
    with pytest.raises(AssertionError, match=r"x\.md:1"):
        execute(block_of(language, text), run_here)


def test_what_is_an_exception_is_left_out_and_the_rest_is_run() -> None:
    assert execute(block_of("sh", "false\necho a"), run_here, skipped=("false",)) == "a\n"
