from typing import Any, cast

from agent.core.defguard.feed import Feed, Terms
from agent.model import SessionPolicy
from agent.reporting import Reporting
from agent.state import State
from tests.support.builders import NOW, OWN_KEY, device, observed, peer, snapshot


async def forget(ends: object) -> None:
    raise AssertionError("no session has ended")


def test_a_look_without_changes_is_nothing_to_tell_defguard_also_where_core_judges_liveness() -> None:
    state = State(own_key=OWN_KEY)
    state.load(snapshot([peer(1)], policy=SessionPolicy(liveness="core")), NOW)
    reports = Reporting(state, lambda: NOW, forget)
    feed = Feed(Terms("hq"), cast("Any", None), reports, cast("Any", None))
    for _ in range(2):
        state.observe(device(observed(1)), NOW)
        reports.observed()
        assert list(feed.stats()) == []
        assert reports.stats(10) is None
