"""The Debian package, built from this checkout, and another of it that calls itself a later version."""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache/package"
LATER = "9.9.9"
LIB = Path("/usr/lib/wg-agent")


def build() -> Path:
    """Build the package as ``make deb`` does, unless it is there and its sources are older; its path."""
    done = subprocess.run([ROOT / ".ci/deb"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f".ci/deb: {done.returncode}: {(done.stdout + done.stderr).strip()}")
    return built()


def built() -> Path:
    """Return the package's path; AssertionError if there is none."""
    found = list((ROOT / "dist").glob("wg-agent_*.deb"))
    assert len(found) == 1, "one package in dist/: .ci/deb makes it, and says what is wrong if it can't"
    return found[0]


def now() -> Path:
    """Return the path of the package for the lab: the same, but not packed, for the processor is emulated."""
    return FOLDER / "now.deb"


def later() -> Path:
    """Return the path of the later version, not packed either."""
    return FOLDER / "later.deb"


def build_both() -> None:
    """Build the package for the lab, and the later one; what goes wrong is left to the tests that miss it."""
    try:
        package = build()
    except RuntimeError as error:
        print(error)
        return
    newest = package.stat().st_mtime
    if all(one.exists() and one.stat().st_mtime > newest for one in (now(), later())):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        tree = unpack(package, Path(scratch) / "tree")
        _pack(tree, now())
        _make_later(tree)
        _pack(tree, later())


def _pack(tree: Path, to: Path) -> None:
    made = tree.with_suffix(".deb")
    build = ("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, made)
    subprocess.run(build, check=True, capture_output=True)
    made.replace(to)


def _make_later(tree: Path) -> None:
    """Change the version, in the agent's own code too, and nothing else."""
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {LATER}-1", control.read_text()))
    [init] = tree.glob("usr/lib/wg-agent/dist/lib/*/site-packages/agent/__init__.py")
    init.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{LATER}"', init.read_text()))
    compile_again = ("-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash")
    subprocess.run(["/usr/bin/python3", *compile_again, init], check=True)
    sums = tree / "DEBIAN/md5sums"
    listed = dict(line.split("  ", 1)[::-1] for line in sums.read_text().splitlines())
    for file in (init, *init.parent.glob("__pycache__/__init__.*.pyc")):
        name = str(file.relative_to(tree))
        assert name in listed
        listed[name] = hashlib.md5(file.read_bytes()).hexdigest()
    sums.write_text("".join(f"{value}  {name}\n" for name, value in listed.items()))


def field(package: Path, name: str) -> str:
    """Return a field of the package's control file."""
    return subprocess.run(
        ["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True
    ).stdout.strip()


def unpack(package: Path, folder: Path) -> Path:
    """Unpack the package's files and its control files (``DEBIAN``) into a folder; the folder."""
    subprocess.run(["dpkg-deb", "-R", package, folder], check=True)
    return folder
