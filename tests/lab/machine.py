"""One boot of the lab: an initramfs that puts the host's files under the guest, and QEMU.

Proven on x86_64 with QEMU's TCG: about 5 s from start to command, with systemd about 25 s.
"""

import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.lab.kernel import Kernel, LabUnavailableError, arch, fetch

# Exit statuses besides the command's own.
TIMED_OUT = 124
NEVER_RAN = 125

MEMORY = 3072  # MiB
TIMEOUT = 600.0  # seconds

# Loaded before the command runs; whatever else the guest asks for, its modprobe finds by itself.
MODULES = (
    *("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng"),
    *("wireguard", "veth", "dummy", "tun", "sch_netem"),
    *("nf_tables", "nft_ct", "nft_masq", "nft_chain_nat", "nft_counter"),
)
# Units that only cost time on a throw-away root, or that would clean what the host shares.
MASKED = (
    *("systemd-tmpfiles-setup.service", "systemd-tmpfiles-clean.timer"),
    *("systemd-update-utmp.service", "systemd-journal-flush.service"),
    *("systemd-udevd.service", "systemd-udev-trigger.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("man-db.timer", "fstrim.timer", "logrotate.timer", "prometheus.service"),
)
# With /.dockerenv there the guest's systemd believes that it is in a container, and LoadCredential
# breaks. The guest's /tmp stays the host's, so that a checkout under /tmp is still there.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
. /modules.sh
O=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $O,cache=loose,ro host /host && mount -t tmpfs tmpfs /rw && mkdir -p /rw/u /rw/w &&
mount -t overlay -o lowerdir=/host,upperdir=/rw/u,workdir=/rw/w overlay /new &&
mkdir -p /new/lab && mount -t 9p -o $O,cache=none lab /new/lab || exec sh
ln -s /proc/self/fd /dev/fd; ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout; ln -s /proc/self/fd/2 /dev/stderr
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /dev/shm
: > /new/etc/fstab; rm -f /new/etc/machine-id /new/.dockerenv
echo 0123456789abcdef0123456789abcdef > /new/etc/machine-id
mkdir -p /new/usr/lib/modules
ln -sfn {modules} /new/usr/lib/modules/{release}
{prepare}
mount --move /proc /new/proc; mount --move /sys /new/sys; mount --move /dev /new/dev
exec switch_root /new {init}
"""
PREPARE_SYSTEMD = """for u in {masked}; do ln -sf /dev/null /new/etc/systemd/system/$u; done
cp /new/lab/lab.service /new/lab/lab.target /new/etc/systemd/system/
mkdir -p /new/etc/systemd/system/lab.target.wants
ln -sf ../lab.service /new/etc/systemd/system/lab.target.wants/"""
TARGET = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n"
SERVICE = """[Unit]
After=basic.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
StandardOutput=tty
StandardError=tty
TTYPath=/dev/{console}
ExecStart=/bin/sh /lab/run
"""
RUN = """export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export LAB_OUT=/lab/out IN_KERNEL_LAB=1
{env}
ip link set lo up
cd {cwd} && {command}
echo $? > /lab/status.new && mv /lab/status.new /lab/status
sync
echo o > /proc/sysrq-trigger; while :; do sleep 1; done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What to run in the guest, and on what; ``timeout`` in seconds, ``memory`` in MiB."""

    command: tuple[str, ...]
    systemd: bool = False
    memory: int = MEMORY
    timeout: float = TIMEOUT
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Guest:
    """A running guest; ``out`` is the folder that it sees as ``$LAB_OUT``."""

    process: "subprocess.Popen[bytes]"
    share: Path
    out: Path

    def status(self) -> int | None:
        """The command's exit status, ``NEVER_RAN`` if the guest died, None while it runs."""
        ended = self.process.poll() is not None
        try:
            return int((self.share / "status").read_text())
        except FileNotFoundError:
            return NEVER_RAN if ended else None


def run(boot: Boot, *, out: Path | None = None) -> int:
    """Run a command in the guest with its output on ours; its status, or one of ours above."""
    with booted(boot, out=out) as guest:
        try:
            guest.process.wait(boot.timeout)
        except subprocess.TimeoutExpired:
            print(f"lab: no end in {boot.timeout:.0f} s", file=sys.stderr)
            return TIMED_OUT
        status = guest.status()
        if status is None or status == NEVER_RAN:
            print("lab: the guest ended before the command did", file=sys.stderr)
            return NEVER_RAN
        return status


@contextmanager
def booted(
    boot: Boot,
    *,
    out: Path | None = None,
    console: IO[bytes] | None = None,
) -> Iterator[Guest]:
    """Boot a guest that runs ``boot.command`` and powers off; killed when the block is left.

    ``console`` takes what the guest prints (our stdout by default). Raises
    ``LabUnavailableError`` when something that the lab needs is missing.
    """
    kernel = fetch()
    with tempfile.TemporaryDirectory(prefix="wg-agent-lab-") as scratch:
        work = Path(scratch)
        share = work / "lab"
        out = (out or work / "out").resolve()
        (share / "out").mkdir(parents=True)
        out.mkdir(parents=True, exist_ok=True)
        _write_share(share, boot)
        initrd = _initramfs(kernel, work, boot)
        process = subprocess.Popen(
            _qemu(kernel, initrd, share, out, boot), stdin=subprocess.DEVNULL, stdout=console
        )
        try:
            yield Guest(process, share, out)
        finally:
            process.kill()
            process.wait()


def _write_share(share: Path, boot: Boot) -> None:
    env = "\n".join(f"export {shlex.quote(f'{k}={v}')}" for k, v in boot.env.items())
    # The second share: $LAB_OUT.
    mount = "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none out /lab/out\n"
    script = RUN.format(env=env, cwd=shlex.quote(str(Path.cwd())), command=shlex.join(boot.command))
    (share / "run").write_text(mount + script)
    (share / "lab.target").write_text(TARGET)
    (share / "lab.service").write_text(SERVICE.format(console=arch().console))


def _initramfs(kernel: Kernel, work: Path, boot: Boot) -> Path:
    tree = work / "initramfs"
    for name in ("bin", "mod", "proc", "sys", "dev", "host", "rw", "new"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabUnavailableError("the lab needs busybox-static")
    shutil.copy(busybox, tree / "bin/busybox")
    files = kernel.modules(MODULES)
    names = [_copy_module(file, tree / "mod") for file in files]
    loads = "".join(f"insmod /mod/{name} 2>/dev/null\n" for name in names)
    (tree / "modules.sh").write_text(loads)
    init = tree / "init"
    plain = "mount -t tmpfs tmpfs /new/run"
    init.write_text(
        INIT.format(
            prepare=PREPARE_SYSTEMD.format(masked=" ".join(MASKED)) if boot.systemd else plain,
            init="/lib/systemd/systemd --unit=lab.target" if boot.systemd else "/bin/sh /lab/run",
            modules=shlex.quote(str(kernel.root / "lib/modules" / kernel.release)),
            release=kernel.release,
        )
    )
    init.chmod(0o755)
    paths = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*")))
    image = work / "initrd"
    with image.open("wb") as archive:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"],
            cwd=tree,
            input=paths.encode(),
            stdout=archive,
            check=True,
        )
    return image


def _copy_module(file: Path, where: Path) -> str:
    """Copy a module so that busybox can load it, that is, uncompressed; its name there."""
    match file.suffix:
        case ".xz":
            (where / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
        case ".zst":
            if shutil.which("zstd") is None:
                raise LabUnavailableError("the lab needs zstd: this kernel's modules are packed")
            subprocess.run(["zstd", "-dqf", file, "-o", where / file.stem], check=True)
        case _:
            shutil.copy(file, where)
            return file.name
    return file.stem


def _qemu(kernel: Kernel, initrd: Path, share: Path, out: Path, boot: Boot) -> list[str]:
    shares = [
        ("host", Path("/"), ",readonly=on,multidevs=remap"),
        ("lab", share, ""),
        ("out", out, ""),
    ]
    devices: list[str] = []
    for tag, path, options in shares:
        escaped = str(path).replace(",", ",,")
        devices += [
            *("-fsdev", f"local,id={tag},path={escaped},security_model=none{options}"),
            *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]
    # /dev/kvm may be there and broken: emulation is the default, LAB_ACCEL=kvm the way out.
    accel = os.environ.get("LAB_ACCEL", "tcg,thread=multi")
    console = arch().console
    return [
        arch().qemu,
        *arch().machine,
        *("-accel", accel, "-m", str(boot.memory), "-smp", "2"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", f"console={console} quiet loglevel=3 panic=-1 systemd.show_status=0"),
        *devices,
        *("-device", "virtio-rng-pci"),
    ]
