"""The life of one site's agent, told so that every secret passes through every path that there is."""

import base64
import io
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from agent.__main__ import main
from agent.encoding import format_key, format_time
from agent.sandbox.core import Core
from agent.sandbox.sessions import Grant
from tests.contract.inside import _enter
from tests.reliability.grep import Hunt, Secret
from tests.reliability.pushing import Answer, Courier, Pushing, push_secret, signed
from tests.support.client import Client
from tests.support.ledger import FULL
from tests.support.netns import Namespace
from tests.support.site import Site, until

COMMANDS = (
    ("status",),
    ("status", "--json"),
    ("plan",),
    ("plan", "--json"),
    ("check",),
    ("check", "--json"),
    ("events",),
    ("events", "--json"),
    ("explain", "device"),
    ("explain", "device", "--json"),
)
BUG = """
import gc, signal

def quotes_everything(*_, **__):
    ours = [thing for thing in gc.get_objects() if type(thing).__module__.startswith("agent.")]
    raise RuntimeError(f"a bug that quotes {len(ours)} things: {ours!r}")

def in_push(*_):
    from agent.core import push
    push.decode_push = quotes_everything

def in_writer(*_):
    from agent.writer import Writer
    Writer.carry_out = quotes_everything

signal.signal(signal.SIGUSR1, in_push)
signal.signal(signal.SIGUSR2, in_writer)
"""
"""A module for the agent's process: at a signal it raises what no part of it expects."""


