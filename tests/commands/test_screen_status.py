"""How ``wg-agent status`` looks: on terminals of any width, in pipes, without colour, with any names."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from agent.commands.peertable import filled, size
from agent.commands.selection import ordered
from agent.commands.status import report
from agent.encoding import format_span, format_time
from tests.commands.documents import (
    WALL,
    document,
    pipe,
    some_peers,
    status_text,
    terminal,
)
from tests.commands.parts import ALICE, BOB, NOBODY, peer

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WIDTHS = (40, 60, 80, 99, 100, 120, 200, 300)


def up(**changed: Any) -> dict[str, Any]:
    return peer(
        ALICE,
        **{
            "state": "up",
            "session_id": "s-19",
            "session_in_use": True,
            "session_life": 7200.0,
            "time_left": 3725.4,
            "latest_handshake": format_time(WALL - 63.5),
            "endpoint": "203.0.113.9:51000",
            "rx_bytes": 1536,
            "tx_bytes": 3 << 20,
            "rx_rate": 2048.0,
            "tx_rate": 0.0,
        }
        | changed,
    )


def rows(text: str) -> list[str]:
    """The table's lines below its headings."""
    lines = text.splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("PEER")) + 1 :]


def plain(width: int, *peers: dict[str, Any], **about: Any) -> str:
    return status_text(terminal(width, colours=False), document(peers, **about))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_no_line_is_wider_than_the_terminal(width: int, colours: bool, encoding: str) -> None:
    trouble = {"core_connected": False, "core_error": "a fault " * 30, "core_since": format_time(WALL - 5)}
    to = terminal(width, encoding=encoding, colours=colours)

    text = status_text(to, document(some_peers(200), **trouble))

    lines = ANSI.sub("", text).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(rows("\n".join(lines))) == 201  # and the line that says how many
    assert ("\x1b[" in text) is colours


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_columns_stand_below_their_headings_whatever_the_names(width: int) -> None:
    text = plain(width, *some_peers(60))

    heading = next(line for line in text.splitlines() if line.startswith("PEER"))
    right = cell_len(heading[: heading.index("HANDSHAKE") + len("HANDSHAKE")])
    told = [row for row in rows(text)[:60] if "refused" not in row]
    assert len(told) > 30
    for row in told:
        before = next(cut for cut in range(len(row) + 1) if cell_len(row[:cut]) == right)
        assert re.search(r"(\d[smhd]|never)$", row[:before]), row


def test_figures_are_flush_right_below_their_headings() -> None:
    busy = up(rx_rate=2048.0, tx_rate=5e9, rx_bytes=1536, tx_bytes=3 << 30)
    quiet = up(rx_rate=0.0, tx_rate=1.0, rx_bytes=0, tx_bytes=7)

    heading, *told = plain(200, busy, quiet).splitlines()[-3:]

    ends = [heading.index(name) + len(name) for name in ("HANDSHAKE", "RX/s ", "TX/s", "RX ", "TX ")]
    ends = [end - 1 if heading[end - 1] == " " else end for end in ends]
    found = [[row[:end].split()[-1] for end in ends] for row in told]
    assert found == [["1m03s", "2.0K", "4.7G", "1.5K", "3.0G"], ["1m03s", "0B", "1B", "0B", "7B"]]
    assert all(row[end : end + 1] == " " for row in told for end in ends)


def test_at_80_columns_a_row_has_session_handshake_rates_and_endpoint() -> None:
    (row,) = rows(plain(80, up()))

    assert row.split()[:5] == ["●", "alice-laptop", "━━━───", "1h02m", "1m03s"]
    assert row.split()[5:8] == ["2.0K", "0B", "203.0.113.9:51000"]


def test_at_80_columns_nothing_of_usual_peers_is_cut() -> None:
    peers = [up(name="alice-laptop-2", endpoint="203.0.113.199:51000", tx_rate=5e9), up(time_left=59.0)]

    assert "…" not in plain(80, *peers)


