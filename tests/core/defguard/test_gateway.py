"""What gRPC can do to a call of core's only by chance, in every order."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc

from agent.core.defguard.certificates import Certificates
from agent.core.defguard.feed import Feed, Terms
from agent.core.defguard.gateway import GatewayService
from agent.core.defguard.wire import gateway_v2_pb2 as v2
from tests.core.defguard.harness import Rules, eventually
from tests.reconciler.harness import Agent, World
from tests.support.defguard_core import PEM, VERSION_2, Authority


class Call:
    """Core's Bidi as gRPC hands it to the gateway: the call's context, and the stream of what core sends."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate
        self._over = asyncio.Event()

    def end(self) -> None:
        """Core sends nothing more."""
        self._over.set()

    async def responses(self) -> AsyncIterator[bytes]:
        answer = v2.CoreResponse(id=1)
        answer.config.CopyFrom(v2.Configuration(name="hq", addresses=["10.8.0.1/24"], port=51820))
        yield answer.SerializeToString()
        await self._over.wait()

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        return {"x509_pem_cert": (self._certificate,)}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return VERSION_2

    def peer(self) -> str:
        return "ipv4:192.0.2.1:50066"

    async def send_initial_metadata(self, metadata: Any) -> None:
        await asyncio.sleep(0)

    async def write(self, message: Any) -> None:
        await asyncio.sleep(0)

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise AssertionError(f"core was refused: {details}")


def make_service(world: World, agent: Agent, certificate: bytes) -> GatewayService:
    inbox, reports = agent.inbox, agent.reconciler.reports

    async def purge() -> None:
        raise AssertionError("nobody has deleted the gateway")

    return GatewayService(
        Certificates(certificate, b"", certificate, certificate),
        inbox,
        reports,
        lambda: Feed(Terms("hq"), inbox, reports, Rules(), world.clock),
        purge,
        quiet=600.0,
    )


def test_the_end_of_a_connection_is_seen_at_whatever_step_its_call_is_cancelled(world: World) -> None:
    certificate = Authority().client.public_bytes(PEM)

    async def main() -> None:
        async with world.agent() as agent:
            service = make_service(world, agent, certificate)
            details: Any = SimpleNamespace(method="/defguard.gateway.v2.Gateway/Bidi", invocation_metadata=())
            handler: Any = service.handlers().service(details)
            for steps in itertools.count():
                call = Call(certificate)
                handling = asyncio.create_task(handler.stream_stream(call.responses(), call))
                await eventually(lambda: agent.inbox.core_connected, "the connection")
                # When core closes its connection, gRPC ends the stream and cancels the call: which of them
                # first, and how far the gateway has come in between, is chance.
                call.end()
                for _ in range(steps):
                    await asyncio.sleep(0)
                in_time = handling.cancel()
                await asyncio.wait({handling})
                assert not agent.inbox.core_connected, f"cancelled after {steps} steps"
                if not in_time:
                    break
            assert steps > 3

    asyncio.run(main())
