import subprocess
from pathlib import Path

from tests.support.ledger import Ledger, Seen, as_property


def line(**figures: object) -> tuple[str, object]:
    seen = Seen()
    seen(**figures)  # type: ignore[arg-type]
    return as_property("the agent is killed", "nobody loses a packet", seen)


def test_tests_of_one_fault_are_one_line_with_the_sum_and_the_worst() -> None:
    ledger = Ledger()
    ledger.add("a.py::one[x]", [line(tried=3, overrun=0.25, lost=0)], passed=True)
    ledger.add("a.py::one[y]", [line(tried=4, overrun=-0.5, lost=2, note="a note")], passed=True)
    [row] = [text for text in ledger.render("1").splitlines() if text.startswith("| the agent")]
    assert row == (
        "| the agent is killed | nobody loses a packet | 7 "
        "| worst overrun 250 ms; 2 packets lost by others; a note |"
    )
    assert "- packets lost by peers that nothing was done to: 2" in ledger.render("1")


def test_a_failure_shows() -> None:
    ledger = Ledger()
    ledger.add("a.py::one", [line()], passed=False)
    assert "**1 FAILED**" in ledger.render("1")


def test_a_report_without_figures_of_ours_is_no_line() -> None:
    ledger = Ledger()
    ledger.add("a.py::one", [("else", 1)], passed=True)
    assert not ledger


def test_a_part_that_runs_anew_replaces_its_own_lines_and_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "kept" / "seen.json"
    ledger = Ledger()
    for test, overrun in (("a.py::one", 3.0), ("a.py::two", 0.5), ("a.py::one", 0.25)):
        ledger = Ledger()
        ledger.add(test, [line(overrun=overrun)], passed=True)
        ledger.keep(file)
    assert "worst overrun 500 ms" in ledger.render("1")


def test_a_part_that_failed_and_holds_when_run_anew_still_shows_that_it_failed(tmp_path: Path) -> None:
    file = tmp_path / "seen.json"
    ledger = Ledger()
    for overrun, passed in ((5.1, False), (0.25, True), (0.5, True)):
        ledger = Ledger()
        ledger.add("a.py::one", [line(overrun=overrun)], passed=passed)
        ledger.keep(file)
    text = ledger.render("1")
    assert "worst overrun 500 ms; **FAILED in an earlier run**: worst overrun 5.1 s" in text
    assert "- worst reply past a deadline: 5.1 s" in text


def test_make_reliability_finds_the_matrix_with_and_without_a_report_of_before() -> None:
    root = Path(__file__).parents[2]
    assert (root / "docs/reliability.md").exists()
    argv = ["make", "reliability", "ARGS=--collect-only -q"]
    listed = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True, timeout=110).stdout
    assert "tests/reliability/test_random.py::" in listed