class Life:
    """One site, and a hunt for every secret that its agent is ever told."""

    def __init__(self, site: Site, secret: str, push: Courier, http: Courier, control: Courier) -> None:
        self.site = site
        self.hunt = Hunt()
        self.push_secret = secret
        self.answers: list[tuple[str, Answer]] = []
        self._push = push
        self._http = http
        self._control = control
        self._pushing = Pushing(site, secret, push)
        self._numbers = itertools.count()
        self.hunt.secrets += [
            Secret("core's token", site.core.service.gateway_token.encode()),
            Secret("the push secret's text", secret.removeprefix("whsec_").encode()),
            Secret("the push secret", base64.b64decode(secret.removeprefix("whsec_"))),
        ]

    def psk(self, what: str, raw: bytes = b"") -> str:
        """A PSK (a new one unless it is given) in base64; from now on it is sought."""
        raw = raw or os.urandom(32)
        self.hunt.secrets.append(Secret(f"PSK {next(self._numbers)}: {what}", raw))
        return format_key(raw)

    def refused(self) -> float:
        """How many answers and events of core the agent has refused whole."""
        lines = self._http.ask("GET", "/metrics").body.decode().splitlines()
        return next(
            float(line.split()[1]) for line in lines if line.startswith("wg_agent_core_invalid_total ")
        )

    # What core does.

    def settled(self) -> None:
        """Wait until the agent holds core's newest revision."""
        newest = self.site.core.do(lambda core: core.directory.location("hq").revision)
        until(lambda: self.site.status()["revision"] >= newest, 15, f"revision {newest}")

    def grant(self, client: Client, what: str, lifetime: float = 0) -> str:
        def work(core: Core) -> Grant:
            location = core.directory.location("hq")
            return core.sessions.grant(client.device, location, "totp", core.clock(), lifetime=lifetime)

        session = self.site.core.do(work).session
        client.sessions.append(session.id)
        return self.psk(what, session.preshared_key or b"")

    def renew(self, client: Client) -> None:
        session_id = client.sessions[-1]
        renewed = self.site.core.do(
            lambda core: core.sessions.renew(session_id, 3600, core.clock(), ceiling=36_000, rotate=True)
        )
        self.psk("renewed", renewed.session.preshared_key or b"")

    def tell(self, event: str, data: dict[str, Any]) -> None:
        """Core says this on its stream, whatever it is."""

        def work(core: Core) -> None:
            with core.store.transaction():
                core.store.append(core.directory.location("hq").id, event, data)

        self.site.core.do(work)

    @contextmanager
    def answering(self, body: Callable[[bytes], bytes]) -> Iterator[None]:
        """Core answers every pull with what this makes of the state."""

        def lie(core: Core) -> None:
            whole = core.sessions.snapshot
            core.sessions.snapshot = lambda location, now: body(whole(location, now))  # type: ignore[method-assign]

        self.site.core.do(lie)
        try:
            yield
        finally:
            self.site.core.do(lambda core: vars(core.sessions).pop("snapshot"))

    # The chapters.

    def sessions(self, clients: list[Client], *, expire: bool) -> None:
        """Granted, renewed, replaced, revoked, expired, ended by the operator; static PSKs beside them."""
        kept, replaced, revoked, expiring, ended = clients
        for client in (kept, replaced, revoked, ended):
            self.grant(client, "granted")
        self.grant(expiring, "expiring", lifetime=1.0 if expire else 600)
        self.settled()
        self.renew(kept)
        self.renew(kept)
        self.grant(replaced, "replacing")
        self.site.core.do(lambda core: core.sessions.end(revoked.sessions[-1], "revoked", core.clock()))
        self.site.end(ended)
        self.site.core.call(
            self.site.core.admin.add_devices(
                [
                    {
                        "location": "hq",
                        "name": f"router-{next(self._numbers)}",
                        "public_key": format_key(os.urandom(32)),
                        "mfa_exempt": True,
                        "preshared_key": self.psk("static"),
                    }
                ]
            )
        )
        self.settled()
        if expire:
            until(lambda: self.site.peer(expiring)["state"] == "waiting", what="the end of a session")
        until(lambda: self.site.shown()[kept.public_key]["preshared_key"] != "(none)", what="the PSK")

    def malformed(self, client: Client, *, answers: int) -> None:
        """Core's messages with PSKs in them, each wrong in another way; so many are whole answers."""
        key = client.public_key
        for event, data in (*self._malformed_sessions(), *self._malformed_peers(client)):
            self.tell(event, {"public_key": key, **data})
            self.settled()
        for damage in (self._cut, self._uncounted, self._misplaced, self._repeated)[:answers]:
            refused = self.refused()
            with self.answering(damage):
                self.tell("unheard_of", {"preshared_key": self.psk("in an unknown event")})
                until(
                    lambda before=refused: self.refused() > before + 1,  # type: ignore[misc]
                    what="the refusal of an answer",
                )
            self.settled()

    def _malformed_sessions(self) -> Iterator[tuple[str, dict[str, Any]]]:
        whole = {"id": "s-bad", "granted_at": format_time(time.time())}
        whole["expires_at"] = format_time(time.time() + 600)

        def grant(**members: Any) -> tuple[str, dict[str, Any]]:
            return "session_granted", {"session": {**whole, **members}}

        yield grant(preshared_key=self.psk("of 43 characters")[:-1])
        yield grant(preshared_key=self.psk("with one too many") + "A")
        yield grant(preshared_key=self.psk("with junk")[:20] + "!" + self.psk("junk")[21:])
        yield grant(preshared_key=self.psk("with a line end") + "\n")
        yield grant(preshared_key=[self.psk("in a list")])
        yield grant(preshared_key={"key": self.psk("in an object")})
        yield grant(preshared_key=base64.b64decode(self.psk("in hex")).hex())
        yield grant(preshared_key=self.psk("beside a wrong type"), expires_at=17)
        yield grant(preshared_key=self.psk("beside a wrong id"), id=["s"])
        yield grant(preshared_key=self.psk("in two places"), expires_at=self.psk("as a time"))
        yield "session_granted", {"session": self.psk("instead of a session")}
        yield "session_granted", {"preshared_key": self.psk("beside no session")}
        yield "session_revoked", {"session_id": {"psk": self.psk("in a session's id")}}

    def _malformed_peers(self, client: Client) -> Iterator[tuple[str, dict[str, Any]]]:
        whole = {"allowed_ips": list(client.device.allowed_ips), "preshared_key": self.psk("static too")}
        for member in ("allowed_ips", "persistent_keepalive", "mfa_exempt", "session"):
            yield "peer_upserted", {**whole, member: [self.psk(f"as {member}")]}
        yield "peer_upserted", {**whole, "preshared_key": self.psk("static and cut")[:-2]}
        yield "peer_upserted", whole
        yield "location_changed", {"location": {"id": "1", "mfa_required": self.psk("as a boolean")}}
        yield "location_changed", {"interface": {"addresses": [self.psk("as an address")]}}

    def _cut(self, body: bytes) -> bytes:
        text = body.replace(b'"preshared_key":null', b'"preshared_key":"%s"' % self.psk("cut").encode(), 1)
        return text[: text.index(b'"preshared_key":"') + 40]

    def _uncounted(self, body: bytes) -> bytes:
        return body.replace(b'"peer_count":', b'"peer_count":9')

    def _misplaced(self, body: bytes) -> bytes:
        document = json.loads(body)
        document["revision"] = self.psk("as a revision")
        document["epoch"] = self.psk("as an epoch")
        return json.dumps(document).encode()

    def _repeated(self, body: bytes) -> bytes:
        psk = self.psk("in a repeated key").encode()
        return b'{"psk":"%s","psk":"%s",' % (psk, psk) + body[1:]

    def pushes(self, client: Client) -> None:
        """Core's own word, forged, cut in the middle of a PSK, and wrong within its signature."""
        psk = self.psk("pushed")
        session = {"id": f"s-{next(self._numbers)}", "preshared_key": psk}
        session |= {"granted_at": format_time(time.time()), "expires_at": format_time(time.time() + 60)}
        epoch, revision = self.site.status()["epoch"], self.site.status()["revision"]
        location = self.site.core.do(lambda core: core.directory.location("hq").id)

        def body(change_id: str, data: Any) -> bytes:
            change = {"id": change_id, "type": "session_granted", "data": data}
            return json.dumps({"location": str(location), "changes": [change]}).encode()

        good = body(f"{epoch}:{revision}", {"public_key": client.public_key, "session": session})
        pushed = [
            (good, signed(self.push_secret, good)),
            (good, signed(push_secret(), good)),
            (good, {"webhook-signature": psk, "webhook-id": psk, "webhook-timestamp": psk}),
            (good, {"authorization": f"Bearer {self.push_secret}"}),
        ]
        wrongs = (
            good[: good.index(psk.encode()) + 30],
            body(psk, {"public_key": client.public_key}),
            body(f"{epoch}:{revision + 1}", {"public_key": [psk]}),
            body(f"{epoch}:{revision + 1}", psk),
            good.replace(b'"granted_at"', b'"preshared_key"'),
        )
        pushed += [(wrong, signed(self.push_secret, wrong)) for wrong in wrongs]
        for content, headers in pushed:
            answer = self._pushing.send(content, headers)
            self.answers.append(("push", answer))
        statuses = [answer.status for _, answer in self.answers[-len(pushed) :]]
        assert statuses[:4] == [200, 401, 401, 401]
        assert set(statuses[4:]) <= {200, 400, 409}
        self.settled()

    def drift(self, client: Client) -> None:
        """Somebody else writes PSKs to the interface, and the operator asks what would change."""
        theirs = format_key(os.urandom(32))
        for key, what in ((client.public_key, "somebody else's"), (theirs, "a foreign peer's")):
            self.site.gateway.run(
                *("wg", "set", self.site.interface, "peer", key, "preshared-key", "/dev/stdin"),
                stdin=self.psk(what),
            )
        self.answers.append(("/plan", self._control.ask("GET", "/plan")))
        assert b"drift" in self.answers[-1][1].body
        until(lambda: theirs not in self.site.shown(), 15, "the end of the drift")

    def without_journal(self, client: Client) -> None:
        """The disk is full, and a session is granted all the same."""
        filler = self.site.folder / "state" / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        said = self.site.log.read_text().count("journal can't be used")
        self.grant(client, "without a journal")
        # It may be over at once: closing the journal frees a little of the disk.
        until(
            lambda: self.site.log.read_text().count("journal can't be used") > said, 15, "the journal's fault"
        )
        filler.unlink()
        until(lambda: self.site.status()["journal_ok"], 15, "the journal's return")

    def core_faults(self) -> None:
        """Core dies and comes back."""
        self.site.core.kill()
        until(lambda: not self.site.status()["core_connected"], 15, "the loss of core")
        self.ask_pages()
        self.site.core.start()
        until(lambda: self.site.status()["core_connected"], 15, "core's return")

    def reload(self) -> None:
        """SIGHUP with a file that can't be used, then with one that can."""
        assert self.site.process is not None
        good = self.site.config.read_text()
        for text in (good.replace("[stats]", f'[stats]\nsecret = "{self.psk("in the file")}"'), good):
            self.site.config.write_text(text)
            before = self.site.log.read_text().count("reloaded")
            self.site.process.send_signal(signal.SIGHUP)
            until(lambda n=before: self.site.log.read_text().count("reloaded") > n, what="the reload")  # type: ignore[misc]

    def ask_pages(self) -> None:
        """Every page and every answer of the operator's socket, good and bad."""
        for path in ("/metrics", "/healthz", "/readyz", "/", f"/{self.psk('in a path')}"):
            self.answers.append((path, self._http.ask("GET", path)))
        cut = self.psk("given to end")[:-1]
        bodies = (b"{", b'{"keys": "%s"}' % cut.encode(), b'{"keys": ["%s"]}' % cut.encode(), b'{"all": 3}')
        self.answers += [("/end", self._control.ask("POST", "/end", body)) for body in bodies]
        asked = ("/status", "/plan", "/events", "/explain?what=device")
        self.answers += [(path, self._control.ask("GET", path)) for path in asked]

    def ask_commands(self) -> None:
        """Every command that an operator has; outside of the full run most without a process of their own.

        ``check`` has one always: it forbids core files, for good.
        """
        end = ("end", self.site.status()["peers"][0]["public_key"])
        for command in (*COMMANDS, end, ("end", "x"), ("unheard", "of")):
            argv = [*command, "-c", str(self.site.config)]
            if FULL or command[0] == "check":
                done = self.site.gateway.run(sys.executable, "-m", "agent", *argv, check=False)
                said = done.stdout + done.stderr
            else:
                said = run_inside(self.site.gateway, argv)
            assert said
            self.hunt.look(f"wg-agent {command[0]}", said.encode())

    def bug_in_push(self) -> None:
        """A fault of the agent's own while it has a push in hand, quoting all that there is."""
        assert self.site.process is not None
        self.site.process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        body = json.dumps({"location": "1", "psk": self.psk("pushed into a bug")}).encode()
        self.answers.append(("push", self._pushing.send(body)))
        assert self.answers[-1][1].status == 500
        until(lambda: "a bug that quotes" in self.site.log.read_text(), what="the traceback")

    def bug_in_writer(self, client: Client) -> None:
        """The same in the middle of everything: the agent falls."""
        assert self.site.process is not None
        process, self.site.process = self.site.process, None
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.1)
        self.grant(client, "granted into a bug")
        assert process.wait(20) != 0

    # The hunt.

    def search(self) -> None:
        """Everything that is there by now."""
        folder = self.site.folder
        key = folder / "state" / "private.key"
        assert self.hunt.look_below(folder / "state", {key: "the private key"}) >= 2
        assert self.hunt.look_below(folder / "run", {}) >= 1
        self.hunt.look("the log", self.site.log.read_bytes())
        for place, answer in self.answers:
            self.hunt.look(place, answer.head + b"\n" + answer.body)

    def process_shown(self) -> None:
        """The agent's own arguments and environment, and its children's."""
        assert self.site.process is not None
        children = [int(pid) for pid in self.site.gateway.pids() if pid != self.site.process.pid]
        for pid in (self.site.process.pid, *children):
            for name in ("cmdline", "environ"):
                self.hunt.look(f"/proc/{pid}/{name}", Path(f"/proc/{pid}/{name}").read_bytes())


def run_inside(space: Namespace, argv: list[str]) -> str:
    """What a command prints, run by a thread of this process in the namespace."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), suppress(SystemExit), ThreadPoolExecutor(1) as pool:
        pool.submit(_enter, space.path).result()
        pool.submit(main, argv).result()
    return said.getvalue()
