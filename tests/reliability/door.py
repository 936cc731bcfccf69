"""A site whose agent has every listener open: what it holds, and what core says to it."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.encoding import format_key
from agent.sandbox.core import Core
from agent.sandbox.sessions import Session
from tests.reliability.hostile import Attack
from tests.reliability.pushing import Answer, Courier, Pushing, push_secret
from tests.reliability.tls_front import Authority, TlsFront, client_context
from tests.support.client import Client
from tests.support.scenarios import ping
from tests.support.site import Site

PUSH = "127.0.0.1:9587"
HTTP = "127.0.0.1:9586"
CORE_PORT = 8443


@dataclass
class Door:
    """A site whose core is behind TLS and tells its changes by push, and who knocks at its doors."""

    site: Site
    front: TlsFront
    ours: Authority
    theirs: Authority
    """A CA that nobody here trusts."""
    secret: str
    staying: Client
    ending: Client
    renewed: Client
    push: Courier
    http: Courier
    control: Courier
    pushing: Pushing

    @property
    def core_tls(self) -> list[str]:
        """What a client of the push listener needs."""
        pair = self.ours.issue("core", "core.example")
        return [str(self.ours.file), str(pair.cert), str(pair.key)]

    @property
    def pid(self) -> int:
        assert self.site.process is not None
        return self.site.process.pid

    def memory(self) -> int:
        """The agent's resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def grant(self, client: Client, lifetime: float = 0) -> tuple[Session, str]:
        """Core grants a session and pushes it; returns it and its PSK in base64."""

        def work(core: Core) -> Session:
            location = core.directory.location("hq")
            grant = core.sessions.grant(client.device, location, "totp", core.clock(), lifetime=lifetime)
            return grant.session

        session = self.site.core.do(work)
        client.sessions.append(session.id)
        self.pushing.all()
        assert session.preshared_key is not None
        return session, format_key(session.preshared_key)

    def renew(self) -> Answer:
        """Core renews a session with another PSK and pushes that."""
        session_id = self.renewed.sessions[-1]
        self.site.core.do(
            lambda core: core.sessions.renew(session_id, 3600, core.clock(), ceiling=36_000, rotate=True)
        )
        return self.pushing.all()

    def scrape(self) -> Answer:
        answer = self.http.ask("GET", "/metrics")
        assert answer.status == 200
        return answer

    def errors_logged(self) -> list[str]:
        """What the agent said that it says only of faults of its own."""
        return [line for line in self.site.log.read_text().splitlines() if _is_error(line)]


def _is_error(line: str) -> bool:
    return not line.startswith("{") or json.loads(line)["level"] in {"error", "critical"}


def configured(folder: Path, ours: Authority, secret: str) -> str:
    """The agent's configuration: everything in TLS, and each side shows a certificate."""
    file = folder / "push.secret"
    file.touch(0o600)
    file.write_text(secret)
    listener, client = ours.issue("listener"), ours.issue("gateway", "gateway.example")
    return f"""
[push]
listen = "0.0.0.0:9587"
secret_file = "{file}"
tls_cert_file = "{listener.cert}"
tls_key_file = "{listener.key}"
client_ca_file = "{ours.file}"
[core]
url = "https://127.0.0.1:{CORE_PORT}/gateway/v1/"
token_file = "{folder / "token"}"
poll_interval = 3600
ca_file = "{ours.file}"
client_cert_file = "{client.cert}"
client_key_file = "{client.key}"
"""


@contextmanager
def attacking(
    door: Door, what: str, counts: Mapping[str, int], seconds: float = 0.0
) -> Iterator[list[Attack]]:
    """Attacks on several targets at once, which are over when the block is left."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Attack(
                    *(door.site.gateway, what, target, count),
                    seconds=seconds,
                    seed=number,
                    tls=door.core_tls if target == PUSH else None,
                )
            )
            for number, (target, count) in enumerate(counts.items())
        ]


@contextmanager
def open_door(folder: Path) -> Iterator[Door]:
    """The site with its agent running and three sessions granted; two of them are in use."""
    secret = push_secret()
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    with ExitStack() as stack:
        site = stack.enter_context(Site(folder, core={"stream": False, "heartbeat": 0.3}))
        front = stack.enter_context(TlsFront(site.gateway, CORE_PORT, folder / "core.sock"))
        front.show(ours.issue("front"), ours.file)
        # http.listen is left to its default.
        kept = [
            part for part in site.config.read_text().split("\n[") if not part.startswith(("core]", "http]"))
        ]
        site.config.write_text("\n[".join(kept) + configured(folder, ours, secret))
        staying, ending, renewed = site.add_clients(3)
        site.start_agent()
        tls = client_context(ours.file, ours.issue("core", "core.example"))
        control = str(folder / "run" / f"{site.interface}.sock")
        to_push = stack.enter_context(Courier(site.gateway, PUSH, tls))
        to_http = stack.enter_context(Courier(site.gateway, HTTP))
        to_control = stack.enter_context(Courier(site.gateway, control))
        pushing = Pushing(site, secret, to_push)
        door = Door(
            site, front, ours, theirs, secret, staying, ending, renewed, to_push, to_http, to_control, pushing
        )
        door.grant(renewed)
        for client in (staying, ending):
            site.attach(client)
            _, psk = door.grant(client)
            site.connect(client, psk)
            with ping(client, 0.1) as pings:
                pings.wait_reply(15)
        yield door
