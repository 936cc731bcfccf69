"""The package's scripts where something is not as they would like it: dpkg is real, systemd is not."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.box import Box

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

STATE = "/var/lib/wg-agent/wg0"
LIVE = "/usr/lib/wg-agent/live"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    folder = tmp_path / "box"
    folder.mkdir()
    with Box(folder) as made:
        yield made


def install(box: Box) -> None:
    """The package, and an agent of wg0 with its journal and its interface."""
    box.sh(f"dpkg -i {box.package('1')}")
    box.sh(f"mkdir -p {STATE} /sys/class/net/wg0; touch {STATE}/journal.sqlite; : >/etc/wg-agent/wg0.toml")


def runs(box: Box, name: str = "wg0") -> bool:
    lock = f"/run/wg-agent/{name}/{name}.lock"
    return box.run(f"[ -e {lock} ] && ! flock -n {lock} true").returncode == 0


def tables_deleted(box: Box) -> list[str]:
    return [line.split()[-1] for line in box.said() if line.startswith("nft delete table inet")]


def test_removed_and_purged_when_only_unpacked_it_stops_the_agents_and_leaves_no_tree(box: Box) -> None:
    install(box)
    box.sh("agent wg0")
    box.sh(f"dpkg --unpack {box.package('2')}")

    box.sh("dpkg --remove wg-agent")

    assert not runs(box)
    assert [path for path in (LIVE, "/usr/lib/wg-agent") if box.has(path)] == []
    assert box.has(f"{STATE}/journal.sqlite")
    box.sh("dpkg --purge wg-agent")
    assert not box.has("/var/lib/wg-agent")
    assert tables_deleted(box) == ["wg_agent_wg0", "wg_agent.acl_wg0"]


@pytest.mark.parametrize(
    "hindrance", ["touch /undeletable", "rm -f /usr/local/sbin/ip; mv /usr/bin/ip /sbin/ip /"]
)
def test_a_purge_keeps_the_tables_of_an_interface_that_it_could_not_delete(box: Box, hindrance: str) -> None:
    install(box)
    box.run(hindrance)

    said = box.sh("dpkg --purge wg-agent")

    assert tables_deleted(box) == []
    assert box.has("/sys/class/net/wg0")
    assert "wg0 IS STILL THERE" in said
    assert "nft delete table inet wg_agent_wg0" in said


def test_a_purge_deletes_the_tables_with_the_interface(box: Box) -> None:
    install(box)

    said = box.sh("dpkg --purge wg-agent")

    assert not box.has("/sys/class/net/wg0")
    assert tables_deleted(box) == ["wg_agent_wg0", "wg_agent.acl_wg0"]
    assert "STILL THERE" not in said


@pytest.mark.parametrize("action", ["--remove", "--purge"])
@pytest.mark.parametrize(
    "hindrance",
    [
        pytest.param(
            "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d",
            id="policy",
        ),
        pytest.param("rmdir /run/systemd/system", id="no-systemd"),
        pytest.param("touch /unstoppable", id="by-hand"),
    ],
)
@pytest.mark.parametrize("unpacked", [False, True], ids=["installed", "unpacked"])
def test_nothing_is_removed_while_an_agent_runs_that_could_not_be_stopped(
    box: Box, hindrance: str, action: str, unpacked: bool
) -> None:
    install(box)
    box.sh(f"agent wg0; {hindrance}")
    if unpacked:
        box.sh(f"dpkg --unpack {box.package('2')}")

    done = box.run(f"dpkg {action} wg-agent")

    pid = box.sh("cat /run/wg-agent/wg0/wg0.lock").strip()
    assert done.returncode != 0
    assert f"an agent still runs on wg0 (process {pid})" in done.stderr
    assert runs(box)
    assert box.has("/usr/lib/wg-agent/current/module0")
    assert box.has(f"{STATE}/journal.sqlite")
    box.sh(f"kill {pid}; sleep 0.2; dpkg {action} wg-agent")
    assert not box.has(LIVE)


def test_a_removal_that_fails_starts_the_agents_again_that_it_has_stopped(box: Box) -> None:
    install(box)
    box.sh("agent wg0")
    # Another that is not the unit's: the stop reaches wg0's only.
    box.sh("mkdir -p /run/wg-agent/wg1; setsid flock /run/wg-agent/wg1/wg1.lock sleep 600 >/dev/null 2>&1 &")
    before = box.sh(
        "until ! flock -n /run/wg-agent/wg1/wg1.lock true; do sleep 0.02; done; cat /run/wg-agent/wg0/*.lock"
    )

    done = box.run("dpkg --remove wg-agent")

    assert done.returncode != 0
    assert "an agent still runs on wg1" in done.stderr
    assert "an agent still runs on wg0" not in done.stderr
    assert runs(box)
    assert box.sh("cat /run/wg-agent/wg0/wg0.lock") != before
    assert not box.has("/run/wg-agent-stopped")
    assert box.sh("dpkg-query -W -f '${Status}' wg-agent").endswith(" ok installed")


def test_an_upgrade_without_systemd_says_that_what_runs_was_not_restarted(box: Box) -> None:
    install(box)
    box.sh("agent wg0; rmdir /run/systemd/system")

    assert "were not restarted" in box.sh(f"dpkg -i {box.package('2')}")
    assert runs(box)


def hinder_cp(box: Box, *, also_copies: bool) -> None:
    """Links can be made until the second file; and copies, too, if so."""
    copies = 'echo "cp: No space left on device" >&2; exit 1' if also_copies else 'exec /bin/cp "$@"'
    box.write(
        "/usr/local/sbin/cp",
        f"""#!/bin/sh
