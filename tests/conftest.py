"""Which tests run where, what may be skipped, and how much of the pure floors must be covered.

Folders and markers decide: a test marked ``kernel`` runs right here where the running kernel has
WireGuard and we are root, else in the lab, all such tests in one boot. ``WG_AGENT_TEST_NATIVE=0``
prefers the lab, ``=1`` insists on this kernel. With ``CI=true`` a skip is a failure.
"""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import coverage
import hypothesis
import pytest
from _pytest.reports import CollectReport, TestReport
from _pytest.terminal import TerminalReporter

from agent import __version__
from tests.lab import kernel, remote
from tests.support import floors, needs
from tests.support.ledger import FULL, Ledger, Seen, as_property

CI = os.environ.get("CI") == "true"

# Shared build machines stall: a slow example is no failure. Hypothesis has its own profile for CI.
hypothesis.settings.register_profile("here", deadline=None)
if not CI:
    hypothesis.settings.load_profile("here")

# A shell lets what a script starts in the background ignore Ctrl-C, and so would every program under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_run_key = pytest.StashKey[remote.RemoteRun]()
_floors_key = pytest.StashKey[str]()
_ledger = Ledger()
_passed: dict[str, bool] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability-report", type=Path, help="write what the reliability tests saw here")


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Generator[Seen, None, None]:
    """Takes the figures of a test that is marked with ``reliability(fault, holds)``."""
    mark = request.node.get_closest_marker("reliability")
    assert mark is not None, "seen is for tests of the reliability matrix"
    fault, holds = mark.args
    sightings = Seen()
    yield sightings
    request.node.user_properties.append(as_property(fault, holds, sightings))


@pytest.fixture(autouse=True)
def _line_of_the_matrix(request: pytest.FixtureRequest) -> None:
    """A marked test is a line of the matrix also if it has no figures."""
    if request.node.get_closest_marker("reliability") is not None:
        request.getfixturevalue("seen")


def pytest_runtest_logreport(report: TestReport) -> None:
    if needs.IN_LAB:
        return
    # Figures come with the teardown's report, which says nothing of the test itself.
    if report.when == "call":
        _passed[report.nodeid] = report.passed
    elif report.when == "teardown":
        _ledger.add(report.nodeid, report.user_properties, passed=_passed.get(report.nodeid, False))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not FULL:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full_size")])
        items[:] = [item for item in items if not item.get_closest_marker("full_size")]
    groups: dict[bool, list[pytest.Item]] = {False: [], True: []}
    here: list[pytest.Item] = []
    for item in items:
        if "kernel" in item.path.relative_to(item.config.rootpath).parts:
            item.add_marker("kernel")
        reason = _not_here(item)
        if reason is None:
            here.append(item)
        elif lab_reason := _no_lab():
            item.add_marker(pytest.mark.skip(reason=f"{reason}, and {lab_reason}"))
            here.append(item)
        else:
            # The limits of the guest's own pytest count, not those of waiting for it.
            item.add_marker(pytest.mark.timeout(0))
            groups[item.get_closest_marker("systemd") is not None].append(item)
    for systemd, group in groups.items():
        run = remote.RemoteRun(group, systemd=systemd)
        for item in group:
            item.stash[_run_key] = run
    items[:] = here + groups[False] + groups[True]


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    count = sum(_run_key in item.stash for item in items)
    return [f"{count} of them run in the lab (tests/lab), after the others"] if count else []


def _not_here(item: pytest.Item) -> str | None:
    """Why an item has to run in the lab; what can't run at all is marked as skipped."""
    if needs.IN_LAB:
        return None
    if item.get_closest_marker("lab") or item.get_closest_marker("systemd"):
        return "this test changes the whole machine"
    if item.get_closest_marker("kernel"):
        native = os.environ.get("WG_AGENT_TEST_NATIVE")
        if native == "1":
            return None
        if native == "0":
            return "WG_AGENT_TEST_NATIVE=0"
        return needs.no_kernel_wireguard()
    for marker, probe in (
        ("userspace", needs.no_userspace_wireguard),
        ("netns", needs.no_netns),
    ):
        if item.get_closest_marker(marker) and (reason := probe()):
            item.add_marker(pytest.mark.skip(reason=reason))
    return None


def _no_lab() -> str | None:
    try:
        kernel.check()
    except kernel.LabUnavailableError as error:
        return str(error)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    run = item.stash.get(_run_key, None)
    if run is None:
        return None
    run.run(item)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, TestReport, TestReport]:
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        _fail_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, CollectReport, CollectReport]:
    report = yield
    if CI and report.skipped:
        _fail_skip(report)
    return report


def _fail_skip(report: TestReport | CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"in CI nothing is skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Under ``coverage run``, hold floors 0 and 1 to their share of branches."""
    try:
        result = yield
    finally:
        for item in session.items:
            if run := item.stash.get(_run_key, None):
                run.close()
    cov = coverage.Coverage.current()
    if cov is not None and not needs.IN_LAB and not session.config.option.collectonly:
        passed, text = floors.judge(cov, session.config.rootpath)
        session.config.stash[_floors_key] = text
        if not passed:
            session.testsfailed += 1
    return result


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    report: Path | None = config.option.reliability_report
    if report is not None and _ledger:
        _ledger.keep(config.rootpath / ".cache/reliability.json")
        report.write_text(_ledger.render(__version__), encoding="utf-8")
        terminalreporter.write_line(f"reliability: written to {report}")
    if text := config.stash.get(_floors_key, None):
        terminalreporter.section("coverage of floors 0 and 1")
        terminalreporter.write_line(text)