def test_wide_terminals_show_totals_session_and_key_as_well() -> None:
    (row,) = rows(plain(200, up()))

    cells = row.split()
    assert cells[:3] == ["●", "alice-laptop", "up"]
    assert cells[-5:] == ["10.8.0.5/32", "1.5K", "3.0M", "s-19", up()["public_key"]]


def test_a_pipe_has_all_of_it_in_lines_of_their_own() -> None:
    peers = [
        up(allowed_ips=[f"10.9.{n}.0/24" for n in range(200)]),
        peer(BOB, name="b" * 64),
        peer(NOBODY, name="carol", state="refused", reason="invalid_persistent_keepalive"),
    ]

    found = rows(status_text(pipe(), document(peers, core_error="x " * 800)))

    assert len(found) == 3
    for entry, row in zip(peers, found, strict=True):
        for value in (entry["name"], entry["state"], entry["public_key"], ", ".join(entry["allowed_ips"])):
            assert value in row
    assert "refused: invalid_persistent_keepalive" in found[2]
    assert "x x x" in status_text(pipe(), document(peers, core_error="x " * 800)).splitlines()[2]


def test_a_pipe_has_every_peer() -> None:
    text = status_text(pipe(), document(some_peers(3000)))

    assert len(rows(text)) == 3000
    assert "more" not in rows(text)[-1]


@pytest.mark.parametrize("reason", ["prefix_claimed", "invalid_persistent_keepalive"])
@pytest.mark.parametrize("width", [80, 120])
def test_a_refused_peer_says_why_in_full(width: int, reason: str) -> None:
    (row,) = rows(plain(width, peer(ALICE, state="refused", reason=reason)))

    assert row.startswith("✗ alice-laptop")
    assert f"refused: {reason}" in row


def test_each_state_is_told_without_colour() -> None:
    text = plain(80, up(), peer(BOB, name="bob"), peer(NOBODY, state="refused", reason="own_public_key"))

    first, second, third = rows(text)
    assert (first[0], second[0], third[0]) == ("●", "○", "✗")
    assert "waiting" in second
    assert "refused: own_public_key" in third
    assert "● 1 up   ○ 1 waiting   ✗ 1 refused" in text


def test_an_encoding_without_the_signs_gets_ascii() -> None:
    peers = [up(name="zoë"), peer(BOB, name="日本"), peer(NOBODY, state="refused", reason="own_public_key")]

    text = status_text(terminal(80, encoding="ascii", colours=False), document(peers))

    assert text.isascii()
    first, second, third = rows(text)
    assert first.split()[:4] == ["*", r"zo\xeb", "###---", "1h02m"]
    assert second.split()[:3] == ["o", r"\u65e5\u672c", "waiting"]
    assert third.startswith("x ")


def test_a_peer_without_a_session_says_that_it_needs_none() -> None:
    exempt = up(time_left=None, session_life=None, session_id=None, mfa_exempt=True)

    assert "exempt" in rows(plain(80, exempt))[0]
    assert "no session" in rows(plain(80, {**exempt, "mfa_exempt": False}))[0]


@given(share=st.floats(0, 1), width=st.integers(2, 40))
def test_a_bar_is_empty_only_at_the_end_and_full_only_at_the_beginning(share: float, width: int) -> None:
    full = filled(share, width)

    assert 0 <= full <= width
    assert (full == 0) is (share == 0)
    assert (full == width) is (share == 1)
    assert abs(full - share * width) <= 1


def test_the_bar_is_of_the_sessions_whole_life() -> None:
    bars = {
        left: re.findall("[━─]+", rows(plain(80, up(session_life=600.0, time_left=left)))[0])
        for left in (600.0, 300.0, 5.0)
    }

    assert bars == {600.0: ["━━━━━━"], 300.0: ["━━━───"], 5.0: ["━─────"]}