if [ "$1" = -al ]; then
  for to in "$@"; do :; done
  ln "${{2%.}}module0" "$to"
  echo "cp: cannot create hard link 'module1': Too many links" >&2
  exit 1
fi
{copies}
""",
        mode="755",
    )


def test_where_links_fail_half_way_the_tree_is_made_anew_of_copies_and_the_error_is_shown(box: Box) -> None:
    hinder_cp(box, also_copies=False)

    said = box.sh(f"dpkg -i {box.package('1')}")

    assert "Too many links" in said
    files = box.sh("stat -c '%n %h' /usr/lib/wg-agent/current/*").split()
    assert files[1::2] == ["1", "1", "1"]


def test_a_tree_that_could_not_be_made_is_not_left_behind(box: Box) -> None:
    hinder_cp(box, also_copies=True)

    done = box.run(f"dpkg -i {box.package('1')}")

    assert done.returncode != 0
    assert "No space left" in done.stderr
    assert box.sh(f"ls {LIVE}") == ""
    box.sh("rm /usr/local/sbin/cp; dpkg --configure wg-agent; cat /usr/lib/wg-agent/current/module2")


def test_a_configurations_folder_that_was_there_gets_its_mode_if_it_is_empty(box: Box) -> None:
    box.sh("mkdir -m 700 /etc/wg-agent; chown 1:1 /etc/wg-agent")

    box.sh(f"dpkg -i {box.package('1')}")

    assert box.sh("stat -c '%U:%G %a' /etc/wg-agent").strip() == "root:root 711"


def test_one_with_files_in_it_is_left_and_warned_about_once(box: Box) -> None:
    box.sh("mkdir -m 700 /etc/wg-agent; touch /etc/wg-agent/wg0.toml")

    said = box.sh(f"dpkg -i {box.package('1')}")

    assert "/etc/wg-agent is root:root 700" in said
    assert "chmod 711 /etc/wg-agent" in said
    assert box.sh("stat -c %a /etc/wg-agent").strip() == "700"
    assert "chmod 711" not in box.sh(f"dpkg -i {box.package('2')}")


def test_an_interface_whose_state_is_elsewhere_stays_up_and_is_named(box: Box) -> None:
    install(box)
    box.sh(f"rm {STATE}/journal.sqlite")

    removed = box.sh("dpkg --remove wg-agent")
    purged = box.sh("dpkg --purge wg-agent")

    assert "wg0 is up and its state is not in /var/lib/wg-agent" in removed
    assert "wg0 is left up" in purged
    assert box.has("/sys/class/net/wg0")
    assert tables_deleted(box) == []
