import datetime

from agent.core.defguard.wire import common_v2_pb2 as _common_v2_pb2
from agent.core.defguard.wire import firewall_v2_pb2 as _firewall_v2_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_TYPE_UNSPECIFIED: _ClassVar[UpdateType]
    UPDATE_TYPE_CREATE: _ClassVar[UpdateType]
    UPDATE_TYPE_MODIFY: _ClassVar[UpdateType]
    UPDATE_TYPE_DELETE: _ClassVar[UpdateType]
UPDATE_TYPE_UNSPECIFIED: UpdateType
UPDATE_TYPE_CREATE: UpdateType
UPDATE_TYPE_MODIFY: UpdateType
UPDATE_TYPE_DELETE: UpdateType

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
    __slots__ = ("name", "private_key", "port", "peers", "addresses", "firewall_config", "mtu", "fwmark")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_KEY_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    FIREWALL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    FWMARK_FIELD_NUMBER: _ClassVar[int]
    name: str
    private_key: str
    port: int
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    firewall_config: _firewall_v2_pb2.FirewallConfig
    mtu: int
    fwmark: int
    def __init__(self, name: _Optional[str] = ..., private_key: _Optional[str] = ..., port: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., addresses: _Optional[_Iterable[str]] = ..., firewall_config: _Optional[_Union[_firewall_v2_pb2.FirewallConfig, _Mapping]] = ..., mtu: _Optional[int] = ..., fwmark: _Optional[int] = ...) -> None: ...

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
    firewall_config: _firewall_v2_pb2.FirewallConfig
    disable_firewall: _empty_pb2.Empty
    def __init__(self, update_type: _Optional[_Union[UpdateType, str]] = ..., peer: _Optional[_Union[Peer, _Mapping]] = ..., network: _Optional[_Union[Configuration, _Mapping]] = ..., firewall_config: _Optional[_Union[_firewall_v2_pb2.FirewallConfig, _Mapping]] = ..., disable_firewall: _Optional[_Union[_empty_pb2.Empty, _Mapping]] = ...) -> None: ...

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
    latest_handshake: _timestamp_pb2.Timestamp
    allowed_ips: str
    def __init__(self, public_key: _Optional[str] = ..., endpoint: _Optional[str] = ..., upload: _Optional[int] = ..., download: _Optional[int] = ..., keepalive_interval: _Optional[int] = ..., latest_handshake: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., allowed_ips: _Optional[str] = ...) -> None: ...

class CoreResponse(_message.Message):
    __slots__ = ("id", "empty", "config", "update")
    ID_FIELD_NUMBER: _ClassVar[int]
    EMPTY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    id: int
    empty: _empty_pb2.Empty
    config: Configuration
    update: Update
    def __init__(self, id: _Optional[int] = ..., empty: _Optional[_Union[_empty_pb2.Empty, _Mapping]] = ..., config: _Optional[_Union[Configuration, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ...) -> None: ...

class CoreRequest(_message.Message):
    __slots__ = ("id", "peer_stats", "config_request")
    ID_FIELD_NUMBER: _ClassVar[int]
    PEER_STATS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: int
    peer_stats: PeerStats
    config_request: _empty_pb2.Empty
    def __init__(self, id: _Optional[int] = ..., peer_stats: _Optional[_Union[PeerStats, _Mapping]] = ..., config_request: _Optional[_Union[_empty_pb2.Empty, _Mapping]] = ...) -> None: ...
