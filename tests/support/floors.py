"""How much of floors 0 and 1 the session covered, and whether that is enough."""

import io
import warnings
from pathlib import Path

import coverage

BRANCHES_WANTED = 95.0  # percent, of all modules together


def judge(cov: coverage.Coverage, root: Path) -> tuple[bool, str]:
    """Whether the modules of ``[tool.coverage.report] include`` pass, and the table of them."""
    cov.stop()
    listed = cov.get_option("report:include")
    assert isinstance(listed, list)
    modules = [root / str(name) for name in listed]
    if missing := [str(module) for module in modules if not module.exists()]:
        return False, f"pyproject.toml lists what is not there: {', '.join(missing)}"
    table = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", coverage.exceptions.CoverageWarning)
        try:
            cov.report(file=table)
        except coverage.exceptions.NoDataError:
            return False, "no test touched floors 0 and 1"
        lines = [line for module in modules for line in cov.branch_stats(str(module)).values()]
    total = sum(exits for exits, _ in lines)
    taken = sum(taken for _, taken in lines)
    percent = 100.0 * taken / total if total else 100.0
    verdict = f"{taken} of {total} branches: {percent:.1f} % ({BRANCHES_WANTED:.0f} % wanted)"
    return percent >= BRANCHES_WANTED, table.getvalue() + verdict
