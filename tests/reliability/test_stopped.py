"""The agent stopped or killed: the kernel's WireGuard and its guard alone (rules 11 and 12).

On wireguard-go the same is tested in tests/e2e/test_guard.py.
"""

import pytest

from tests.support.ledger import Seen
from tests.support.site import Site
from tests.support.stopped import (
    KILLED,
    LAPSED,
    STOPPED,
    over_a_deadline_killed,
    over_a_deadline_stopped,
    over_the_lease,
)

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]


@STOPPED
def test_the_kernel_ends_a_session_at_its_deadline_while_the_agent_is_stopped(site: Site, seen: Seen) -> None:
    over_a_deadline_stopped(site, seen)


@pytest.mark.full_size
@LAPSED
def test_a_dead_agent_lapses_for_sessions_only_and_is_forgiven_when_it_is_back(
    site: Site, seen: Seen
) -> None:
    over_the_lease(site, seen)


@pytest.mark.full_size
@KILLED
def test_the_kernel_ends_a_session_at_its_deadline_after_the_agent_was_killed(site: Site, seen: Seen) -> None:
    over_a_deadline_killed(site, seen)
    site.start_agent(timeout=120)
