"""The distribution's kernel for the guest: fetched with apt once, unpacked, never installed."""

import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class LabUnavailableError(Exception):
    """The lab can't start here; the message says what is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class Arch:
    """What differs between the machines that the lab runs on."""

    debian: str
    qemu: str
    qemu_package: str
    machine: tuple[str, ...]
    console: str


ARCHES = {
    "x86_64": Arch("amd64", "qemu-system-x86_64", "qemu-system-x86", (), "ttyS0"),
    "aarch64": Arch(
        "arm64", "qemu-system-aarch64", "qemu-system-arm", ("-M", "virt", "-cpu", "max"), "ttyAMA0"
    ),
}
# The kernel's metapackage, by the distribution's ID in /etc/os-release.
METAPACKAGES = {"debian": "linux-image-{arch}", "ubuntu": "linux-image-generic"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: ``root`` holds boot/vmlinuz-RELEASE and lib/modules/RELEASE."""

    root: Path
    release: str

    @property
    def image(self) -> Path:
        return self.root / f"boot/vmlinuz-{self.release}"

    def modules(self, names: tuple[str, ...]) -> list[Path]:
        """The module files that load ``names``, dependencies first; unknown names give none."""
        files: dict[Path, None] = {}
        for name in names:
            out = subprocess.run(
                ["modprobe", "-d", self.root, "-S", self.release, "--show-depends", name],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            for line in out.splitlines():
                if line.startswith("insmod "):
                    files.setdefault(Path(line.split()[1]))
        return list(files)


def arch() -> Arch:
    """This machine's entry of ``ARCHES``; raises ``LabUnavailableError``."""
    found = ARCHES.get(platform.machine())
    if found is None:
        msg = f"the lab knows {' and '.join(ARCHES)}, not {platform.machine()}"
        raise LabUnavailableError(msg)
    return found


def check() -> None:
    """Raise ``LabUnavailableError`` when a program that the lab needs is missing."""
    needed = {
        arch().qemu: arch().qemu_package,
        "busybox": "busybox-static",
        "cpio": "cpio",
        "modprobe": "kmod",
        "apt-get": "apt (the lab's kernel is a Debian or Ubuntu package)",
    }
    missing = [package for program, package in needed.items() if shutil.which(program) is None]
    if missing:
        raise LabUnavailableError(f"the lab needs {', '.join(missing)}: apt-get install them")


def cache() -> Path:
    default = Path.home() / ".cache/wg-agent-lab"
    return Path(os.environ.get("LAB_CACHE") or default).absolute()


def fetch() -> Kernel:
    """The cached kernel, fetched first if there is none; raises ``LabUnavailableError``."""
    check()
    where = cache()
    where.mkdir(parents=True, exist_ok=True)
    with _locked(where / "lock"):
        root = where / "kernel"
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=where) as scratch:
                _download(Path(scratch))
                (Path(scratch) / "root").rename(root)
        image = next(root.glob("boot/vmlinuz-*"))
        return Kernel(root, image.name.removeprefix("vmlinuz-"))


def _download(scratch: Path) -> None:
    package = _image_package()
    release = package.removeprefix("linux-image-")
    root = scratch / "root"
    root.mkdir()
    # Ubuntu ships the modules apart from the image; Debian has one package.
    for name in (package, f"linux-modules-{release}", f"linux-modules-extra-{release}"):
        if name != package and _depends(name) is None:
            continue
        done = subprocess.run(
            ["apt-get", "download", "-qq", name],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabUnavailableError(f"apt-get download {name} failed: {done.stderr.strip()}")
        subprocess.run(["dpkg", "-x", next(scratch.glob(f"{name}_*.deb")), root], check=True)
    found = next(root.glob("boot/vmlinuz-*")).name.removeprefix("vmlinuz-")
    subprocess.run(["depmod", "-b", root, found], check=True)


def _image_package() -> str:
    os_release = platform.freedesktop_os_release()
    family = [os_release.get("ID", ""), *os_release.get("ID_LIKE", "").split()]
    pattern = next((METAPACKAGES[name] for name in family if name in METAPACKAGES), None)
    if pattern is None:
        raise LabUnavailableError("the lab's kernel is a Debian or Ubuntu package: this is neither")
    meta = pattern.format(arch=arch().debian)
    depends = _depends(meta)
    if not depends and os.geteuid() == 0:  # a fresh image has no package lists
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        depends = _depends(meta)
    image = next((d for d in depends or () if d.startswith("linux-image-") and d != meta), None)
    if image is None:
        raise LabUnavailableError(f"apt knows no {meta}: run apt-get update as root")
    return image


def _depends(package: str) -> list[str] | None:
    """The packages that ``package`` depends on, or None when apt does not know it."""
    done = subprocess.run(
        ["apt-cache", "depends", package],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    if done.returncode or not lines:
        return None
    return [words[1] for words in lines if len(words) == 2 and words[0] == "Depends:"]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