@pytest.mark.parametrize("width", WIDTHS)
def test_only_a_session_that_lets_somebody_in_has_a_bar(width: int) -> None:
    held = up(session_in_use=False)
    refused = up(state="refused", reason="own_public_key")
    waiting = up(state="waiting")

    assert [re.findall("[━─]", rows(plain(width, one))[0]) for one in (held, refused, waiting)] == [
        [],
        [],
        [],
    ]
    assert "held" in rows(plain(width, held))[0]
    assert "waiting" in rows(plain(width, waiting))[0]
    assert "━" in rows(plain(width, up()))[0]


def test_whose_session_is_held_does_not_come_first_of_those_whose_end_is_near() -> None:
    held, live = up(session_in_use=False, time_left=5.0), up(name="bob", time_left=50.0)

    assert [one["name"] for one in ordered([held, live], "left")] == ["bob", "alice-laptop"]


# The head.


def head(**about: Any) -> str:
    text = plain(80, peer(ALICE), **about)
    return text[: text.index("PEER")]


def test_the_head_tells_how_agent_core_and_guard_are() -> None:
    text = head(
        core_since=format_time(WALL - 8050),
        synced_at=format_time(WALL - 12),
        started_at=format_time(WALL - 273_700),
        observed_at=format_time(WALL - 3),
    )

    assert text.splitlines()[:5] == [
        "wg0    ● up, location hq requires MFA",
        "core   ● connected for 2h14m, epoch b7e1 revision 42, last update 12s ago",
        "guard  ● in force: the kernel itself ends sessions on time",
        "agent  ● version 1.2.3, started 3d04h ago, looked at wg0 3s ago",
        "peers  ● 0 up   ○ 1 waiting   ✗ 0 refused",
    ]


def test_the_head_names_every_fault() -> None:
    text = head(
        core_connected=False,
        core_since=format_time(WALL - 312),
        core_error="core refuses the token (401)",
        journal_ok=False,
        device_error="wg0 is gone",
        guard="missing",
        guard_error="nftables is not installed",
        link_up=False,
        expiry_late=True,
        reap_backlog=7,
    )

    for fault in (
        "✗ down, location hq requires MFA",
        "✗ wg0 is gone",
        "✗ unreachable for 5m12s, epoch b7e1 revision 42",
        "✗ core refuses the token (401)",
        "✗ not in force",
        "✗ nftables is not installed",
        "✗ the journal can't be written: no new session is admitted",
        "✗ sessions past their deadline are still on the interface",
        "○ 7 peers are cut and wait to be removed",
    ):
        assert fault in text


def test_each_label_stands_before_the_first_line_about_it_alone() -> None:
    text = head(device_error="wg0 is gone", core_error="token refused", journal_ok=False)

    assert [line[:7] for line in text.splitlines() if line] == [
        "wg0    ",
        "       ",
        "core   ",
        "       ",
        "guard  ",
        "agent  ",
        "       ",
        "peers  ",
    ]


def test_what_is_bad_is_red_and_nothing_else_is() -> None:
    to = terminal(120)

    text = status_text(to, document([peer(ALICE)], device_error="wg0 is gone"))

    lines = text[: text.index("PEER")].splitlines()
    red = [ANSI.sub("", part) for line in lines for part in re.findall("\x1b\\[31m([^\x1b]+)", line)]
    assert red == ["✗", "wg0 is gone", "✗"]  # the last is the sign of who is refused


def test_the_head_says_whether_the_location_requires_mfa_and_what_it_is_called_if_anything() -> None:
    assert ", location hq does not require MFA" in head(mfa_required=False)
    assert ", location (no name) requires MFA" in head(location=None)
    assert ", location (no name) requires MFA" in head(location="")


def test_what_is_said_to_come_was_just_now() -> None:
    assert "last update 0s ago" in head(synced_at=format_time(WALL + 60))


def test_a_long_fault_is_folded_beside_its_label() -> None:
    text = head(core_connected=False, core_error="word " * 40)

    lines = [line for line in text.splitlines() if "word" in line]
    assert len(lines) > 2
    assert all(line.startswith(" " * 9 + "word") for line in lines[1:])
    assert "".join(lines).split().count("word") == 40


