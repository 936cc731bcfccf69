import contextlib
import socket
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.errors import DeviceError
from agent.model import (
    KEEP,
    AddPeer,
    CutPeer,
    DeviceConfig,
    Endpoint,
    ObservedPeer,
    Operation,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)
from agent.wireguard import uapi
from tests.wireguard.strategies import observed_peers, operations

A, PSK = PublicKey(b"\xaa" * 32), PresharedKey(b"\xbb" * 32)
V4, V6 = Prefix(bytes([10, 0, 0, 0]), 8), Prefix(bytes([0xFD, *bytes(15)]), 64)
ZEROS = "00" * 32


def encode(todo: Iterable[Operation]) -> list[str]:
    requests = [r.decode() for r in uapi.encode_operations(todo, lambda size: b"\xcc" * size)]
    for request in requests:
        assert request.startswith("set=1\n")
        assert request.endswith("\n\n")
        assert "\n\n" not in request[:-2]
    return requests


def lines(operation: Operation) -> list[str]:
    (request,) = encode([operation])
    head, key, *rest = request.removesuffix("\n\n").split("\n")
    assert (head, key) == ("set=1", f"public_key={'aa' * 32}")
    return rest


def test_an_added_peer_replaces_whatever_was_there() -> None:
    assert lines(AddPeer(A, PSK, (V4, V6))) == [
        f"preshared_key={'bb' * 32}",
        "replace_allowed_ips=true",
        "allowed_ip=10.0.0.0/8",
        "allowed_ip=fd00::/64",
    ]
    assert lines(AddPeer(A, None, ())) == [f"preshared_key={ZEROS}", "replace_allowed_ips=true"]


def test_a_removed_peer_is_named_and_flagged() -> None:
    assert lines(RemovePeer(A)) == ["remove=true"]


def test_a_cut_peer_gets_a_random_psk_and_loses_its_allowed_ips_only_if_it_is_there() -> None:
    assert lines(CutPeer(A)) == [
        "update_only=true",
        f"preshared_key={'cc' * 32}",
        "replace_allowed_ips=true",
    ]


def test_an_update_says_only_what_changes() -> None:
    only = "update_only=true"
    assert lines(UpdatePeer(A, KEEP, KEEP, True, KEEP)) == [only]
    assert lines(UpdatePeer(A, PSK, KEEP, False, KEEP)) == [only, f"preshared_key={'bb' * 32}"]
    assert lines(UpdatePeer(A, None, KEEP, False, KEEP)) == [only, f"preshared_key={ZEROS}"]
    keepalive = "persistent_keepalive_interval=25"
    assert lines(UpdatePeer(A, KEEP, KEEP, False, 25)) == [only, keepalive]
    assert lines(UpdatePeer(A, KEEP, (V4,), False, KEEP)) == [only, "allowed_ip=10.0.0.0/8"]
    replace = "replace_allowed_ips=true"
    assert lines(UpdatePeer(A, KEEP, (V4,), True, KEEP)) == [only, replace, "allowed_ip=10.0.0.0/8"]
    assert lines(UpdatePeer(A, KEEP, (), True, KEEP)) == [only, replace]


@given(st.lists(operations, max_size=30))
def test_the_order_is_kept(todo: list[Operation]) -> None:
    keys = [
        line.removeprefix("public_key=")
        for request in encode(todo)
        for line in request.split("\n")
        if line.startswith("public_key=")
    ]
    assert keys == [operation.public_key.hex() for operation in todo]


def test_many_operations_go_into_several_requests() -> None:
    requests = encode(AddPeer(PublicKey(i.to_bytes(32, "big")), PSK, (V4,)) for i in range(2000))
    assert len(requests) > 4
    assert all(len(request) <= uapi.MAX_SIZE + 10 for request in requests)
    assert sum(request.count("public_key=") for request in requests) == 2000


def test_nothing_to_do_is_no_request() -> None:
    assert encode([]) == []


def test_only_settings_that_are_given_are_sent() -> None:
    assert uapi.encode_config(DeviceConfig()) == b"set=1\n\n"
    assert uapi.encode_config(DeviceConfig(b"\x01" * 32, 51820, 0)) == (
        f"set=1\nprivate_key={'01' * 32}\nlisten_port=51820\nfwmark=0\n\n".encode()
    )


def endpoint_text(endpoint: Endpoint) -> str:
    packed, port, scope = endpoint
    if len(packed) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, packed)}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, packed)}{f'%{scope}' if scope else ''}]:{port}"


