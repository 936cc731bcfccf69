import signal
import time
from pathlib import Path

import pytest

from tests.support.scenarios import connect, ping
from tests.support.site import Site, until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]


def test_a_forked_agent_is_killed_waited_for_and_started_again(tmp_path: Path) -> None:
    with Site(tmp_path, forked=True) as site:
        assert site.zygote is not None
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        connect(site, client)
        first = site.process
        site.kill_agent()
        assert first is not None
        assert first.returncode == -signal.SIGKILL
        site.start_agent()
        assert site.stop_agent() == 0


def test_its_clocks_move_with_the_tests(tmp_path: Path) -> None:
    with Site(tmp_path, forked=True) as site:
        assert site.zygote is not None
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        connect(site, client, lifetime=60)
        with ping(client) as pings:
            pings.wait_reply()
            site.zygote.clocks.set(boot=61)
            stepped_at = time.monotonic()
            assert pings.wait_silence(1.0) - stepped_at < 1.0
        until(lambda: site.shown() == {})
        assert len(site.logged("session ended")) == 1
