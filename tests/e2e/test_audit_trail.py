"""``wg-agent events --follow`` and ``explain`` beside a real agent on real WireGuard."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.scenarios import connect, renew, revoke
from tests.support.site import Site

pytestmark = [pytest.mark.netns, pytest.mark.userspace]

PATIENCE = 10.0
"""Seconds until something is told: less than a follower waits in one go."""
QUICK = 3.0
"""Seconds that an agent with somebody at its socket may take to stop."""


class Follower:
    """The lines of ``wg-agent events --follow --json`` as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def wait(self, event: str) -> dict[str, Any]:
        """The next occurrence of this kind."""
        while (told := self._lines.get(timeout=PATIENCE))["event"] != event:
            pass
        return told


@contextmanager
def following(site: Site) -> Iterator[Follower]:
    argv = (sys.executable, "-m", "agent", "events", "--follow", "--json", "-c", str(site.config))
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        yield Follower(process)
    finally:
        process.kill()
        process.communicate()


def explained(site: Site, what: str) -> dict[str, Any]:
    argv = (sys.executable, "-m", "agent", "explain", "--json", "-c", str(site.config), what)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    (peer,) = json.loads(done.stdout)["peers"]
    return peer  # type: ignore[no-any-return]


def whom(event: dict[str, Any]) -> tuple[str, str | None]:
    return event["public_key"], event["session_id"]


def test_a_follower_sees_a_sessions_life_drift_and_core_and_each_peer_is_explained(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        client: Client
        [client] = site.add_clients(1)
        site.start_agent()
        assert explained(site, client.address)["reason"] == "no_session"
        with following(site) as follower:
            assert follower.wait("started")["revision"] is None
            assert follower.wait("location")["detail"].endswith("requires MFA")

            site.attach(client)
            connect(site, client)
            granted = follower.wait("granted")
            assert whom(granted) == (client.public_key, client.sessions[-1])
            revision = site.status()["revision"]
            assert granted["revision"] == revision
            assert explained(site, client.public_key[:10])["reason"] == "session"

            renew(site, client)
            renewed = follower.wait("renewed")
            assert (whom(renewed), renewed["revision"]) == (whom(granted), revision + 1)

            site.gateway.run("wg", "set", site.interface, "peer", client.public_key, "remove")
            drift = follower.wait("drift")
            assert (drift["public_key"], drift["reason"]) == (client.public_key, "peer_removed")

            revoke(site, client)
            ended = follower.wait("ended")
            assert (whom(ended), ended["reason"]) == (whom(granted), "revoked")
            off = explained(site, client.public_key)
            assert (off["on_interface"], off["reason"]) == (False, "no_session")
            assert [one["event"] for one in off["events"]] == ["granted", "renewed", "drift", "ended"]

            site.core.kill()
            assert follower.wait("core_lost")["detail"]
            site.core.start()
            follower.wait("core_found")

            # Somebody who follows does not hold up an agent that is told to stop, and finds the next one.
            began = time.monotonic()
            assert site.stop_agent() == 0
            assert time.monotonic() - began < QUICK
            site.start_agent()
            assert "0 sessions adopted" in follower.wait("started")["detail"]
