"""Defguard cores of both generations, as the facts tell of them: real gRPC on real sockets.

Each is what a gateway meets of one: who has to call whom, what has to be in the metadata, which error code
says what, and in which order things happen.
"""

import asyncio
import base64
import hashlib
import hmac
import inspect
import ipaddress
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from google.protobuf.empty_pb2 import Empty

from agent.core.defguard.wire import common_v2_pb2 as common
from agent.core.defguard.wire import gateway_v1_pb2 as v1
from agent.core.defguard.wire import gateway_v2_pb2 as v2

DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM


def jwt(network: int = 7, secret: bytes = b"gateway-secret") -> str:
    """A gateway's token, as core makes it: HS256."""

    def text(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    header = text(json.dumps({"typ": "JWT", "alg": "HS256"}).encode())
    claims = {"iss": "DefGuard", "sub": f"DEFGUARD-NETWORK-{network}", "exp": 32503680000, "nbf": 0}
    signed = f"{header}.{text(json.dumps(claims).encode())}"
    return f"{signed}.{text(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


class FirstGeneration:
    """Core 1.x. ``configuration`` is what Config answers; ``told`` collects what the gateway reports."""

    wire: Any = v1

    def __init__(self, network: int = 7) -> None:
        self.network = network
        self.token = jwt(network)
        self.others: dict[str, FirstGeneration] = {}
        """Other locations of the same core, by their gateways' tokens; their own servers do not run."""
        self.configuration = v1.Configuration(name="hq", addresses=["10.8.0.1/24"], port=51820)
        self.gateways: dict[str, str] = {}
        """By hostname: known, or connected."""
        self.told: list[v1.PeerStats] = []
        self.configs = 0
        """Calls of Config."""
        self.lagging = False
        """Whether updates are lost on the way to the gateway, without a word."""
        self.at_config: Callable[[], object] = lambda: None
        """Called after a configuration was read and before it is answered."""
        self.at_updates: Callable[[], object] = lambda: None
        """Called before the gateway is subscribed to updates."""
        self.version = "1.6.6"
        self.stats_broken = 0
        """Streams of reports closed over an endpoint that is none."""
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self._streams: list[asyncio.Queue[v1.Update]] = []

    async def start(
        self, port: int = 0, credentials: grpc.ServerCredentials | None = None, host: str = "127.0.0.1"
    ) -> None:
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Config": grpc.unary_unary_rpc_method_handler(
                self._config, v1.ConfigurationRequest.FromString, v1.Configuration.SerializeToString
            ),
            "Updates": grpc.unary_stream_rpc_method_handler(
                self._updates, Empty.FromString, v1.Update.SerializeToString
            ),
            "Stats": grpc.stream_unary_rpc_method_handler(
                self._stats, v1.StatsUpdate.FromString, Empty.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("gateway.GatewayService", handlers),)
        )
        address = f"{host}:{port}"
        if credentials is None:
            self.port = server.add_insecure_port(address)
        else:
            self.port = server.add_secure_port(address, credentials)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Core dies: every connection breaks."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self._streams.clear()
        self.gateways = dict.fromkeys(self.gateways, "known")

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FirstGeneration"]:
        await self.start()
        try:
            yield self
        finally:
            await self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    # What happens in core.

    def push(self, update: v1.Update) -> None:
        """Tell every gateway that is subscribed."""
        if not self.lagging:
            for stream in self._streams:
                stream.put_nowait(update)

    def create(self, peer: v1.Peer) -> None:
        """A device is new, or its user has finished MFA."""
        self._forget(peer.pubkey)
        self.configuration.peers.append(peer)
        self.push(v1.Update(update_type=v1.CREATE, peer=peer))

    def modify(self, peer: v1.Peer, *, formerly: str = "") -> None:
        """A device is otherwise, perhaps with another key."""
        self._forget(formerly or peer.pubkey)
        self.configuration.peers.append(peer)
        self.push(v1.Update(update_type=v1.MODIFY, peer=peer))

    def delete(self, pubkey: str) -> None:
        """A device is gone, or its session: the key alone is told."""
        self._forget(pubkey)
        self.push(v1.Update(update_type=v1.DELETE, peer=v1.Peer(pubkey=pubkey)))

    def _forget(self, pubkey: str) -> None:
        kept = [peer for peer in self.configuration.peers if peer.pubkey != pubkey]
        del self.configuration.peers[:]
        self.configuration.peers.extend(kept)

    # What the gateway calls.

    async def _gateway(self, context: Any) -> str:
        """Who calls; the checks in their order, and the error codes, are core's."""
        metadata = dict(context.invocation_metadata() or ())
        version = metadata.get("defguard-component-version", "0.0.0").partition("-")[0]
        numbers = tuple(int(part) for part in version.split("."))
        if numbers < (1, 5, 0) or metadata.get("defguard-component-system", "").count(";") != 2:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the gateway's version is not supported")
        if metadata.get("authorization") not in {self.token, *self.others}:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "invalid token")
        if "hostname" not in metadata:
            await context.abort(grpc.StatusCode.INTERNAL, "no hostname")
        await context.send_initial_metadata(
            (
                ("defguard-component-version", self.version),
                ("defguard-component-system", "Linux;6.1;x86_64"),
            )
        )
        return str(metadata["hostname"])

    def _location(self, context: Any) -> "FirstGeneration":
        """The location that the caller's token is for."""
        token = dict(context.invocation_metadata() or ()).get("authorization")
        return self.others.get(str(token), self)

    async def _config(self, request: v1.ConfigurationRequest, context: Any) -> v1.Configuration:
        if (location := self._location(context)) is not self:
            return await location._config(request, context)
        gateway = await self._gateway(context)
        self.configs += 1
        self.gateways.setdefault(gateway, "known")
        answer = v1.Configuration()
        answer.CopyFrom(self.configuration)
        doing = self.at_config()
        if inspect.isawaitable(doing):
            await doing
        return answer

    async def _updates(self, _: Empty, context: Any) -> AsyncIterator[v1.Update]:
        if (location := self._location(context)) is not self:
            async for update in location._updates(_, context):
                yield update
            return
        metadata = dict(context.invocation_metadata() or ())
        if metadata.get("hostname") not in self.gateways:
            await context.abort(grpc.StatusCode.INTERNAL, "unknown gateway")
        self.at_updates()
        stream: asyncio.Queue[v1.Update] = asyncio.Queue()
        self._streams.append(stream)
        gateway = await self._gateway(context)
        self.gateways[gateway] = "connected"
        try:
            while True:
                yield await stream.get()
        finally:
            if stream in self._streams:
                self._streams.remove(stream)
            if not self._streams:
                self.gateways[gateway] = "known"

    async def _stats(self, updates: AsyncIterator[v1.StatsUpdate], context: Any) -> Empty:
        if (location := self._location(context)) is not self:
            return await location._stats(updates, context)
        await self._gateway(context)
        async for update in updates:
            if update.WhichOneof("payload") != "peer_stats":
                continue
            stats = update.peer_stats
            if not _is_endpoint(stats.endpoint):
                self.stats_broken += 1
                return Empty()
            copy = v1.PeerStats()
            copy.CopyFrom(stats)
            self.told.append(copy)
        return Empty()


