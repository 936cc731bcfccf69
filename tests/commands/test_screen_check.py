"""How ``wg-agent check`` looks; what it finds is in test_check.py."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from rich.cells import cell_len

from agent.commands.findings import HEADINGS, Finding, Mark, Question, ok, skipped
from agent.commands.verdict import last_word, report
from tests.commands.documents import pipe, printed, terminal

CLOCK = Finding(
    "clock", Mark.WARNING, "this host's clock is 12 s ahead of core's", "timedatectl set-ntp true"
)
ROUTES = Finding(
    "routes",
    Mark.FAULT,
    "allowed IPs without a route to wg0: " + ", ".join(f"10.9.0.{n}/32" for n in range(5)),
    "; ".join(f"ip route add 10.9.0.{n}/32 dev wg0" for n in range(5)),
)
FINDINGS = [
    ok("core", "https://core.example.com/gateway/v1/ answers: location 日本 requires MFA, 12 peers"),
    CLOCK,
    ok("configuration", "/etc/wg-agent/wg0.toml is valid, for wg0"),
    Finding("private key", Mark.INFO, "there is none yet", "start the agent"),
    ROUTES,
    skipped("guard", "it takes the permission that is missing"),
    ok("listen port", "UDP port 51820 is free\x1b[2J"),
]


def test_every_question_has_one_heading() -> None:
    asked = [question for questions in HEADINGS.values() for question in questions]

    assert sorted(asked) == sorted(get_args(Question))


def test_findings_are_below_their_headings_with_remedies_below_the_faults() -> None:
    to = pipe()

    assert printed(to, report(FINDINGS, to)).splitlines() == [
        "files",
        "  ✓ configuration  /etc/wg-agent/wg0.toml is valid, for wg0",
        "  · private key    there is none yet",
        "                   → start the agent",
        "",
        "core",
        f"  ✓ core           {FINDINGS[0].message}",
        "  ! clock          this host's clock is 12 s ahead of core's",
        "                   → timedatectl set-ntp true",
        "",
        "host",
        f"  ✗ routes         {ROUTES.message}",
        f"                   → {ROUTES.remedy}",
        "  - guard          it takes the permission that is missing",
        "",
        "ports",
        r"  ✓ listen port    UDP port 51820 is free\x1b[2J",
        "",
        "1 fault, 1 warning, 1 not judged",
    ]


def test_a_heading_below_which_nothing_was_asked_is_not_there() -> None:
    to = pipe()

    assert printed(to, report([CLOCK], to)).splitlines()[:2] == ["core", f"  ! clock  {CLOCK.message}"]


def test_only_warnings_and_faults_are_said_in_colour() -> None:
    to = terminal(1000)

    lines = printed(to, report(FINDINGS, to)).splitlines()
    coloured = {
        what
        for line in lines
        for colour, what in re.findall("\x1b\\[3(\\d)m([^\x1b]+)", line)
        if what.strip() not in set("✓·!✗")
    }
    assert {what.strip() for what in coloured} == {"clock", "routes", CLOCK.message, ROUTES.message}
    dim = [what.strip() for line in lines for what in re.findall("\x1b\\[2m([^\x1b]+)", line)]
    assert dim == ["-", "guard", "it takes the permission that is missing"]


@pytest.mark.parametrize(
    ("finding", "style"),
    [
        (ROUTES, "bold red"),
        (CLOCK, "bold yellow"),
        (skipped("guard", "it takes the permission that is missing"), "bold yellow"),
        (ok("core", "answers"), "bold green"),
    ],
)
def test_the_last_word_has_the_colour_of_the_worst(finding: Finding, style: str) -> None:
    assert last_word([ok("core", "answers"), finding]).style == style
    assert last_word([finding, ROUTES, CLOCK]).style == "bold red"


@pytest.mark.parametrize("width", [50, 80, 120])
@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_at_any_width_all_is_there_folded_where_it_began(width: int, colours: bool, encoding: str) -> None:
    to = terminal(width, colours=colours, encoding=encoding)

    text = printed(to, report(FINDINGS, to))

    assert ("\x1b[" in text) is colours
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(cell_len, lines)) <= width
    for number in range(5):
        assert " ".join(" ".join(lines).split()).count(f"10.9.0.{number}/32") == 2
    first, after = (next(n for n, line in enumerate(lines) if word in line) for word in ("routes", "guard"))
    assert after > first + 1
    assert all(line.startswith(" " * 19) for line in lines[first + 1 : after])


def test_headings_and_the_last_word_stand_out() -> None:
    to = terminal(80)

    text = printed(to, report(FINDINGS, to))

    assert "\x1b[1mfiles\x1b[0m" in text
    assert text.endswith("\x1b[1;31m1 fault, 1 warning, 1 not judged\x1b[0m\n")


@pytest.mark.parametrize(
    ("findings", "text"),
    [
        ([FINDINGS[0]], "no faults"),
        ([CLOCK], "1 warning"),
        ([ROUTES, ROUTES, CLOCK, CLOCK], "2 faults, 2 warnings"),
        ([skipped("routes", "x"), ROUTES], "1 fault, 1 not judged"),
    ],
)
def test_the_last_word_counts(findings: list[Finding], text: str) -> None:
    assert last_word(findings).plain == text


def test_marks_are_told_without_their_characters_too() -> None:
    to = terminal(80, encoding="ascii", colours=False)

    text = printed(to, report(FINDINGS, to))

    assert [line[2] for line in text.splitlines() if re.match(r"  \S", line)] == list("+.+!x-+")
    assert "-> timedatectl set-ntp true" in text
