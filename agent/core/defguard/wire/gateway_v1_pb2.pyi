from agent.core.defguard.wire import firewall_v1_pb2 as _firewall_v1_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CREATE: _ClassVar[UpdateType]
    MODIFY: _ClassVar[UpdateType]
    DELETE: _ClassVar[UpdateType]
CREATE: UpdateType
MODIFY: UpdateType
DELETE: UpdateType

class ConfigurationRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("pubkey", "allowed_ips", "preshared_key", "keepalive_interval")
    PUBKEY_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_IPS_FIELD_NUMBER: _ClassVar[int]
    PRESHARED_KEY_FIELD_NUMBER: _ClassVar[int]
    KEEPALIVE_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    pubkey: str
    allowed_ips: _containers.RepeatedScalarFieldContainer[str]
    preshared_key: str
    keepalive_interval: int
    def __init__(self, pubkey: _Optional[str] = ..., allowed_ips: _Optional[_Iterable[str]] = ..., preshared_key: _Optional[str] = ..., keepalive_interval: _Optional[int] = ...) -> None: ...

class Configuration(_message.Message):
    __slots__ = ("name", "prvkey", "port", "peers", "addresses", "firewall_config")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRVKEY_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    FIREWALL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    name: str
    prvkey: str
    port: int
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    firewall_config: _firewall_v1_pb2.FirewallConfig
    def __init__(self, name: _Optional[str] = ..., prvkey: _Optional[str] = ..., port: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., addresses: _Optional[_Iterable[str]] = ..., firewall_config: _Optional[_Union[_firewall_v1_pb2.FirewallConfig, _Mapping]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("update_type", "peer", "network", "firewall_config", "disable_firewall")
    UPDATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    FIREWALL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    DISABLE_FIREWALL_FIELD_NUMBER: _ClassVar[int]
    update_type: UpdateType
    peer: Peer
    network: Configuration
    firewall_config: _firewall_v1_pb2.FirewallConfig
    disable_firewall: _empty_pb2.Empty
    def __init__(self, update_type: _Optional[_Union[UpdateType, str]] = ..., peer: _Optional[_Union[Peer, _Mapping]] = ..., network: _Optional[_Union[Configuration, _Mapping]] = ..., firewall_config: _Optional[_Union[_firewall_v1_pb2.FirewallConfig, _Mapping]] = ..., disable_firewall: _Optional[_Union[_empty_pb2.Empty, _Mapping]] = ...) -> None: ...

class PeerStats(_message.Message):
    __slots__ = ("public_key", "endpoint", "upload", "download", "keepalive_interval", "latest_handshake", "allowed_ips")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    KEEPALIVE_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    LATEST_HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_IPS_FIELD_NUMBER: _ClassVar[int]
    public_key: str
    endpoint: str
    upload: int
    download: int
    keepalive_interval: int
    latest_handshake: int
    allowed_ips: str
    def __init__(self, public_key: _Optional[str] = ..., endpoint: _Optional[str] = ..., upload: _Optional[int] = ..., download: _Optional[int] = ..., keepalive_interval: _Optional[int] = ..., latest_handshake: _Optional[int] = ..., allowed_ips: _Optional[str] = ...) -> None: ...

class StatsUpdate(_message.Message):
    __slots__ = ("id", "empty", "peer_stats")
    ID_FIELD_NUMBER: _ClassVar[int]
    EMPTY_FIELD_NUMBER: _ClassVar[int]
    PEER_STATS_FIELD_NUMBER: _ClassVar[int]
    id: int
    empty: _empty_pb2.Empty
    peer_stats: PeerStats
    def __init__(self, id: _Optional[int] = ..., empty: _Optional[_Union[_empty_pb2.Empty, _Mapping]] = ..., peer_stats: _Optional[_Union[PeerStats, _Mapping]] = ...) -> None: ...