def _is_endpoint(text: str) -> bool:
    address, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return False
    return port.isdigit()


class Authority:
    """Core 2.x's own CA, and the client certificate that it shows to gateways."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.ca = self._certificate(self.key, "Defguard CA", ca=True)
        self.client_key = ec.generate_private_key(ec.SECP256R1())
        self.client = self._certificate(self.client_key, "core", usage=ExtendedKeyUsageOID.CLIENT_AUTH)

    def sign(self, request: bytes, **members: Any) -> x509.Certificate:
        """A gateway's certificate for what it has asked for."""
        asked = x509.load_der_x509_csr(request)
        assert asked.is_signature_valid
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        members = {"usage": ExtendedKeyUsageOID.SERVER_AUTH, "names": names, **members}
        public = asked.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        return self._signed(public, "gateway", **members)

    def _certificate(self, key: ec.EllipticCurvePrivateKey, name: str, **members: Any) -> x509.Certificate:
        return self._signed(key.public_key(), name, **members)

    def _signed(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        *,
        ca: bool = False,
        usage: x509.ObjectIdentifier | None = None,
        names: x509.SubjectAlternativeName | None = None,
        lasts: timedelta = timedelta(days=365),
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Defguard CA")]),
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - timedelta(days=2),
            not_valid_after=now + lasts,
        ).add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def another_client(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """A client certificate of the same CA that is not the one that gateways know."""
        key = ec.generate_private_key(ec.SECP256R1())
        return key, self._certificate(key, "core", usage=ExtendedKeyUsageOID.CLIENT_AUTH)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


VERSION_2 = (("defguard-component-version", "2.0.1"), ("defguard-component-system", "Linux;6.1;x86_64"))


class SecondGeneration:
    """Core 2.x: it dials the gateway at ``port``, adopts it, and follows with Bidi."""

    wire: Any = v2

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = port
        self.authority = Authority()
        self.configuration = v2.Configuration(name="hq", addresses=["10.8.0.1/24"], port=51820, mtu=1420)
        self.told: list[v2.PeerStats] = []
        self.requests: list[str] = []
        """What the gateway sent on streams, in its order."""
        self.early = 0
        """Reports that came before the gateway had its configuration."""
        self.config_takes = 0.0
        """Seconds until the request for the configuration is answered."""
        self.metadata = VERSION_2
        self.redial = 0.2
        """Seconds until the gateway is dialled again; ten in life."""
        self.connected = asyncio.Event()
        self.failures: list[grpc.StatusCode] = []
        self.streams = 0
        self._queue: asyncio.Queue[v2.CoreResponse] | None = None
        self._task: asyncio.Task[None] | None = None
        self._number = 0

    # Adoption.

    async def adopt(self, hostname: str = "127.0.0.1", token: str = "setup", **members: Any) -> list[str]:
        """Make the gateway ours; the log that it told on the way."""
        metadata = (("authorization", f"Bearer {token}"), *VERSION_2)
        async with grpc.aio.insecure_channel(f"{self.host}:{self.port}") as made:
            start = made.unary_stream(
                "/defguard.gateway.v2.GatewaySetup/Start",
                Empty.SerializeToString,
                common.LogEntry.FromString,
            )(Empty(), metadata=metadata)
            version = str(dict(await start.initial_metadata() or ()).get("defguard-component-version", ""))
            if start.done():
                await start.read()  # raises why it was refused
            assert version.count(".") == 2
            assert "-" not in version
            request = await self.get_csr(made, hostname, metadata)
            certificate = self.authority.sign(request, **members)
            await self.send_cert(made, certificate, metadata)
            return [entry.message async for entry in start]

    async def get_csr(self, made: grpc.aio.Channel, hostname: str, metadata: Any) -> bytes:
        call = made.unary_unary(
            "/defguard.gateway.v2.GatewaySetup/GetCsr",
            common.CertificateInfo.SerializeToString,
            common.DerPayload.FromString,
        )
        payload = await call(common.CertificateInfo(cert_hostname=hostname), metadata=metadata)
        return bytes(payload.der_data)

    async def send_cert(self, made: grpc.aio.Channel, certificate: x509.Certificate, metadata: Any) -> None:
        call = made.unary_unary(
            "/defguard.gateway.v2.GatewaySetup/SendCert",
            common.CertBundle.SerializeToString,
            Empty.FromString,
        )
        bundle = common.CertBundle(
            component_cert_der=certificate.public_bytes(DER),
            ca_cert_der=self.authority.ca.public_bytes(DER),
            core_client_cert_der=self.authority.client.public_bytes(DER),
        )
        await call(bundle, metadata=metadata)

    # Operation.

    def channel(
        self,
        key: ec.EllipticCurvePrivateKey | None = None,
        certificate: x509.Certificate | None = None,
        port: int | None = None,
    ) -> grpc.aio.Channel:
        """A connection by core's client certificate, or another."""
        key, certificate = key or self.authority.client_key, certificate or self.authority.client
        credentials = grpc.ssl_channel_credentials(
            self.authority.ca.public_bytes(PEM), private_pem(key), certificate.public_bytes(PEM)
        )
        options = (
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.use_local_subchannel_pool", 1),
        )
        return grpc.aio.secure_channel(f"{self.host}:{port or self.port}", credentials, options)

    @asynccontextmanager
    async def dialling(self) -> AsyncIterator["SecondGeneration"]:
        """Dial, follow, and dial again."""
        self.start()
        try:
            yield self
        finally:
            await self.stop()

    def start(self) -> None:
        self.connected = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _run(self) -> None:
        while True:
            async with self.channel() as made:
                try:
                    await self._follow(made)
                except grpc.aio.AioRpcError as error:
                    self.failures.append(error.code())
                finally:
                    self.connected.clear()
                    self._queue = None
            await asyncio.sleep(self.redial)

    async def _follow(self, made: grpc.aio.Channel) -> None:
        call: Any = made.stream_stream(
            "/defguard.gateway.v2.Gateway/Bidi",
            v2.CoreResponse.SerializeToString,
            v2.CoreRequest.FromString,
        )(metadata=self.metadata)
        queue: asyncio.Queue[v2.CoreResponse] = asyncio.Queue()
        writing: asyncio.Task[None] | None = None
        try:
            async for request in call:
                kind = request.WhichOneof("payload")
                self.requests.append(kind)
                if kind == "config_request" and writing is None:
                    writing = asyncio.create_task(self._answer(call, queue))
                elif kind == "peer_stats" and self._queue is not queue:
                    self.early += 1
                elif kind == "peer_stats" and _is_endpoint(request.peer_stats.endpoint):
                    copy = v2.PeerStats()
                    copy.CopyFrom(request.peer_stats)
                    self.told.append(copy)
        finally:
            if writing is not None:
                writing.cancel()
            call.cancel()

    async def _answer(self, call: Any, queue: "asyncio.Queue[v2.CoreResponse]") -> None:
        """Send the configuration, then what happens from then on."""
        await asyncio.sleep(self.config_takes)
        answer = v2.CoreResponse(id=self._next())
        answer.config.CopyFrom(self.configuration)
        self._queue = queue
        await call.write(answer)
        self.streams += 1
        self.connected.set()
        while True:
            await call.write(await queue.get())

    async def purge(self) -> None:
        """The gateway was deleted in core."""
        async with self.channel() as made:
            call = made.unary_unary(
                "/defguard.gateway.v2.Gateway/Purge", Empty.SerializeToString, Empty.FromString
            )
            await call(Empty(), metadata=self.metadata)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def push(self, update: v2.Update) -> None:
        """Tell the gateway, if it is connected."""
        if self._queue is not None:
            self._queue.put_nowait(v2.CoreResponse(id=self._next(), update=update))

    def create(self, peer: v2.Peer) -> None:
        """A device is new, or its user has finished MFA."""
        self._forget(peer.pubkey)
        self.configuration.peers.append(peer)
        self.push(v2.Update(update_type=v2.UPDATE_TYPE_CREATE, peer=peer))

    def modify(self, peer: v2.Peer, *, formerly: str = "") -> None:
        """A device is otherwise, perhaps with another key."""
        self._forget(formerly or peer.pubkey)
        self.configuration.peers.append(peer)
        self.push(v2.Update(update_type=v2.UPDATE_TYPE_MODIFY, peer=peer))

    def delete(self, pubkey: str) -> None:
        """A device is gone, or its session: the key alone is told."""
        self._forget(pubkey)
        self.push(v2.Update(update_type=v2.UPDATE_TYPE_DELETE, peer=v2.Peer(pubkey=pubkey)))

    def _forget(self, pubkey: str) -> None:
        kept = [peer for peer in self.configuration.peers if peer.pubkey != pubkey]
        del self.configuration.peers[:]
        self.configuration.peers.extend(kept)
