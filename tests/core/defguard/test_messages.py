from typing import Any

import pytest

from agent.acl import Acl, AclRule, AddressRange, PortRange, SnatBinding, Verdict
from agent.core.defguard.connection import UNNAMED, location_of
from agent.core.defguard.firewall import Generation, read_firewall
from agent.core.defguard.messages import (
    AclPut,
    Configuration,
    LocationGone,
    LocationPut,
    PeerGone,
    PeerPut,
    read_configuration,
    read_peer,
    read_update,
    session_id,
)
from agent.core.defguard.wire import firewall_v1_pb2, firewall_v2_pb2, gateway_v1_pb2, gateway_v2_pb2
from agent.encoding import format_key, parse_interface_address
from agent.errors import InvalidMessage
from agent.model import NEVER, Grant, InterfaceSettings, Peer, UnreadablePeer
from tests.support.builders import key, prefixes, psk
from tests.support.defguard_core import jwt

WIRE: dict[Generation, Any] = {1: gateway_v1_pb2, 2: gateway_v2_pb2}
FIREWALL: dict[Generation, Any] = {1: firewall_v1_pb2, 2: firewall_v2_pb2}
both = pytest.mark.parametrize("generation", [1, 2])
DENY = {1: 1, 2: 2}
ALLOW = {1: 0, 2: 1}
V4 = {1: 0, 2: 1}
V6 = {1: 1, 2: 2}


def told(generation: Generation, number: int, **members: Any) -> Any:
    members = {"pubkey": format_key(key(number)), "allowed_ips": [f"10.8.0.{number}"], **members}
    return WIRE[generation].Peer(**members)


# Peers.


@both
def test_a_peer_with_a_psk_has_a_session_that_core_sets_no_end_to(generation: Generation) -> None:
    read = read_peer(told(generation, 1, preshared_key=format_key(psk(1).raw), keepalive_interval=25))
    session = Grant(session_id(key(1), psk(1)), psk(1), None, NEVER)
    assert read == Peer(key(1), prefixes("10.8.0.1/32"), persistent_keepalive=25, session=session)


@both
def test_a_peer_without_a_psk_needs_no_session(generation: Generation) -> None:
    assert read_peer(told(generation, 1)) == Peer(key(1), prefixes("10.8.0.1/32"), mfa_exempt=True)


def test_a_session_is_known_by_its_psk_and_its_peer() -> None:
    ids = {session_id(key(k), psk(p)) for k in (1, 2) for p in (1, 2)}
    assert len(ids) == 4
    assert session_id(key(1), psk(1)) in ids
    assert not any(psk(1).raw.hex() in one or format_key(psk(1).raw) in one for one in ids)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"allowed_ips": ["10.8.0.1/24"]}, "invalid_allowed_ips"),
        ({"allowed_ips": ["10.8.0.1", "x"]}, "invalid_allowed_ips"),
        ({"keepalive_interval": 65536}, "invalid_persistent_keepalive"),
    ],
)
def test_what_is_wrong_with_a_peer_refuses_that_peer(members: dict[str, Any], fault: str) -> None:
    read = read_peer(told(1, 1, preshared_key=format_key(psk(1).raw), **members))
    assert isinstance(read, Peer)
    assert read.fault == fault


def test_a_peer_without_a_readable_key_is_named_as_core_wrote_it() -> None:
    read = read_peer(told(1, 1, pubkey="\x1b[31mnot a key"))
    assert read == UnreadablePeer("\\x1b[31mnot a key", "invalid_public_key")  # type: ignore[arg-type]


# Configurations.


@both
def test_a_configuration_is_the_location_whole(generation: Generation) -> None:
    name = "prvkey" if generation == 1 else "private_key"
    message = WIRE[generation].Configuration(
        name="hq", port=51820, addresses=["10.8.0.1/24", "fd00::1/64"], peers=[told(generation, 1)]
    )
    setattr(message, name, format_key(bytes(range(32))))
    read = read_configuration(message, generation)
    addresses = tuple(map(parse_interface_address, ("10.8.0.1/24", "fd00::1/64")))
    assert read.interface == InterfaceSettings(addresses, 51820)
    assert (read.name, read.acl, len(read.peers)) == ("hq", None, 1)
    assert read.identity is not None
    assert read.identity.private_key == bytes(range(32))


def test_the_second_generation_brings_mtu_and_fwmark_and_zero_leaves_them_alone() -> None:
    message = gateway_v2_pb2.Configuration(name="hq", mtu=1380, fwmark=7)
    assert read_configuration(message, 2).interface == InterfaceSettings(None, None, 1380, 7)
    assert read_configuration(gateway_v2_pb2.Configuration(), 2).interface == InterfaceSettings()


@pytest.mark.parametrize(
    "members",
    [
        {"mtu": 575},
        {"mtu": 65536},
        {"port": 65536},
        {"addresses": ["10.8.0.300/24"]},
        {"private_key": "secret"},
    ],
)
def test_a_setting_that_no_interface_can_have_refuses_the_configuration(members: dict[str, Any]) -> None:
    with pytest.raises(InvalidMessage) as caught:
        read_configuration(gateway_v2_pb2.Configuration(name="hq", **members), 2)
    assert "secret" not in str(caught.value)


