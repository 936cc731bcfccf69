"""Makes the golden dumps: run as root on a kernel with WireGuard, with the folder to write to.

For each device it writes NAME.bin, the netlink messages of one dump as they came from the kernel,
and NAME.txt, what ``wg show NAME dump`` said of the same device.
"""

import base64
import hashlib
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

GENL_ID_CTRL = 16
NLMSG_DONE = 3
NETLINK_GENERIC = 16


def key(label: str) -> str:
    raw = bytearray(hashlib.sha256(label.encode()).digest())
    raw[0] &= 248
    raw[31] = raw[31] & 127 | 64
    return base64.b64encode(raw).decode()


def run(*argv: str, text: str = "") -> str:
    return subprocess.run(argv, input=text, check=True, stdout=subprocess.PIPE, text=True).stdout


def public(private: str) -> str:
    return run("wg", "pubkey", text=private).strip()


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def request(link: socket.socket, family: int, flags: int, command: int, body: bytes) -> list[bytes]:
    link.send(struct.pack("=IHHIIBBH", 20 + len(body), family, flags, 1, 0, command, 1, 0) + body)
    messages = []
    while True:
        data = link.recv(1 << 18)
        while data:
            length, kind, reply_flags = struct.unpack_from("=IHH", data)
            messages.append(data[:length])
            data = data[length + (-length % 4) :]
            if kind <= NLMSG_DONE or not reply_flags & 2:
                return messages


def dump(name: str) -> bytes:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as link:
        link.bind((0, 0))
        reply = request(link, GENL_ID_CTRL, 1, 3, attribute(2, b"wireguard\0"))[0]
        at = reply.index(struct.pack("=HH", 6, 1)) + 4
        (family,) = struct.unpack_from("=H", reply, at)
        return b"".join(request(link, family, 0x301, 0, attribute(2, name.encode() + b"\0")))


def keep(name: str, where: Path) -> None:
    (where / f"{name}.bin").write_bytes(dump(name))
    (where / f"{name}.txt").write_text(run("wg", "show", name, "dump"))
    run("ip", "link", "delete", name)


def main(where: Path) -> None:
    run("ip", "link", "add", "empty", "type", "wireguard")
    keep("empty", where)

    for name, port in (("few", 51820), ("other", 51821)):
        run("ip", "link", "add", name, "type", "wireguard")
        run(
            "wg",
            "setconf",
            name,
            "/dev/stdin",
            text=f"[Interface]\nPrivateKey={key(name)}\nListenPort={port}\nFwMark=0x2a\n",
        )
        run("ip", "link", "set", name, "up")
    peer = "[Peer]\nPublicKey={}\n"
    run(
        "wg", "addconf", "few", "/dev/stdin",
        text=peer.format(public(key("other"))) + f"PresharedKey={key('psk')}\nAllowedIPs=10.1.0.1/32\n"
        + peer.format(public(key("v6"))) + f"PresharedKey={key('psk6')}\nAllowedIPs=10.1.0.2/32,fd00::2/128\n"
        "Endpoint=[fd00:1::1]:4242\nPersistentKeepalive=25\n"
        + peer.format(public(key("scope"))) + "AllowedIPs=10.2.0.0/16,10.3.0.0/24,fd01::/64\n"
        "Endpoint=[fe80::7%lo]:1\n"
        + peer.format(public(key("no-ips"))) + f"PresharedKey={key('psk-no-ips')}\n"
        + peer.format(public(key("default"))) + "AllowedIPs=0.0.0.0/0,::/0\nEndpoint=192.0.2.1:65535\n",
    )  # fmt: skip
    run(
        "wg", "addconf", "other", "/dev/stdin",
        text=peer.format(public(key("few"))) + f"PresharedKey={key('psk')}\nAllowedIPs=10.9.0.0/16\n"
        "Endpoint=127.0.0.1:51820\nPersistentKeepalive=1\n",
    )  # fmt: skip
    time.sleep(3)
    run("ip", "link", "delete", "other")
    keep("few", where)

    run("ip", "link", "add", "many", "type", "wireguard")
    ips = [f"10.{i >> 8}.{i & 255}.0/24" for i in range(1000)] + [f"fd00:{i:x}::/32" for i in range(1000)]
    peers = [
        peer.format(public(key(f"p{i}"))) + f"PresharedKey={key(f'psk{i}')}\nAllowedIPs=172.16.0.{i}/32\n"
        for i in range(100)
    ]
    peers.insert(
        40,
        peer.format(public(key("many-ips")))
        + f"PresharedKey={key('psk-many-ips')}\nAllowedIPs={','.join(ips)}\n",
    )
    run("wg", "setconf", "many", "/dev/stdin", text="".join(peers))
    keep("many", where)


main(Path(sys.argv[1]))
