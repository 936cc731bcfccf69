"""A Defguard core as a program, for a namespace of its own: ``python -m tests.support.defguard_program 1|2``.

Commands come as JSON lines on stdin, each answered by a line on stdout: ``{"do": NAME, …}``.
"""

import asyncio
import json
import sys
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict

from tests.support.defguard_core import FirstGeneration, SecondGeneration


class Program:
    """One core; each method is a command."""

    def __init__(self, core: FirstGeneration | SecondGeneration) -> None:
        self.core: Any = core

    async def listen(self, port: int, cert: str, key: str) -> None:
        """The first generation: serve with this certificate, in PEM."""
        credentials = grpc.ssl_server_credentials([(key.encode(), cert.encode())])
        await self.core.start(port, credentials, host="0.0.0.0")

    async def dial(self) -> None:
        """The second generation: connect, and connect again."""
        self.core.start()

    async def adopt(self, hostname: str) -> list[str]:
        told: list[str] = await self.core.adopt(hostname)
        return told

    async def stop(self) -> None:
        await self.core.stop()

    async def purge(self) -> None:
        await self.core.purge()

    async def configure(self, **members: Any) -> None:
        for name, value in members.items():
            if isinstance(value, list):
                getattr(self.core.configuration, name)[:] = value
            else:
                setattr(self.core.configuration, name, value)

    async def firewall(self, rules: dict[str, Any]) -> None:
        """Have these access rules, a FirewallConfig as protobuf's JSON."""
        update = self.core.wire.Update(update_type=1 if isinstance(self.core, FirstGeneration) else 2)
        ParseDict(rules, update.firewall_config)
        self.core.configuration.firewall_config.CopyFrom(update.firewall_config)
        self.core.push(update)

    async def create(self, **members: Any) -> None:
        self.core.create(self.core.wire.Peer(**members))

    async def delete(self, pubkey: str) -> None:
        self.core.delete(pubkey)

    async def told(self) -> list[dict[str, Any]]:
        return [MessageToDict(one) for one in self.core.told]


async def main() -> None:
    generation, host = int(sys.argv[1]), sys.argv[2]
    core = FirstGeneration() if generation == 1 else SecondGeneration(int(sys.argv[3]), host=host)
    program = Program(core)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        try:
            answer = {"answer": await getattr(program, command.pop("do"))(**command)}
        except Exception as error:  # noqa: BLE001 it is the test's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    await core.stop()


if __name__ == "__main__":
    asyncio.run(main())
