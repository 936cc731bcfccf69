"""A Defguard core of either generation, and the reconciler on a recording device that follows it."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from pydantic import SecretStr

from agent.acl import Acl
from agent.configfile import load_config
from agent.core.defguard.connection import CalledCore, CallingCore
from agent.encoding import format_key
from agent.errors import GuardError
from agent.keys import Secrets
from agent.model import PresharedKey, PublicKey
from agent.sessions import Limits
from tests.reconciler.harness import Agent, World
from tests.support.builders import key, psk
from tests.support.defguard_core import FirstGeneration, SecondGeneration

Core = FirstGeneration | SecondGeneration
PATIENCE = 20.0


class Rules:
    """The access rules that were to be put in force; ``fails`` makes that impossible."""

    def __init__(self) -> None:
        self.put_in_force: list[Acl | None] = []
        self.fails = False

    async def put(self, acl: Acl | None) -> None:
        if self.fails:
            raise GuardError("nftables is gone")
        self.put_in_force.append(acl)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def device(core: Core, number: int, preshared_key: int | None = None, **members: Any) -> Any:
    """A peer as Defguard tells it: with a PSK after MFA; allowed IPs are bare addresses."""
    told = {"pubkey": format_key(key(number)), "allowed_ips": [f"10.8.0.{number}"], "keepalive_interval": 25}
    if preshared_key is not None:
        told["preshared_key"] = format_key(psk(preshared_key).raw)
    return core.wire.Peer(**told | members)


async def eventually(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come about in {PATIENCE} s")
        await asyncio.sleep(0.01)


async def holds(world: World, expected: dict[PublicKey, PresharedKey | None]) -> None:
    """Wait until the interface would let in just these peers, by these PSKs."""
    await eventually(
        lambda: world.on_interface() == expected, f"{len(expected)} peers instead of {world.on_interface()}"
    )


def peers(*numbers: tuple[int, int | None]) -> dict[PublicKey, PresharedKey | None]:
    """What ``holds`` expects: peers by number, with the number of their PSK."""
    return {key(number): None if secret is None else psk(secret) for number, secret in numbers}


def make_core(generation: int) -> Core:
    return FirstGeneration() if generation == 1 else SecondGeneration(free_port())


def configuration(folder: Path, core: Core, more: str = "") -> Path:
    """The agent's configuration for this core."""
    path = folder / "agent.toml"
    if isinstance(core, FirstGeneration):
        reach = f'generation = 1\nurl = "{core.url}"\n[defguard]\nhostname = "gw-1"\n'
    else:
        reach = f'generation = 2\n[defguard]\nlisten = "127.0.0.1:{core.port}"\n'
    path.write_text(f'[core]\nprotocol = "defguard"\n{reach}{more}\n[paths]\nstate = "{folder}/state"\n')
    return path


@asynccontextmanager
async def following(
    world: World, core: Core, *, rules: Rules | None = None, quiet: float | None = None, more: str = ""
) -> AsyncIterator[Agent]:
    """An agent that follows this core, which runs; leaving the block stops the agent.

    ``more`` is TOML of the section [defguard].
    """
    more += "" if quiet is None else f"\nresync_interval = {quiet}"
    config = load_config(configuration(world.folder, core, more))
    rules = rules or Rules()
    limits = Limits(max_lifetime=86_400.0, idle_timeout=300.0, connect_timeout=180.0)
    async with world.agent(limits=limits) as agent:
        inbox, reports = agent.inbox, agent.reconciler.reports
        followed: CalledCore | CallingCore
        if isinstance(core, FirstGeneration):
            secrets = Secrets(SecretStr(core.token))
            followed = CalledCore(config, secrets, inbox, reports, rules, world.clock)
        else:
            note = agent.metrics.set_certificates
            followed = CallingCore(config, inbox, reports, rules, world.clock, note)
        task = asyncio.create_task(followed.run())
        try:
            yield agent
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})


def run_following(
    world: World,
    generation: int,
    scenario: Callable[[Agent, Any], Coroutine[Any, Any, None]],
    prepare: Callable[[Any], object] = lambda _: None,
    **members: Any,
) -> None:
    """Run a scenario with an agent that has the state of a core which ``prepare`` has filled."""

    async def main() -> None:
        core = make_core(generation)
        prepare(core)
        if isinstance(core, FirstGeneration):
            async with core.running(), following(world, core, **members) as agent:
                await eventually(lambda: agent.inbox.position is not None, "the first state")
                await scenario(agent, core)
            return
        async with following(world, core, **members) as agent:
            await adopted(core)
            async with core.dialling():
                await eventually(lambda: agent.inbox.position is not None, "the first state")
                await scenario(agent, core)

    asyncio.run(main())


async def adopted(core: SecondGeneration) -> None:
    """Have the gateway adopted as soon as it can be: after a purge its port is another server's at first."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            await core.adopt()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)
        else:
            return


def listens(port: int) -> bool:
    """Whether somebody does there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