# Updates.


@both
def test_updates_are_read_by_the_numbers_of_their_generation(generation: Generation) -> None:
    wire, first = WIRE[generation], 0 if generation == 1 else 1
    peer = told(generation, 1)
    for number in (first, first + 1):
        assert isinstance(read_update(wire.Update(update_type=number, peer=peer), generation), PeerPut)
    gone = wire.Update(update_type=first + 2, peer=wire.Peer(pubkey=format_key(key(1))))
    assert read_update(gone, generation) == PeerGone(key(1))
    network = wire.Configuration(name="hq")
    put = read_update(wire.Update(update_type=first + 1, network=network), generation)
    assert put == LocationPut(Configuration("hq", None, InterfaceSettings(), ()))
    assert read_update(wire.Update(update_type=first + 2, network=network), generation) == LocationGone()
    config = FIREWALL[generation].FirewallConfig(default_policy=DENY[generation])
    rules = wire.Update(update_type=first + 1, firewall_config=config)
    assert read_update(rules, generation) == AclPut(Acl(Verdict.DROP))
    none = wire.Update(update_type=first + 2)
    none.disable_firewall.SetInParent()
    assert read_update(none, generation) == AclPut(None)


@both
@pytest.mark.parametrize("what", ["type", "nothing", "peer", "gone"])
def test_an_update_that_can_not_be_read_is_no_update(generation: Generation, what: str) -> None:
    wire, first = WIRE[generation], 0 if generation == 1 else 1
    update = {
        "type": wire.Update(update_type=first + 7, peer=told(generation, 1)),
        "nothing": wire.Update(update_type=first),
        "peer": wire.Update(update_type=first, peer=wire.Peer(pubkey="x")),
        "gone": wire.Update(update_type=first + 2, peer=wire.Peer(pubkey="")),
    }[what]
    with pytest.raises(InvalidMessage):
        read_update(update, generation)


def test_an_update_without_a_type_is_none_in_the_second_generation() -> None:
    with pytest.raises(InvalidMessage, match="unknown type"):
        read_update(gateway_v2_pb2.Update(peer=told(2, 1)), 2)


# Access rules.


def address(generation: Generation, **members: Any) -> Any:
    wire = FIREWALL[generation]
    if "ip_range" in members:
        start, end = members["ip_range"]
        return wire.IpAddress(ip_range=wire.IpRange(start=start, end=end))
    return wire.IpAddress(**members)


def rule(generation: Generation, **members: Any) -> Any:
    members = {"id": 1, "verdict": ALLOW[generation], "ip_version": V4[generation], **members}
    return FIREWALL[generation].FirewallRule(**members)


def read(generation: Generation, *rules: Any, **members: Any) -> Acl:
    members = {"default_policy": DENY[generation], **members}
    return read_firewall(FIREWALL[generation].FirewallConfig(rules=rules, **members), generation)


@both
def test_a_rule_is_read_whole(generation: Generation) -> None:
    wire = FIREWALL[generation]
    acl = read(
        generation,
        rule(
            generation,
            id=132,
            source_addrs=[address(generation, ip="10.8.0.5")],
            destination_addrs=[
                address(generation, ip_subnet="10.1.1.7/24"),
                address(generation, ip_range=("10.2.0.1", "10.2.0.9")),
            ],
            destination_ports=[
                wire.Port(single_port=443),
                wire.Port(port_range=wire.PortRange(start=8000, end=8080)),
            ],
            protocols=[6, 17, 6],
            comment='staff "Berlin"',
        ),
        snat_bindings=[
            wire.SnatBinding(id=5, source_addrs=[address(generation, ip="10.8.0.5")], public_ip="192.0.2.1")
        ],
    )
    host = AddressRange(b"\x0a\x08\x00\x05", b"\x0a\x08\x00\x05")
    [one] = acl.rules
    assert one == AclRule(
        132,
        4,
        Verdict.ACCEPT,
        (host,),
        (
            AddressRange(b"\x0a\x01\x01\x00", b"\x0a\x01\x01\xff"),
            AddressRange(b"\x0a\x02\x00\x01", b"\x0a\x02\x00\x09"),
        ),
        (PortRange(443, 443), PortRange(8000, 8080)),
        (6, 17),
        'staff "Berlin"',
    )
    assert acl.snat == (SnatBinding(5, (host,), b"\xc0\x00\x02\x01"),)
    assert acl.default is Verdict.DROP