UNHEARD = {"epoch": None, "revision": None, "mfa_required": None, "location": None, "core_connected": False}


def test_before_the_first_state_the_head_says_so() -> None:
    text = head(**UNHEARD)

    assert "○ not reached yet, no state from core yet" in text


def test_before_the_first_state_nothing_is_said_that_nobody_knows() -> None:
    text = plain(80, **UNHEARD, link_up=None, guard="left_over")

    assert "wg0    ○ left as it was found until core is heard" in text
    assert "guard  ○ left over: the table of an earlier start goes on ending sessions" in text
    assert "peers  core has not been heard yet" in text
    assert text.splitlines()[-1] == "core has not been heard yet"
    assert "○ not known yet" in plain(80, **UNHEARD, link_up=None, guard="unknown")


def test_a_core_that_lists_nobody_is_said_to() -> None:
    text = plain(80)

    assert "peers  ● 0 up" in text
    assert text.splitlines()[-1] == "core lists no peer"


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (1, "1 peer that has to go is still on it"),
        (2, "2 peers that have to go are still on it"),
        (7, "7 peers that have to go are still on it"),
    ],
)
def test_who_has_to_go_and_stays_is_told_in_red(count: int, told: str) -> None:
    to = terminal(120)

    text = status_text(to, document([], overstaying=count))

    line = next(line for line in text.splitlines() if told in line)
    assert "the device refuses, it is tried again at each step" in ANSI.sub("", line)
    assert "\x1b[31m" in line


# Many peers.


def test_a_table_longer_than_the_terminal_ends_with_how_many_there_are() -> None:
    text = status_text(terminal(80, 50, colours=False), document(some_peers(100)))

    assert text.splitlines()[-1] == "100 peers: --state, --sort or a name show fewer"
    assert len(rows(text)) == 101


@pytest.mark.parametrize("height", [3, 5, 10, 24, 50])
def test_watch_fits_the_height_and_says_how_many_more_there_are(height: int) -> None:
    text = status_text(terminal(80, height, colours=False), document(some_peers(100)), height=height)

    lines = text.splitlines()
    assert len(lines) <= height
    told = re.search(r"… and (\d+) more of 100 peers", lines[-1])
    assert told is not None
    shown = sum(line[:1] in set("●○✗") for line in lines)
    assert shown + int(told[1]) == 100


@pytest.mark.parametrize("shown", [0, 1, 10, 50])
def test_watch_is_never_higher_than_the_terminal(shown: int) -> None:
    peers = some_peers(50)
    for height in range(2, 60):
        to = terminal(80, height)
        screen = report(document(peers), peers[:shown], WALL, to, height)
        assert len(screen.lines) <= height
        last = screen.lines[-1]
        assert isinstance(last, Text) is (shown < 50 or height < 57)
        if isinstance(last, Text):
            assert f"of {len(peers)} peers" in last.plain


def test_watch_leaves_no_room_unused() -> None:
    text = status_text(terminal(80, 24, colours=False), document(some_peers(17)), height=24)
    assert (len(text.splitlines()), "more" in text) == (24, False)
    text = status_text(terminal(80, 24, colours=False), document(some_peers(18)), height=24)
    assert (len(text.splitlines()), "and 2 more of 18" in text) == (24, True)


# Figures.


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (185, "3m05s"), (8_050, "2h14m"), (273_700, "3d04h")]
)
def test_a_span_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1.0K"), (1536, "1.5K"), (10_189, "10K"), (5 << 40, "5.0T")],
)
def test_a_size_has_the_unit_that_leaves_few_digits(count: int, text: str) -> None:
    assert size(count) == text


@given(st.integers(0, (1 << 59) - 1))
def test_a_size_takes_four_characters_and_is_off_by_a_twentieth_at_most(count: int) -> None:
    text = size(count)

    assert len(text) <= 4
    assert float(text[:-1]) * 1024 ** "BKMGTP".index(text[-1]) == pytest.approx(count, rel=0.05)
