"""A copy of this system that is thrown away, with dpkg for real and no more of systemd than its words.

The root is an overlay over this one's; processes, network, /run and /sys are its own. Needs root.
"""

import shutil
import subprocess
import textwrap
from pathlib import Path
from types import TracebackType
from typing import Self

SCRIPTS = Path(__file__).parents[2] / ".ci/debian"

_MOUNTS = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir up work root
mount -t overlay overlay -o lowerdir=/,upperdir=up,workdir=work root
for one in sys run tmp; do mount -t tmpfs tmpfs root/$one; done
mount -t proc proc root/proc
mount --rbind /dev root/dev
mkdir -p root/sys/class/net root/run/systemd/system root/var/lib/wg-agent
rm -f root/usr/sbin/policy-rc.d
echo ready
exec sleep infinity
"""

_SYSTEMCTL = """
#!/bin/sh
# An agent is what holds a lock; it stops unless /unstoppable is there.
echo "$*" >>/said
case " $* " in
  *" stop "*)
    [ -e /unstoppable ] || for pid in $(cat /run/wg-agent/*/*.lock 2>/dev/null); do
      kill "$pid" 2>/dev/null || continue
      # Nobody reaps it: it has ended when it has no command line.
      while [ -n "$(tr -d '\\0' 2>/dev/null <"/proc/$pid/cmdline")" ]; do sleep 0.02; done
    done ;;
  *" start "*)
    for unit in "$@"; do
      case $unit in wg-agent@*) name=${unit#wg-agent@}; agent "${name%.service}" ;; esac
    done ;;
  *" list-units "*)
    for lock in /run/wg-agent/*/*.lock; do
      name=$(basename "$lock" .lock)
      [ -e "$lock" ] && ! flock -n "$lock" true && echo "wg-agent@$name.service loaded active running x"
    done ;;
  *" is-active "*) exit 3 ;;
esac
exit 0
"""

_AGENT = """
#!/bin/sh
mkdir -p /run/wg-agent/"$1"
lock=/run/wg-agent/$1/$1.lock
if [ -e "$lock" ] && ! flock -n "$lock" true; then exit 0; fi
rm -f "$lock"
setsid sh -c 'exec 9<>"$1"; flock 9; echo $$ >"$1"; exec sleep 600' sh "$lock" >/dev/null 2>&1 &
until [ -s "$lock" ] && ! flock -n "$lock" true; do sleep 0.02; done
"""

_IP = """
#!/bin/sh
# Interfaces are folders in /sys/class/net; they go unless /undeletable is there.
for name in "$@"; do :; done
case " $* " in
  *" delete "*) [ ! -e /undeletable ] || { echo "RTNETLINK answers: Device or resource busy" >&2; exit 2; }
    rmdir "/sys/class/net/$name" ;;
  *" show "*) echo "7: wg: <POINTOPOINT>" ;;
esac
"""

_NFT = """
#!/bin/sh
echo "nft $*" >>/said
"""


class Box:
    """Enter it, and ``sh`` runs in it; leave it, and all of it has gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._enter: list[str] = []

    def __enter__(self) -> Self:
        unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            [*unshare, "sh", "-c", _MOUNTS, "sh", str(self._folder)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        pid = self._process.pid
        first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        root = str(self._folder / "root")
        self._enter = ["nsenter", "-t", first, "-m", "-n", "-p", "chroot", root, "env"]
        self._enter += ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"]
        for name, text in (("systemctl", _SYSTEMCTL), ("agent", _AGENT), ("ip", _IP), ("nft", _NFT)):
            self.write(f"/usr/local/sbin/{name}", text.lstrip(), mode="755")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        with self._process:
            self._process.kill()

    def run(self, script: str) -> "subprocess.CompletedProcess[str]":
        """Run a shell script in it, however that ends."""
        return subprocess.run(
            [*self._enter, "sh", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    def sh(self, script: str) -> str:
        """Run a shell script that succeeds; what it printed, of both streams."""
        done = self.run(script)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def write(self, path: str, text: str, mode: str = "644") -> None:
        """Make a file of it."""
        write = 'mkdir -p "$(dirname "$0")"; cat >"$0"; chmod "$1" "$0"'
        subprocess.run([*self._enter, "sh", "-c", write, path, mode], input=text, text=True, check=True)

    def has(self, path: str) -> bool:
        """Whether there is something at a path."""
        return self.run(f"[ -e '{path}' ] || [ -L '{path}' ]").returncode == 0

    def said(self) -> list[str]:
        """What systemctl and nft were called with."""
        return self.run("cat /said").stdout.splitlines()

    def package(self, version: str) -> str:
        """Make the package with its real scripts and next to nothing in it; its path in the box."""
        tree = self._folder.parent / f"{self._folder.name}-{version}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "etc/wg-agent").mkdir(parents=True)
        dist = tree / "usr/lib/wg-agent/dist"
        dist.mkdir(parents=True)
        (tree / "etc/wg-agent").chmod(0o711)
        for number in range(3):
            (dist / f"module{number}").write_text(f"{version}\n")
        for script in ("postinst", "prerm", "postrm"):
            shutil.copy(SCRIPTS / script, tree / "DEBIAN" / script)
            (tree / "DEBIAN" / script).chmod(0o755)
        (tree / "DEBIAN/control").write_text(
            textwrap.dedent(f"""\
                Package: wg-agent
                Version: {version}
                Architecture: all
                Maintainer: tests <tests@wg-agent.invalid>
                Description: scripts
                """)
        )
        made = tree.with_suffix(".deb")
        pack = ("dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(made))
        subprocess.run(pack, check=True, capture_output=True)
        inside = f"/tmp/{version}.deb"
        subprocess.run([*self._enter, "sh", "-c", 'cat >"$0"', inside], input=made.read_bytes(), check=True)
        return inside
