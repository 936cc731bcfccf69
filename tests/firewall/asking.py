"""Who is answered, and by what address they are seen: sockets of this process in other namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self, TypeVar

from tests.contract.inside import _enter
from tests.support.netns import Namespace

T = TypeVar("T")
TIMEOUT: Final = 0.5
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Asker:
    """Somebody in a namespace who asks ``Answerer``s."""

    def __init__(self, space: Namespace) -> None:
        self._pool = ThreadPoolExecutor(4, initializer=_enter, initargs=(space.path,))

    async def ask(self, source: str, target: str, port: int, kind: int = TCP) -> str:
        """The address that the other side sees; "" if it does not answer."""
        return await self.do(lambda: self._ask(source, target, port, kind))

    async def do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    @staticmethod
    def _ask(source: str, target: str, port: int, kind: int) -> str:
        with socket.socket(_family(target), kind) as sock:
            sock.settimeout(TIMEOUT)
            sock.bind((source, 0))
            try:
                sock.connect((target, port))
                sock.send(b"?")
                return sock.recv(64).decode()
            except OSError:
                return ""

    def close(self) -> None:
        self._pool.shutdown()


class Answerer:
    """Tells everybody who asks on these ports, by TCP or UDP, the address that it was asked from."""

    def __init__(self, space: Namespace, *ports: int) -> None:
        self._over = threading.Event()
        with ThreadPoolExecutor(1, initializer=_enter, initargs=(space.path,)) as pool:
            self._sockets = pool.submit(lambda: [*self._listen(ports)]).result()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @staticmethod
    def _listen(ports: Iterable[int]) -> Iterable[socket.socket]:
        for port in ports:
            for kind in (TCP, UDP):
                sock = socket.socket(socket.AF_INET6, kind)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("::", port))
                if kind == TCP:
                    sock.listen()
                yield sock

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in self._sockets:
                selector.register(sock, selectors.EVENT_READ)
            while not self._over.is_set():
                for key, _ in selector.select(0.1):
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):
                        self._answer(key.fileobj)

    @staticmethod
    def _answer(sock: socket.socket) -> None:
        if sock.type == TCP:
            with sock.accept()[0] as connection:
                connection.recv(1)
                connection.send(_seen(connection.getpeername()[0]))
        else:
            _, address = sock.recvfrom(64)
            sock.sendto(_seen(address[0]), address)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()


def _seen(address: str) -> bytes:
    return address.removeprefix("::ffff:").encode()


class Hammer:
    """Datagrams to these ports, as fast as a paced loop sends them, that are counted and never answered.

    So each one is the first of its flow to conntrack.
    """

    _SEND = (
        "import signal,socket,sys,time\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(15,stop)\n"
        "ports=[*map(int,sys.argv[3:])]; counts=[0]*len(ports)\n"
        "s=socket.socket(2,2); s.bind((sys.argv[1],0)); print(flush=True)\n"
        "try:\n"
        " while 1:\n"
        "  for i,p in enumerate(ports): s.sendto(b'x',(sys.argv[2],p)); counts[i]+=1\n"
        "  time.sleep(.0001)\n"
        "except KeyboardInterrupt: print(*counts)\n"
    )

    def __init__(
        self, clients: Namespace, source: str, server: Namespace, target: str, ports: Iterable[int]
    ) -> None:
        self._server = server
        self._ports = tuple(ports)
        commands = [
            "add table inet seen",
            "add chain inet seen c { type filter hook prerouting priority -300; }",
        ]
        for port in self._ports:
            commands += [
                f"add counter inet seen p{port}",
                f"add rule inet seen c udp dport {port} counter name p{port} drop",
            ]
        server.run("nft", "-f", "-", stdin="\n".join(commands))
        ports_ = map(str, self._ports)
        argv = (sys.executable, "-c", self._SEND, source, target, *ports_)
        self._process = clients.popen(*argv, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.sent: dict[int, int] = {}
        self.arrived: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        out, _ = self._process.communicate(timeout=10)
        self.sent = dict(zip(self._ports, map(int, out.split()), strict=True))
        for port in self._ports:
            listed = self._server.run("nft", "list", "counter", "inet", "seen", f"p{port}").stdout
            self.arrived[port] = int(listed.partition("packets ")[2].split()[0])
        self._server.run("nft", "delete", "table", "inet", "seen")
