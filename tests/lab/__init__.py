"""The project's lab: a Linux kernel with WireGuard, booted under QEMU on this machine's own files.

Hosts without WireGuard in their kernel are common (containers, build machines). The lab boots the
distribution's kernel with the host's root file system as its own (9p, read-only, under a tmpfs
overlay): every program, venv and checkout is there at the same path, and nothing that the guest
writes lasts but what it writes under ``$LAB_OUT``.

``kernel`` fetches the kernel, ``machine`` boots it, ``remote`` runs pytest items in it and
``python -m tests.lab run -- COMMAND`` any command.
"""
