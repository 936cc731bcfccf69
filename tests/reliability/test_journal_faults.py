"""The journal lost, corrupt, on a read-only or a full disk, at a restart that finds core away as well."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.sandbox.core import Core
from tests.support.client import Client
from tests.support.ledger import FULL, Seen
from tests.support.places import here_and_at_full_size_on_the_kernel
from tests.support.scenarios import EMULATED, SLACK, connect, monotonic_of, ping
from tests.support.site import Site, until

LIFETIME = 45.0 if EMULATED else 8.0

Break = Callable[[Path], None]


def lost(state: Path) -> None:
    for file in state.glob("journal*"):
        file.unlink()


def corrupt(state: Path) -> None:
    for file in state.glob("journal*"):
        content = bytearray(file.read_bytes())
        content[100:] = b"\x5a" * len(content[100:])
        file.write_bytes(content)


def read_only(state: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", state], check=True)


def full(state: Path) -> None:
    with contextlib.suppress(OSError), (state / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def mended(state: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", state], check=True)
    (state / "filler").unlink(missing_ok=True)


FAULTS = (lost, corrupt, read_only, full)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """The agent's state folder, on a small disk of its own."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def granted_without_waiting(site: Site, client: Client) -> None:
    def work(core: Core) -> None:
        core.sessions.grant(client.device, core.directory.location("hq"), "totp", core.clock())

    site.core.do(work)


@pytest.mark.reliability(
    "the journal is lost, corrupt, read-only or its disk full at a restart, core away",
    "sessions end on time and their peers go, live tunnels stay, nobody new is let in unjournalled",
)
@pytest.mark.parametrize("fault", FAULTS if FULL else (lost,), ids=lambda fault: fault.__name__)
@here_and_at_full_size_on_the_kernel
def test_a_broken_journal_lets_nobody_in_and_drops_nobody(
    tmp_path: Path, state: Path, seen: Seen, fault: Break, where: str
) -> None:
    can_be_read = fault in {read_only, full}
    with Site(tmp_path, forked=True) as site:
        ending, lasting, newcomer = site.add_clients(3)
        site.start_agent()
        for client in (ending, lasting):
            site.attach(client)
        connect(site, lasting)
        session, psk = site.grant(ending, LIFETIME)
        site.connect(ending, psk)
        deadline = monotonic_of(session.expires_at)
        with ping(ending) as cut, ping(lasting) as kept:
            cut.wait_reply(30)
            kept.wait_reply(30)
            site.core.kill()
            site.kill_agent()
            fault(state)
            site.start_agent(ready=False)
            cut.wait_reply(30)
            assert time.monotonic() < deadline - 1.0, "the start took too long to tell anything"
            time.sleep(deadline - time.monotonic())
            last_reply = cut.wait_silence(1.0, 30)
            until(lambda: ending.public_key not in site.shown(), SLACK, "the removal of the peer")
            site.core.start()
            until(lambda: site.status()["epoch"], 60)
            granted_without_waiting(site, newcomer)
            if can_be_read:
                until(lambda: site.peer(newcomer).get("reason") == "not_journalled", 30)
                assert site.shown().keys() == {lasting.public_key}
                mended(state)
            until(lambda: site.peer(newcomer)["state"] == "up", 60)
            assert site.shown().keys() == {lasting.public_key, newcomer.public_key}
            kept.wait_reply(30)
        assert last_reply < deadline + SLACK
        assert kept.losses() == []
        ends = site.core.admin.session_ends
        if can_be_read:
            until(lambda: site.core.call(ends()), what="the end at core")
        # What only the guard's table knew of has an id again if core still lists it.
        told = [(end["session_id"], end["reason"]) for end in site.core.call(ends())]
        assert set(told) <= {(session.id, "expired")}
        seen(overrun=last_reply - deadline, lost=kept.lost)
