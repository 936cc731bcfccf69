"""A stand with access rules over its interface and a server that answers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from agent.aclfirewall import AclFirewall
from agent.aclruleset import acl_table
from agent.encoding import parse_prefix
from agent.model import Prefix
from agent.nft import Library, NftError
from tests.firewall import asking
from tests.firewall.asking import Answerer, Asker
from tests.firewall.stand import ALICE4, SERVER, SERVER6, Stand
from tests.support.netns import Network

WEB, SSH, DNS, HIGH = 4080, 4022, 4053, 4999
PORTS = (WEB, SSH, DNS, HIGH)
VPN4, VPN6 = parse_prefix("10.8.0.0/16"), parse_prefix("fd00:8::/32")
PUBLIC4, PUBLIC6 = "192.0.2.77", "2001:db8:2::77"


class Scene(Stand):
    """The stand with a server that answers, and access rules over the interface."""

    def __init__(self, net: Network, folder: Path, name: str = "wg0") -> None:
        super().__init__(net, name)
        self.file = folder / "acl.json"
        self.client, self.answerer = Asker(self.clients), Answerer(self.server, *PORTS)
        self.networks: list[Prefix] | None = [VPN4, VPN6]
        self.rules: list[AclFirewall] = []

    def access(self, **options: Any) -> AclFirewall:
        rules = AclFirewall(self.name, lambda: self.networks, self.file, **options)
        self.rules.append(rules)
        return rules

    def close(self) -> None:
        for rules in self.rules:
            rules.close()
        self.client.close()
        self.answerer.close()
        super().close()

    async def opened(self, source: str = ALICE4, kind: int = asking.TCP) -> set[int]:
        """The ports of the server, by IPv4 or IPv6, that a client gets an answer from."""
        target = SERVER6 if ":" in source else SERVER
        seen = await asyncio.gather(*(self.client.ask(source, target, port, kind) for port in PORTS))
        return {port for port, address in zip(PORTS, seen, strict=True) if address}

    async def seen_as(self, source: str, kind: int = asking.TCP) -> str:
        """The address by which the server sees a client."""
        return await self.client.ask(source, SERVER6 if ":" in source else SERVER, WEB, kind)

    async def table(self) -> str:
        """The table of access rules; "" if it is not there."""
        listed = (await self.nft("list", "ruleset")).split("table ")
        return next((t for t in listed if t.startswith(f"{acl_table(self.name)} ")), "")

    async def is_judged(self) -> bool:
        """Whether packets are sent through the rules."""
        return "jump" in await self.table()

    async def others(self) -> str:
        listed = (await self.foreign()).split("table ")
        return "".join(t for t in listed if not t.startswith(f"{acl_table(self.name)} "))


async def until(condition: Callable[[], Coroutine[Any, Any, object]], within: float = 10.0) -> float:
    """Wait for something true; the seconds that took."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within, "it does not come about"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@contextlib.asynccontextmanager
async def kept(rules: AclFirewall) -> AsyncIterator[None]:
    task = asyncio.create_task(rules.keep())
    await asyncio.sleep(0.2)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Balky(Library):
    """nftables that refuses what it is told to refuse, and takes so many seconds for each transaction."""

    refuses = ""
    takes = 0.0
    ran = 0

    def run(self, commands: str, *, dry_run: bool = False) -> str:
        self.ran += 1
        time.sleep(self.takes)
        if self.refuses and self.refuses in commands:
            raise NftError("nftables: Cannot allocate memory")
        return super().run(commands, dry_run=dry_run)
