"""What this machine can do, asked once; each answer is None or a reason with its remedy."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

IN_LAB = os.environ.get("IN_KERNEL_LAB") == "1"


@functools.cache
def no_netns() -> str | None:
    """Why network namespaces can't be made here."""
    if os.geteuid() != 0:
        return "network namespaces need root: make test asks for it through sudo"
    missing = [
        package
        for program, package in {
            "ip": "iproute2",
            "ping": "iputils-ping",
            "nft": "nftables",
        }.items()
        if shutil.which(program) is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not _succeeds("unshare", "--net", "true"):
        return "the kernel refuses network namespaces (a container needs CAP_SYS_ADMIN)"
    return None


@functools.cache
def no_kernel_wireguard() -> str | None:
    """Why kernel WireGuard can't be tested right here."""
    if os.geteuid() != 0:
        return "kernel WireGuard needs root: make test asks for it through sudo"
    if not _succeeds("unshare", "--net", "ip", "link", "add", "wgprobe", "type", "wireguard"):
        return "the running kernel has no WireGuard"
    return None


@functools.cache
def no_userspace_wireguard() -> str | None:
    """Why wireguard-go can't be run here."""
    if shutil.which("wireguard-go") is None:
        return "not installed: wireguard-go"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun: modprobe tun (a container needs --device /dev/net/tun)"
    return no_netns()


def _succeeds(*argv: str) -> bool:
    try:
        return subprocess.run(argv, capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
