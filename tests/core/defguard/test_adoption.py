"""Adoption by a core of the second generation, over a real socket."""

import asyncio
import ipaddress
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf.empty_pb2 import Empty

from agent.core.defguard import certificates
from agent.core.defguard.adoption import Adoption
from agent.core.defguard.certificates import Certificates
from agent.core.defguard.wire import common_v2_pb2 as common
from agent.errors import ConfigError
from agent.model import Now
from tests.reconciler.harness import Clock
from tests.support.defguard_core import DER, VERSION_2, SecondGeneration

WINDOW = 600.0


class RealClock(Clock):
    """Certificates are judged by the wall clock, which has to be today's."""

    def __init__(self) -> None:
        super().__init__()
        self.now = Now(1000.0, time.time())


class Meeting:
    """A gateway that waits to be adopted, and the core that is to do it."""

    def __init__(self, folder: Path, adoption: Adoption, core: SecondGeneration, clock: Clock) -> None:
        self.folder = folder
        self.adoption = adoption
        self.core = core
        self.clock = clock

    def call(self, made: grpc.aio.Channel, name: str, request: Any, answer: Any, token: str) -> Any:
        method = made.unary_unary(
            f"/defguard.gateway.v2.GatewaySetup/{name}", type(request).SerializeToString, answer.FromString
        )
        return method(request, metadata=(("authorization", token), *VERSION_2))

    def begin(self, made: grpc.aio.Channel, token: str = "Bearer setup") -> Any:
        start = made.unary_stream(
            "/defguard.gateway.v2.GatewaySetup/Start", Empty.SerializeToString, common.LogEntry.FromString
        )
        metadata = (("authorization", token), *VERSION_2) if token else VERSION_2
        return start(Empty(), metadata=metadata)


