"""A site whose core is a Defguard core of either generation, in a namespace of its own."""

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trustme

from agent.curve25519 import clamp
from agent.encoding import format_key
from tests.support.client import Client
from tests.support.defguard_core import jwt
from tests.support.site import GATEWAY_ADDRESS, PORT, Site

CORE, GATEWAY = "10.201.0.2", "10.201.0.1"
CORE_PORT, GATEWAY_PORT = 50055, 50066
PRIVATE_KEY = clamp(bytes(range(1, 33)))


class DefguardSite(Site):
    """The sandbox's core only deals out addresses here; who is let in, the Defguard core says."""

    def __init__(self, folder: Path, generation: int, **members: Any) -> None:
        super().__init__(folder, **members)
        self.generation = generation
        self.space = self.network.namespace("core")
        self.program: subprocess.Popen[bytes] | None = None
        self._key = self._certificate = self._cable = ""

    def __enter__(self) -> Self:
        super().__enter__()
        _, self._cable = self.network.link(self.gateway, f"{GATEWAY}/24", self.space, f"{CORE}/24")
        argv = (sys.executable, "-m", "tests.support.defguard_program", str(self.generation))
        self.program = self.space.popen(
            *argv, GATEWAY, str(GATEWAY_PORT), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        key = "prvkey" if self.generation == 1 else "private_key"
        settings = {"addresses": [f"{GATEWAY_ADDRESS}/16"], "port": PORT, key: format_key(PRIVATE_KEY)}
        self.do("configure", **settings)
        if self.generation == 1:
            self._certify()
            self.listen()
        self.config.write_text(self._agent_toml())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.program is not None:
            assert self.program.stdin is not None
            assert self.program.stdout is not None
            self.program.stdin.close()
            self.program.wait(20)
            self.program.stdout.close()
        super().__exit__(kind, error, trace)

    def _certify(self) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert(CORE)
        authority.cert_pem.write_to_path(self.folder / "core-ca.pem")
        self._key = issued.private_key_pem.bytes().decode()
        self._certificate = issued.cert_chain_pems[0].bytes().decode()
        token = self.folder / "token"
        token.write_text(jwt())
        token.chmod(0o600)

    def _agent_toml(self) -> str:
        text = self.config.read_text()
        before, _, rest = text.partition("[core]")
        core = 'protocol = "defguard"\ngeneration = 2'
        if self.generation == 1:
            core = (
                f'protocol = "defguard"\ngeneration = 1\nurl = "https://{CORE}:{CORE_PORT}/"\n'
                f'token_file = "{self.folder}/token"\nca_file = "{self.folder}/core-ca.pem"'
            )
        defguard = f'[defguard]\nhostname = "gw-1"\nlisten = "{GATEWAY}:{GATEWAY_PORT}"'
        return f"{before}[core]\n{core}\n{defguard}\n[stats]{rest.partition('[stats]')[2]}"

    def do(self, command: str, **members: Any) -> Any:
        """Have core do something, and wait until it has."""
        assert self.program is not None
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.write(json.dumps({"do": command, **members}).encode() + b"\n")
        self.program.stdin.flush()
        answer = json.loads(self.program.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"core could not {command}: {answer['error']}")
        return answer["answer"]

    def listen(self) -> None:
        """A core of the first generation begins to serve."""
        self.do("listen", port=CORE_PORT, cert=self._certificate, key=self._key)

    def core_away(self) -> None:
        """Core goes, closing its connections as a process does that ends."""
        self.do("stop")

    def core_back(self) -> None:
        """Core is there again."""
        if self.generation == 1:
            self.listen()
        else:
            self.do("dial")

    def cut_off(self) -> None:
        """Core's cable is out: nothing says so, and core itself goes on."""
        self.space.ip("link", "set", self._cable, "down")

    def joined(self) -> None:
        """Core's cable is in again."""
        self.space.ip("link", "set", self._cable, "up")

    def restrict(self) -> None:
        """Core has access rules: of everything that nftables has to keep for them one."""
        allow, deny = (
            ("ALLOW", "DENY")
            if self.generation == 1
            else (
                "FIREWALL_POLICY_ALLOW",
                "FIREWALL_POLICY_DENY",
            )
        )
        versions = ("IPV4", "IPV6") if self.generation == 1 else ("IP_VERSION_IPV4", "IP_VERSION_IPV6")
        sources = ([{"ip": "10.8.0.5"}, {"ip_subnet": "10.8.1.0/24"}], [{"ip": "fd00::5"}])
        destinations = (
            [{"ip_range": {"start": "192.0.2.7", "end": "192.0.2.19"}}, {"ip": "198.51.100.1"}],
            [{"ip_subnet": "2001:db8:1::/48"}],
        )
        rules = [
            {
                "id": 132,
                "ip_version": version,
                "source_addrs": by,
                "destination_addrs": to,
                "destination_ports": [{"single_port": 443}, {"port_range": {"start": 8000, "end": 8080}}],
                "protocols": [6, 17],
                "verdict": allow,
                "comment": 'staff "Berlin"',
            }
            for version, by, to in zip(versions, sources, destinations, strict=True)
        ]
        snat = [{"id": 5, "source_addrs": [{"ip": "10.8.0.5"}], "public_ip": "192.0.2.1"}]
        self.do("firewall", rules={"default_policy": deny, "rules": rules, "snat_bindings": snat})

    def access_rules(self) -> list[str]:
        """Return the words of the kernel's table of access rules."""
        tables = self.gateway.run("nft", "list", "tables").stdout.split()
        name = next((word for word in tables if word.startswith("wg_agent.acl_")), None)
        if name is None:
            return []
        listed = self.gateway.run("nft", "list", "table", "inet", name).stdout
        return listed.replace("{", " ").replace("}", " ").replace(",", " , ").split()

    def authorise(self, client: Client, psk: str) -> None:
        """The client's user has finished MFA, and core has made this PSK."""
        peer = {"pubkey": client.public_key, "allowed_ips": [client.address], "keepalive_interval": 25}
        self.do("create", **peer, preshared_key=psk)

    def disconnect(self, client: Client) -> None:
        """Core ends the client's session."""
        self.do("delete", pubkey=client.public_key)
