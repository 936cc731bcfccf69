"""pytest items that run in the lab: collected on the host, run in one boot, reported on the host.

The guest's pytest writes each report as a line of JSON to ``$LAB_OUT/reports``; the host's replays
them as they come, so that one session shows, counts and fails everything.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest
from _pytest.reports import TestReport

from tests.lab.kernel import LabUnavailableError
from tests.lab.machine import Boot, Guest, booted
from tests.support import package

# Under emulation everything takes about ten times as long as the suite's own limits allow for.
TEST_TIMEOUT = 300
# Five minutes on a quiet machine; three times that were seen on one that shares its processors.
SUITE_TIMEOUT = 3 * 3600.0 if os.environ.get("RELIABILITY") == "full" else 1800.0
FORWARDED = (
    *("CI", "HYPOTHESIS_PROFILE", "LAB_CACHE"),
    *("RELIABILITY", "RELIABILITY_ROUNDS", "RELIABILITY_SEED"),
)


class Reporter:
    """The guest's side, loaded by ``-p tests.lab.remote`` when ``$LAB_REPORTS`` is set."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def pytest_runtest_logreport(self, report: TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data, default=str) + "\n")
        self._file.flush()


def pytest_configure(config: pytest.Config) -> None:
    if where := os.environ.get("LAB_REPORTS"):
        config.pluginmanager.register(Reporter(config, Path(where)), "lab-reporter")


class RemoteRun:
    """The host's side: one boot that runs these items in their order; started by the first."""

    def __init__(self, items: list[pytest.Item], *, systemd: bool) -> None:
        self._items = items
        self._systemd = systemd
        self._stack = ExitStack()
        self._guest: Guest | None = None
        self._reports: Iterator[dict[str, Any] | None] = iter(())
        self._fault: str | None = None

    def run(self, item: pytest.Item) -> None:
        """Report an item as the guest's pytest did, waiting for it to get there."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if item is self._items[-1]:
            self.close()

    def close(self) -> None:
        """Power the guest off; nothing happens a second time."""
        self._stack.close()

    def _of(self, item: pytest.Item) -> Iterator[TestReport]:
        if self._guest is None and self._fault is None:
            self._start(item.config)
        while self._fault is None:
            data = next(self._reports)
            if data is None:
                break
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            if isinstance(report.longrepr, list):  # JSON has no tuples; a skip's reason is one
                report.longrepr = tuple(report.longrepr)
            if report.nodeid != item.nodeid:
                self._fault = f"the guest ran {report.nodeid} in the place of {item.nodeid}"
                break
            yield report
            if report.when == "teardown":
                return
        yield self._missing(item)

    def _missing(self, item: pytest.Item) -> TestReport:
        if self._fault is None:
            self._fault = f"the guest ended before this test did; it printed:\n{self._tail()}"
        return TestReport(item.nodeid, item.location, {}, "failed", self._fault, "setup")

    def _start(self, config: pytest.Config) -> None:
        if any(item.get_closest_marker("package") for item in self._items):
            package.build_both()
        out = config.rootpath / ".cache/lab" / ("systemd" if self._systemd else "plain")
        out.mkdir(parents=True, exist_ok=True)
        reports = out / "reports"
        reports.write_text("")
        (out / "items").write_text("".join(f"{item.nodeid}\n" for item in self._items))
        env = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        boot = Boot(
            command=(
                *(sys.executable, "-m", "pytest", "-p", "tests.lab.remote"),
                *("-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT}", "@/lab/out/items"),
            ),
            systemd=self._systemd,
            timeout=SUITE_TIMEOUT,
            env={**env, "LAB_REPORTS": "/lab/out/reports"},
        )
        try:
            console = self._stack.enter_context((out / "console").open("wb"))
            self._guest = self._stack.enter_context(booted(boot, out=out, console=console))
        except LabUnavailableError as error:
            self._fault = str(error)
            return
        self._reports = self._follow(self._guest, reports, time.monotonic() + boot.timeout)

    def _follow(self, guest: Guest, path: Path, deadline: float) -> Iterator[dict[str, Any] | None]:
        """The guest's reports as they come, then None for ever."""
        with path.open(encoding="utf-8") as file:
            rest = ""
            while True:
                ended = guest.status() is not None or time.monotonic() > deadline
                rest += file.read()
                *lines, rest = rest.split("\n")
                yield from map(json.loads, lines)
                if ended and not lines:
                    break
                time.sleep(0.1)
        while True:
            yield None

    def _tail(self) -> str:
        if self._guest is None:
            return ""
        console = self._guest.out / "console"
        return "\n".join(console.read_text(errors="replace").splitlines()[-40:])