def meet(folder: Path, scenario: Callable[[Meeting], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        clock = RealClock()
        adoption = Adoption(folder / "certs", WINDOW, clock)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((adoption.handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            await scenario(Meeting(folder / "certs", adoption, SecondGeneration(port), clock))
        finally:
            await server.stop(None)

    asyncio.run(main())


@asynccontextmanager
async def plain(meeting: Meeting) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{meeting.core.port}") as made:
        yield made


async def code_of(call: Any) -> grpc.StatusCode:
    """How a call that has to fail fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    code = caught.value.code()
    assert isinstance(code, grpc.StatusCode)
    return code


def test_core_adopts_the_gateway_and_is_told_on_the_way(tmp_path: Path) -> None:
    async def scenario(meeting: Meeting) -> None:
        told = await meeting.core.adopt("gateway.example.com")
        assert told == ["adoption begins", "certificate of gateway.example.com asked for", "adopted"]
        assert meeting.adoption.adopted.result() == certificates.load(meeting.folder)

    meet(tmp_path, scenario)


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("gateway.example.com", x509.DNSName("gateway.example.com")),
        ("192.0.2.7", x509.IPAddress(ipaddress.ip_address("192.0.2.7"))),
        ("2001:db8::7", x509.IPAddress(ipaddress.ip_address("2001:db8::7"))),
    ],
)
def test_the_request_is_for_just_the_name_that_core_gave(tmp_path: Path, hostname: str, name: Any) -> None:
    async def scenario(meeting: Meeting) -> None:
        await meeting.core.adopt(hostname)
        found = certificates.load(meeting.folder)
        assert found is not None
        certificate = x509.load_pem_x509_certificate(found.certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert list(names) == [name]

    meet(tmp_path, scenario)


def test_the_certificates_are_on_the_disk_and_their_owners_alone_before_core_is_answered(
    tmp_path: Path,
) -> None:
    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            start = meeting.begin(made)
            await start.read()
            metadata = (("authorization", "Bearer setup"), *VERSION_2)
            request = await meeting.core.get_csr(made, "127.0.0.1", metadata)
            assert not meeting.folder.exists()
            await meeting.core.send_cert(made, meeting.core.authority.sign(request), metadata)
            # The answer is here, and nothing else was awaited.
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in meeting.folder.iterdir()}
            assert modes == dict.fromkeys(certificates.FILES, 0o600)
            assert stat.S_IMODE(meeting.folder.stat().st_mode) == 0o700

    meet(tmp_path, scenario)


def test_once_the_window_is_over_nobody_adopts_the_gateway(tmp_path: Path) -> None:
    async def scenario(meeting: Meeting) -> None:
        meeting.clock.advance(WINDOW - 1)
        async with plain(meeting) as made:
            call = meeting.begin(made)
            assert (await call.read()).message == "adoption begins"
            call.cancel()
        meeting.clock.advance(1)
        async with plain(meeting) as made:
            assert await code_of(meeting.begin(made)) is grpc.StatusCode.FAILED_PRECONDITION

    meet(tmp_path, scenario)


def test_the_window_bounds_the_whole_adoption(tmp_path: Path) -> None:
    async def scenario(meeting: Meeting) -> None:
        meeting.clock.advance(WINDOW - 1)
        async with plain(meeting) as made:
            start = meeting.begin(made)
            await start.read()
            meeting.clock.advance(1)
            asked = common.CertificateInfo(cert_hostname="g")
            late = meeting.call(made, "GetCsr", asked, common.DerPayload, "Bearer setup")
            assert await code_of(late) is grpc.StatusCode.FAILED_PRECONDITION
            # Whoever holds on to it is let go of.
            assert await code_of(start) is grpc.StatusCode.DEADLINE_EXCEEDED

    meet(tmp_path, scenario)


def test_nobody_holds_up_an_adoption_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.core.defguard.adoption.HOLD", 0.3)

    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            start = meeting.begin(made, "Bearer stranger")
            await start.read()
            assert await code_of(start) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await meeting.core.adopt())[-1] == "adopted"

    meet(tmp_path, scenario)


def test_an_adoption_whose_answer_core_does_not_wait_for_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = certificates.store

    def slowly(folder: Path, found: Certificates) -> None:
        time.sleep(0.4)
        store(folder, found)

    monkeypatch.setattr(certificates, "store", slowly)

    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            start = meeting.begin(made)
            await start.read()
            metadata = (("authorization", "Bearer setup"), *VERSION_2)
            request = await meeting.core.get_csr(made, "127.0.0.1", metadata)
            certificate = meeting.core.authority.sign(request)
            sending = asyncio.create_task(meeting.core.send_cert(made, certificate, metadata))
            await asyncio.sleep(0.2)
            sending.cancel()
            async with asyncio.timeout(10):
                assert await meeting.adoption.adopted == certificates.load(meeting.folder)

    meet(tmp_path, scenario)


def test_a_second_start_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            first = meeting.begin(made)
            await first.read()
            assert await code_of(meeting.begin(made, "Bearer other")) is grpc.StatusCode.RESOURCE_EXHAUSTED
            first.cancel()
            codes = []
            for _ in range(100):
                again = meeting.begin(made, "Bearer other")
                try:
                    assert (await again.read()).message == "adoption begins"
                    break
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
                    await asyncio.sleep(0.02)
            else:
                pytest.fail("the first adoption was never given up")
            assert set(codes) <= {grpc.StatusCode.RESOURCE_EXHAUSTED}

    meet(tmp_path, scenario)


@pytest.mark.parametrize("token", ["", "Bearer ", "setup"])
def test_adoption_without_a_bearer_token_is_unauthenticated(tmp_path: Path, token: str) -> None:
    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            assert await code_of(meeting.begin(made, token)) is grpc.StatusCode.UNAUTHENTICATED

    meet(tmp_path, scenario)


@pytest.mark.parametrize("token", ["Bearer other", "setup", "Bearer setu", "Bearer setup2"])
def test_the_later_calls_need_the_token_of_the_first(tmp_path: Path, token: str) -> None:
    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            start = meeting.begin(made)
            await start.read()
            asked = meeting.call(
                made, "GetCsr", common.CertificateInfo(cert_hostname="g"), common.DerPayload, token
            )
            assert await code_of(asked) is grpc.StatusCode.UNAUTHENTICATED
            sent = meeting.call(made, "SendCert", common.CertBundle(), Empty, token)
            assert await code_of(sent) is grpc.StatusCode.UNAUTHENTICATED

    meet(tmp_path, scenario)


def test_without_a_start_no_call_is_answered(tmp_path: Path) -> None:
    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            for token in ("Bearer ", "Bearer setup", ""):
                asked = meeting.call(
                    made, "GetCsr", common.CertificateInfo(cert_hostname="g"), common.DerPayload, token
                )
                assert await code_of(asked) is grpc.StatusCode.UNAUTHENTICATED

    meet(tmp_path, scenario)


Spoil = Callable[[SecondGeneration, bytes], common.CertBundle]


def bundle(core: SecondGeneration, certificate: x509.Certificate, **members: x509.Certificate) -> Any:
    return common.CertBundle(
        component_cert_der=certificate.public_bytes(DER),
        ca_cert_der=members.get("ca", core.authority.ca).public_bytes(DER),
        core_client_cert_der=members.get("client", core.authority.client).public_bytes(DER),
    )


STRANGER = SecondGeneration(0)

BAD: dict[str, Spoil] = {
    "nothing": lambda _core, _request: common.CertBundle(),
    "for another key": lambda core, _request: bundle(
        core, core.authority.sign(certificates.make_request(certificates.make_key(), "g"))
    ),
    "of another CA": lambda core, request: bundle(core, STRANGER.authority.sign(request)),
    "core's of another CA": lambda core, request: bundle(
        core, core.authority.sign(request), client=STRANGER.authority.client
    ),
    "for a client": lambda core, request: bundle(
        core, core.authority.sign(request, usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    ),
    "core's for a server": lambda core, request: bundle(
        core, core.authority.sign(request), client=core.authority.sign(request)
    ),
    "expired": lambda core, request: bundle(core, core.authority.sign(request, lasts=timedelta(days=-1))),
    "by one that is no CA": lambda core, request: bundle(
        core, core.authority.sign(request), ca=core.authority.client
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_certificates_that_can_not_be_used_are_refused_and_not_kept(tmp_path: Path, what: str) -> None:
    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            start = meeting.begin(made)
            await start.read()
            metadata = (("authorization", "Bearer setup"), *VERSION_2)
            request = await meeting.core.get_csr(made, "127.0.0.1", metadata)
            sent = meeting.call(made, "SendCert", BAD[what](meeting.core, request), Empty, "Bearer setup")
            assert await code_of(sent) is grpc.StatusCode.INVALID_ARGUMENT
            assert certificates.load(meeting.folder) is None
            assert not meeting.adoption.adopted.done()
            # The same adoption may go on with better ones.
            await meeting.core.send_cert(made, meeting.core.authority.sign(request), metadata)
            assert meeting.adoption.adopted.done()

    meet(tmp_path, scenario)


def test_a_certificate_before_one_was_asked_for_is_refused(tmp_path: Path) -> None:
    async def scenario(meeting: Meeting) -> None:
        async with plain(meeting) as made:
            start = meeting.begin(made)
            await start.read()
            sent = meeting.call(made, "SendCert", common.CertBundle(), Empty, "Bearer setup")
            assert await code_of(sent) is grpc.StatusCode.FAILED_PRECONDITION

    meet(tmp_path, scenario)


# The files.


def held(folder: Path, core: SecondGeneration | None = None) -> Certificates:
    core = core or SecondGeneration(0)
    key = certificates.make_key()
    certificate = core.authority.sign(certificates.make_request(key, "g"))
    ders = [one.public_bytes(DER) for one in (certificate, core.authority.ca, core.authority.client)]
    found = certificates.check_bundle(key, ders[0], ders[1], ders[2], datetime.now(UTC))
    certificates.store(folder, found)
    return found


def test_certificates_that_defguards_gateway_left_are_taken_over(tmp_path: Path) -> None:
    made = held(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "gateway_grpc_cert.pem",
        "gateway_grpc_key.pem",
        "grpc_ca_cert.pem",
        "core_client_cert.pem",
    }
    assert certificates.load(tmp_path) == made
    assert "PRIVATE KEY" not in repr(made)


def test_certificates_given_as_credentials_are_kept_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, folder = tmp_path / "credentials", tmp_path / "state" / "certs"
    assert certificates.take_over(folder) is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    credentials.mkdir()
    assert certificates.take_over(folder) is None
    made = held(credentials)
    (credentials / certificates.KEY).chmod(0o440)  # as systemd shows an ACL
    assert certificates.take_over(folder) == made
    assert certificates.load(folder) == made


@pytest.mark.parametrize("missing", certificates.FILES)
def test_a_set_with_a_file_missing_is_no_adoption(tmp_path: Path, missing: str) -> None:
    held(tmp_path)
    (tmp_path / missing).unlink()
    assert certificates.load(tmp_path) is None


@pytest.mark.parametrize("mixed", [certificates.KEY, certificates.CERTIFICATE, certificates.CA])
def test_a_set_of_two_adoptions_mixed_is_none(tmp_path: Path, mixed: str) -> None:
    held(tmp_path / "a")
    held(tmp_path / "b")
    (tmp_path / "a" / mixed).replace(tmp_path / "b" / mixed)
    assert certificates.load(tmp_path / "b") is None


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    held(tmp_path)
    (tmp_path / certificates.KEY).chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        certificates.load(tmp_path)


def test_a_file_that_is_no_certificate_is_named_with_its_remedy(tmp_path: Path) -> None:
    held(tmp_path)
    (tmp_path / certificates.CA).write_text("nothing")
    with pytest.raises(ConfigError, match="adopt this gateway anew"):
        certificates.load(tmp_path)


def test_removing_leaves_what_is_somebody_elses(tmp_path: Path) -> None:
    held(tmp_path)
    (tmp_path / "other.pem").write_text("mine")
    certificates.remove(tmp_path)
    assert [path.name for path in tmp_path.glob("*.pem")] == ["other.pem"]
    certificates.remove(tmp_path)


def test_a_core_is_the_same_however_often_it_adopts_and_another_is_not(tmp_path: Path) -> None:
    core = SecondGeneration(0)
    first, again, other = held(tmp_path, core), held(tmp_path, core), held(tmp_path)
    assert first.certificate != again.certificate
    assert first.authority == again.authority != other.authority