@both
def test_fault_13_a_rule_meant_for_one_ip_version_opens_nothing_of_the_other(generation: Generation) -> None:
    # What an administrator wrote with IPv4 destinations: a rule that allows and one that denies, each twice.
    allowed, denied = (
        {"id": 1, "verdict": verdict[generation], "comment": comment}
        for verdict, comment in ((ALLOW, "ACL 1 allow"), (DENY, "ACL 1 deny"))
    )
    sources, destinations = [address(generation, ip="10.8.0.5")], [address(generation, ip="10.1.1.7")]
    six = {"ip_version": V6[generation]}
    acl = read(
        generation,
        rule(generation, **allowed, source_addrs=sources, destination_addrs=destinations),
        rule(generation, **allowed, **six, source_addrs=[address(generation, ip="fd00::5")]),
        rule(generation, **denied, destination_addrs=destinations),
        rule(generation, **denied, **six),
        default_policy=ALLOW[generation],
    )
    # The denial has no sources: it is for all whom the rule before has not let through.
    assert [(one.verdict, one.version, len(one.sources)) for one in acl.rules] == [
        (Verdict.ACCEPT, 4, 1),
        (Verdict.DROP, 4, 0),
    ]


@both
def test_an_allowance_for_sources_of_one_ip_version_opens_nothing_to_all_of_the_other(
    generation: Generation,
) -> None:
    sources, six = [address(generation, ip="10.8.0.5")], {"ip_version": V6[generation]}
    acl = read(generation, rule(generation, source_addrs=sources), rule(generation, **six))
    assert [one.version for one in acl.rules] == [4]


@both
def test_rules_of_the_same_number_and_another_name_do_not_concern_each_other(generation: Generation) -> None:
    destinations, six = [address(generation, ip="10.1.1.7")], {"ip_version": V6[generation]}
    acl = read(
        generation,
        rule(generation, comment="ACL 5", destination_addrs=destinations),
        rule(generation, comment="destination 5"),
        rule(generation, **six, comment="destination 5"),
    )
    assert [(one.comment, one.version) for one in acl.rules] == [
        ("ACL 5", 4),
        ("destination 5", 4),
        ("destination 5", 6),
    ]


@both
def test_access_rules_that_can_not_be_read_are_told_as_such(generation: Generation) -> None:
    wire = WIRE[generation]
    broken = FIREWALL[generation].FirewallConfig(
        default_policy=DENY[generation], rules=[rule(generation, protocols=[0])]
    )
    told_alone = read_update(
        wire.Update(update_type=0 if generation == 1 else 1, firewall_config=broken), generation
    )
    assert isinstance(told_alone, AclPut)
    assert told_alone.fault is not None
    configuration = read_configuration(wire.Configuration(name="hq", firewall_config=broken), generation)
    assert (configuration.acl, configuration.acl_fault is None) == (None, False)


BROKEN: dict[str, dict[str, Any]] = {
    "no address": {"source_addrs": [{}]},
    "an address that is none": {"source_addrs": [{"ip": "10.8.0.300"}]},
    "an address of the other version": {"source_addrs": [{"ip": "fd00::1"}]},
    "a range that goes back": {"destination_addrs": [{"ip_range": ("10.2.0.9", "10.2.0.1")}]},
    "a range of two versions": {"destination_addrs": [{"ip_range": ("10.2.0.9", "fd00::1")}]},
    "a subnet that is none": {"destination_addrs": [{"ip_subnet": "10.0.0.0/33"}]},
    "port 0": {"destination_ports": [{"single_port": 0}]},
    "a port above 65535": {"destination_ports": [{"single_port": 65536}]},
    "no port": {"destination_ports": [{}]},
    "another protocol": {"protocols": [0]},
}


@both
@pytest.mark.parametrize("what", BROKEN)
def test_a_rule_that_can_not_be_read_refuses_all(generation: Generation, what: str) -> None:
    wire, members = FIREWALL[generation], dict(BROKEN[what])
    for name in ("source_addrs", "destination_addrs"):
        if name in members:
            members[name] = [address(generation, **one) for one in members[name]]
    if "destination_ports" in members:
        members["destination_ports"] = [wire.Port(**one) for one in members["destination_ports"]]
    with pytest.raises(InvalidMessage, match="rules in force stay"):
        read(generation, rule(generation), rule(generation, **members))


def test_a_policy_or_version_that_is_not_said_refuses_all() -> None:
    with pytest.raises(InvalidMessage):
        read(2, default_policy=0)
    with pytest.raises(InvalidMessage):
        read(2, rule(2, ip_version=0))
    with pytest.raises(InvalidMessage):
        read(2, rule(2, verdict=0))


@both
def test_an_snat_binding_without_sources_refuses_all(generation: Generation) -> None:
    wire = FIREWALL[generation]
    with pytest.raises(InvalidMessage, match="without sources"):
        read(generation, snat_bindings=[wire.SnatBinding(id=1, public_ip="192.0.2.1")])


# Tokens.


def test_the_location_is_the_number_in_the_tokens_subject() -> None:
    assert location_of(jwt(42)) == "42"


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "a.e30.c", "a.bnVsbA.c", "..", jwt(42)[5:-80]])
def test_a_token_that_does_not_say_is_of_a_location_without_a_name(token: str) -> None:
    assert location_of(token) == UNNAMED
