"""Sessions by the thousand that end in the same second (rule 8)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ledger import FULL, Seen
from tests.support.mass_end import Crowd

HOLDS = (
    "all cut within 2 s, others lose no packet, a read of another WireGuard interface waits 100 ms at most"
    " until all are removed"
)
MANY = 2000 if FULL else 500
SLOWLY = 1000 if FULL else 60
"""How many where the removal of one takes 35 ms."""

pytestmark = pytest.mark.timeout(1800)
where = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(False, marks=(pytest.mark.netns, pytest.mark.userspace), id="wireguard-go"),
        pytest.param(True, marks=(pytest.mark.kernel, pytest.mark.full_size), id="kernel"),
    ],
)


@pytest.mark.reliability("thousands of sessions have the same deadline", HOLDS)
@where
def test_many_that_expire_together_are_cut_in_time_and_stop_nobody_else(
    crowd: Crowd, kernel: bool, seen: Seen
) -> None:
    crowd.gather(MANY)
    crowd.end(crowd.expire, kept=crowd.staying, left=2, kernel=kernel).check(seen)


@pytest.mark.full_size
@pytest.mark.reliability("core revokes thousands of sessions at once", HOLDS)
@where
def test_many_that_are_revoked_together_are_cut_in_time_and_stop_nobody_else(
    crowd: Crowd, kernel: bool, seen: Seen
) -> None:
    crowd.gather(MANY)
    crowd.end(crowd.revoke, kept=crowd.staying, left=2, kernel=kernel).check(seen)


@pytest.mark.full_size
@pytest.mark.reliability("the operator ends thousands of sessions by `wg-agent end --all`", HOLDS)
@where
def test_many_that_the_operator_ends_are_cut_in_time_and_stop_nobody_else(
    crowd: Crowd, kernel: bool, seen: Seen
) -> None:
    crowd.gather(MANY)
    crowd.end(crowd.end_all, kept=crowd.router, left=1, kernel=kernel).check(seen)


@pytest.fixture
def slow_removals() -> Iterator[None]:
    """As on real-time kernels and some distributions: no expedited grace periods."""
    switch = Path("/sys/kernel/rcu_normal")
    before = switch.read_text()
    switch.write_text("1")
    yield
    switch.write_text(before)


@pytest.mark.lab
@pytest.mark.kernel
@pytest.mark.full_size
@pytest.mark.usefixtures("slow_removals")
@pytest.mark.reliability("the same on a kernel where removing one peer takes 35 ms (`rcu_normal=1`)", HOLDS)
def test_on_a_kernel_that_removes_slowly_the_same_holds(crowd: Crowd, seen: Seen) -> None:
    crowd.gather(SLOWLY)
    crowd.end(crowd.expire, kept=crowd.staying, left=2, kernel=True).check(seen)
