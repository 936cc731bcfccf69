"""The demo's stage: namespaces, programs and files, and how all of it goes away again.

In the gateway's namespace run core, the mail server and the agent; in the client's the client. Core
also listens on a unix socket: the client's way to it, since plain HTTP does not leave a host.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import pyotp

from agent.control import ControlClient
from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from agent.errors import AgentError
from agent.sandbox.admin import AdminClient
from agent.sandbox.client import device_key
from agent.sandbox.demo.faults import StepFailed
from agent.sandbox.demo.network import Namespace, join
from agent.sandbox.demo.programs import Pinger, Program, until
from agent.sandbox.mail import code_in, messages

LOCATION: Final = "hq"
USER: Final = "alice"
GATEWAY_ADDRESS: Final = "10.8.0.1"
PING_INTERVAL: Final = 0.01
STATS_INTERVAL: Final = 1
_OUTER: Final = ("192.0.2.1", "192.0.2.2")
_CORE_PORT: Final = 8480
_MAIL_PORT: Final = 2525
_METRICS_PORT: Final = 9586
_WIREGUARD_PORT: Final = 51820
_SOCKETS: Final = Path("/var/run/wireguard")

_CORE_CONFIG: Final = """\
database = "{folder}/core/core.db"
listen = ["127.0.0.1:{core_port}", "unix:{folder}/core.sock"]
[admin]
token_file = "{folder}/admin.token"
[smtp]
port = {mail_port}
from = "vpn@example.com"
[sessions]
lifetime = 600
[[gateways]]
name = "gw1"
location = "{location}"
token_file = "{folder}/core.token"
"""
_AGENT_CONFIG: Final = """\
[interface]
name = "{interface}"
private_key_file = "{folder}/gateway.key"
[core]
url = "http://127.0.0.1:{core_port}/gateway/v1/"
token_file = "{folder}/core.token"
[stats]
interval = {stats_interval}
[http]
listen = "127.0.0.1:{metrics_port}"
[paths]
state = "{folder}/state"
runtime = "{folder}/run"
"""


class Stage:
    """What the steps act on. ``open`` may fail half-way: ``close`` takes down what there is.

    ``device`` is the public key of the user's device in base64, ``interface`` the gateway's and
    ``client_interface`` the client's.
    """

    def __init__(self) -> None:
        token = secrets.token_hex(3)
        self.gateway = Namespace(f"wg-demo-{token}-gateway")
        self.client = Namespace(f"wg-demo-{token}-client")
        # Userspace programs' sockets lie in one folder for all namespaces: the names are this run's.
        self.interface = f"wgd{token}"
        self.client_interface = f"wgc{token}"
        self.folder = Path()
        self.device = ""
        self.core: Program | None = None
        self.agent: Program | None = None
        self._mail: Program | None = None
        self._admin: AdminClient | None = None
        self._totp: pyotp.TOTP | None = None
        self._others: list[Program] = []

    async def open(self) -> None:
        """Make namespaces and files, start core and the mail server, register a user with a device."""
        self.folder = Path(tempfile.mkdtemp(prefix="wg-agent-demo-"))
        self.gateway.add()
        self.client.add()
        join(self.gateway, f"{_OUTER[0]}/24", self.client, f"{_OUTER[1]}/24")
        settings = {
            "folder": self.folder,
            "interface": self.interface,
            "location": LOCATION,
            "core_port": _CORE_PORT,
            "mail_port": _MAIL_PORT,
            "metrics_port": _METRICS_PORT,
            "stats_interval": STATS_INTERVAL,
        }
        gateway_key = clamp(secrets.token_bytes(32))
        admin_token = secrets.token_urlsafe(24)
        for name, text in {
            "admin.token": admin_token,
            "core.token": secrets.token_urlsafe(24),
            "gateway.key": format_key(gateway_key),
            "core.toml": _CORE_CONFIG.format(**settings),
            "agent.toml": _AGENT_CONFIG.format(**settings),
        }.items():
            path = self.folder / name
            path.touch(0o600)
            path.write_text(text, encoding="utf-8")
        self._mail = self._sandbox("mail", "--listen", f"127.0.0.1:{_MAIL_PORT}", "--dir", self._mails)
        await self.start_core()
        await self._mail.printed("listens on", 10)
        self._admin = AdminClient(self._core_url, admin_token)
        await self.admin.add_location(
            LOCATION,
            addresses=[f"{GATEWAY_ADDRESS}/24"],
            listen_port=_WIREGUARD_PORT,
            endpoint=f"{_OUTER[0]}:{_WIREGUARD_PORT}",
            server_public_key=format_key(public_key(gateway_key)),
        )
        await self.admin.add_user(USER, f"{USER}@example.com")
        self._totp = pyotp.TOTP(await self.admin.enable_totp(USER))
        await self.admin.enable_email(USER)
        self.device = format_key(public_key(device_key(self._device_key)))
        await self.admin.add_device(LOCATION, f"{USER}-laptop", self.device, user=USER)

    @property
    def admin(self) -> AdminClient:
        """The administrator's client of core."""
        if self._admin is None:
            raise StepFailed("core was never started", "core")
        return self._admin

    @property
    def _core_url(self) -> str:
        return f"http+unix://{self.folder}/core.sock:"

    @property
    def _mails(self) -> str:
        return str(self.folder / "mail")

    @property
    def _device_key(self) -> Path:
        return self.folder / "device.key"

    def _sandbox(self, command: str, *argv: str) -> Program:
        whole = [sys.executable, "-m", "agent.sandbox", command, *argv]
        return Program(command, self.gateway.argv(*whole), self.folder)

    async def start_core(self) -> None:
        """Start core; returns once it serves."""
        self.core = self._sandbox("core", "--config", str(self.folder / "core.toml"))
        await self.core.printed("core.sock", 10)

    def start_agent(self) -> Program:
        """Start the agent, exactly as its unit would."""
        argv = [sys.executable, "-m", "agent", "run", "-c", str(self.folder / "agent.toml")]
        self.agent = Program("agent", self.gateway.argv(*argv), self.folder)
        return self.agent

    async def status(self) -> dict[str, Any]:
        """Return the document of ``wg-agent status --json``. Raises AgentError if no agent answers."""
        control = ControlClient(self.folder / "run" / f"{self.interface}.sock", timeout=5)
        return await asyncio.to_thread(control.status)

    async def metric(self, name: str, **labels: str) -> float | None:
        """Return a sample of the agent's ``/metrics``, None if there is none or nobody answers."""
        try:
            text = await self.gateway.get(_METRICS_PORT, "/metrics")
        except OSError:
            return None
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        for line in text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(label in series for label in wanted):
                return float(value)
        return None

    def totp_code(self, *, right: bool = True) -> str:
        """Return the code that the user's authenticator shows, or one that it does not show."""
        if self._totp is None:
            raise StepFailed("core was never started", "core")
        now = int(time.time())
        if right:
            return self._totp.at(now)
        near = {self._totp.at(now, counter_offset=offset) for offset in range(-12, 3)}
        return next(code for number in range(100) if (code := f"{number:06}") not in near)

    async def mailed_code(self, after: int) -> str:
        """Return the code in the newest message once there are more than ``after``."""
        folder = Path(self._mails)
        await until(lambda: len(messages(folder)) > after, 10, "no e-mail came", "core", "mail")
        code = code_in(messages(folder)[-1])
        if code is None:
            raise StepFailed("there is no code in the e-mail", "core")
        return code

    @property
    def mail_count(self) -> int:
        """How many e-mails have come."""
        return len(messages(Path(self._mails)))

    def connect(self, method: str, *, wait: float = 5) -> Program:
        """Start the client's ``connect``; it reads a code, if the method has one, from its input."""
        argv = [sys.executable, "-m", "agent.sandbox", "client", "connect"]
        argv += ["--core", self._core_url, "--user", USER, "--device-key", str(self._device_key)]
        argv += ["--method", method, "--interface", self.client_interface, "--wait", str(wait)]
        argv += ["--code-from-stdin", "--json"]
        return self._run(Program("client", self.client.argv(*argv), self.folder, stdin=True))

    async def end_clients(self) -> None:
        """End clients that still try to connect."""
        await asyncio.gather(*(program.stop() for program in self._others if program.name == "client"))

    def ping(self, *, outside: bool = False) -> Pinger:
        """Ping the gateway from the client, through the tunnel or outside of it."""
        target = _OUTER[0] if outside else GATEWAY_ADDRESS
        argv = ["ping", "-n", "-D", "-i", str(PING_INTERVAL), target]
        name = "ping-outside" if outside else "ping"
        return Pinger(lambda: self._run(Program(name, self.client.argv(*argv), self.folder)))

    def _run(self, program: Program) -> Program:
        self._others.append(program)
        return program

    def tail(self, log: str, lines: int = 8) -> list[str]:
        """Return the last lines of a program's log."""
        try:
            text = (self.folder / f"{log}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return text.splitlines()[-lines:]

    async def close(self, *, keep_files: bool) -> list[str]:
        """Take everything down; return what could not be, in words."""
        left: list[str] = []
        with contextlib.suppress(Exception):
            if self._admin is not None:
                await self._admin.close()
        started = [p for p in (self.agent, self.core, self._mail, *self._others) if p is not None]
        await asyncio.gather(*(program.stop() for program in started))
        for space, interface in ((self.gateway, self.interface), (self.client, self.client_interface)):
            try:
                await _clear(space, interface)
            except (AgentError, OSError) as error:
                left.append(str(error))
        if not keep_files and self.folder != Path():
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.folder.exists():
                left.append(f"the folder {self.folder}")
        return left


async def _clear(space: Namespace, interface: str) -> None:
    """Remove a namespace with its interface, and see a userspace WireGuard end with it."""
    if not space.exists():
        return
    try:
        space.remove_link(interface)
        end = time.monotonic() + 3
        while ours := [pid for pid in space.pids() if _serves(pid, interface)]:
            if time.monotonic() > end:
                for pid in ours:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)
        (_SOCKETS / f"{interface}.sock").unlink(missing_ok=True)
    finally:
        space.delete()


def _serves(pid: int, interface: str) -> bool:
    """Whether a process is the userspace WireGuard of an interface, whose name is this run's alone."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return interface.encode() in argv


def parse_result(client: Program) -> dict[str, Any]:
    """Return what the client printed. Raises StepFailed if that is no result."""
    try:
        return dict(json.loads(client.output))
    except ValueError:
        raise StepFailed("the client printed no result", "client") from None