def peer_lines(peer: ObservedPeer) -> list[str]:
    seconds = int(peer.latest_handshake)
    nanoseconds = round((peer.latest_handshake - seconds) * 1e9)
    psk = bytes(32) if peer.preshared_key is None else peer.preshared_key.raw
    return [
        f"public_key={peer.public_key.hex()}",
        f"preshared_key={psk.hex()}",
        "protocol_version=1",
        *([f"endpoint={endpoint_text(peer.endpoint)}"] if peer.endpoint else []),
        f"last_handshake_time_sec={seconds}",
        f"last_handshake_time_nsec={nanoseconds}",
        f"tx_bytes={peer.tx_bytes}",
        f"rx_bytes={peer.rx_bytes}",
        f"persistent_keepalive_interval={peer.persistent_keepalive}",
        *(f"allowed_ip={prefix}" for prefix in peer.allowed_ips),
    ]


def answer(*text: str) -> bytes:
    return ("\n".join((*text, "errno=0")) + "\n\n").encode()


@given(st.lists(observed_peers(), max_size=4, unique_by=lambda peer: peer.public_key))
def test_peers_are_read_as_they_were_written(peers: list[ObservedPeer]) -> None:
    text = [line for peer in peers for line in peer_lines(peer)]
    seen = uapi.decode(answer("listen_port=7", *text))
    assert seen.config == DeviceConfig(None, 7, 0)
    assert list(seen.peers) == [peer.public_key for peer in peers]
    for peer in peers:
        found = seen.peers[peer.public_key]
        assert abs(found.latest_handshake - peer.latest_handshake) < 1e-3
        assert found == peer._replace(latest_handshake=found.latest_handshake)


def test_the_settings_of_a_device_are_read_and_unknown_keys_are_skipped() -> None:
    key = "01" * 32
    text = [f"private_key={key}", f"own_public_key={key}", "listen_port=51820", "fwmark=42", "x=y"]
    assert uapi.decode(answer(*text)).config == DeviceConfig(bytes.fromhex(key), 51820, 42)
    assert uapi.decode(answer(f"private_key={ZEROS}")).config == DeviceConfig(None, 0, 0)
    assert uapi.decode(answer()) == uapi.Answer(DeviceConfig(None, 0, 0), {})


def test_a_scope_that_is_a_name_is_not_kept() -> None:
    text = [f"public_key={A.hex()}", "endpoint=[fe80::1%eth0]:5"]
    (peer,) = uapi.decode(answer(*text)).peers.values()
    assert peer.endpoint == Endpoint(bytes([0xFE, 0x80, *bytes(13), 1]), 5)


@pytest.mark.parametrize(
    "line",
    [
        "preshared_key=zz",
        f"preshared_key={' ' * 64}",
        "allowed_ip=10.0.0.0/33",
        "allowed_ip=10.0.0.0",
        "allowed_ip=10.0.0/8",
        "allowed_ip=fd00::/129",
        "endpoint=10.0.0.1",
        "endpoint=10.0.0.1:65536",
        "endpoint=[::1:5",
        "persistent_keepalive_interval=-1",
        "persistent_keepalive_interval=65536",
        "rx_bytes=1_0",
        "rx_bytes=\u0661",
        "tx_bytes=99999999999999999999999999",
        "last_handshake_time_sec=",
    ],
)
def test_a_value_that_is_none_is_refused_whole(line: str) -> None:
    with pytest.raises(DeviceError, match="can't be read"):
        uapi.decode(answer(f"public_key={A.hex()}", line))


@pytest.mark.parametrize("line", ["private_key=1", "listen_port=65536", "fwmark=x", "public_key=1"])
def test_a_setting_that_is_none_is_refused_whole(line: str) -> None:
    with pytest.raises(DeviceError, match="can't be read"):
        uapi.decode(answer(line))


@pytest.mark.parametrize(
    ("text", "code"),
    [(b"errno=0\n\n", 0), (b"errno=-22\n\n", 22), (b"errno=98\n\n", 98), (b"x=1\nerrno=5\n\n", 5)],
)
def test_the_errno_of_an_answer_is_read(text: bytes, code: int) -> None:
    assert uapi.decode_errno(text) == code


@pytest.mark.parametrize("text", [b"", b"\n\n", b"errno=\n\n", b"errno=x\n\n", b"errno=\xff\n\n"])
def test_an_answer_without_an_errno_is_refused(text: bytes) -> None:
    with pytest.raises(DeviceError, match="errno"):
        uapi.decode_errno(text)


@given(st.binary(max_size=200))
@example(b"\xff")
@example(b"public_key=\n")
def test_arbitrary_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    for decode in (uapi.decode, uapi.decode_errno):
        for text in (data, f"public_key={A.hex()}\n".encode() + data):
            with contextlib.suppress(DeviceError):
                decode(text)


@given(st.text(alphabet="publickeyrvtsndox_=[]%:./\n0123456789af", max_size=120))
def test_arbitrary_lines_are_read_or_refused_and_nothing_else(text: str) -> None:
    with contextlib.suppress(DeviceError):
        uapi.decode(f"public_key={A.hex()}\n{text}".encode())
