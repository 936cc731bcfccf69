from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class IpVersion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IPV4: _ClassVar[IpVersion]
    IPV6: _ClassVar[IpVersion]

class FirewallPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALLOW: _ClassVar[FirewallPolicy]
    DENY: _ClassVar[FirewallPolicy]

class Protocol(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INVALID: _ClassVar[Protocol]
    ICMP: _ClassVar[Protocol]
    TCP: _ClassVar[Protocol]
    UDP: _ClassVar[Protocol]
IPV4: IpVersion
IPV6: IpVersion
ALLOW: FirewallPolicy
DENY: FirewallPolicy
INVALID: Protocol
ICMP: Protocol
TCP: Protocol
UDP: Protocol

class IpRange(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: str
    end: str
    def __init__(self, start: _Optional[str] = ..., end: _Optional[str] = ...) -> None: ...

class IpAddress(_message.Message):
    __slots__ = ("ip", "ip_range", "ip_subnet")
    IP_FIELD_NUMBER: _ClassVar[int]
    IP_RANGE_FIELD_NUMBER: _ClassVar[int]
    IP_SUBNET_FIELD_NUMBER: _ClassVar[int]
    ip: str
    ip_range: IpRange
    ip_subnet: str
    def __init__(self, ip: _Optional[str] = ..., ip_range: _Optional[_Union[IpRange, _Mapping]] = ..., ip_subnet: _Optional[str] = ...) -> None: ...

class PortRange(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Port(_message.Message):
    __slots__ = ("single_port", "port_range")
    SINGLE_PORT_FIELD_NUMBER: _ClassVar[int]
    PORT_RANGE_FIELD_NUMBER: _ClassVar[int]
    single_port: int
    port_range: PortRange
    def __init__(self, single_port: _Optional[int] = ..., port_range: _Optional[_Union[PortRange, _Mapping]] = ...) -> None: ...

class FirewallRule(_message.Message):
    __slots__ = ("id", "source_addrs", "destination_addrs", "destination_ports", "protocols", "verdict", "comment", "ip_version")
    ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRS_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_ADDRS_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_PORTS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOLS_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    IP_VERSION_FIELD_NUMBER: _ClassVar[int]
    id: int
    source_addrs: _containers.RepeatedCompositeFieldContainer[IpAddress]
    destination_addrs: _containers.RepeatedCompositeFieldContainer[IpAddress]
    destination_ports: _containers.RepeatedCompositeFieldContainer[Port]
    protocols: _containers.RepeatedScalarFieldContainer[Protocol]
    verdict: FirewallPolicy
    comment: str
    ip_version: IpVersion
    def __init__(self, id: _Optional[int] = ..., source_addrs: _Optional[_Iterable[_Union[IpAddress, _Mapping]]] = ..., destination_addrs: _Optional[_Iterable[_Union[IpAddress, _Mapping]]] = ..., destination_ports: _Optional[_Iterable[_Union[Port, _Mapping]]] = ..., protocols: _Optional[_Iterable[_Union[Protocol, str]]] = ..., verdict: _Optional[_Union[FirewallPolicy, str]] = ..., comment: _Optional[str] = ..., ip_version: _Optional[_Union[IpVersion, str]] = ...) -> None: ...

class SnatBinding(_message.Message):
    __slots__ = ("id", "source_addrs", "public_ip", "comment")
    ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_IP_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    id: int
    source_addrs: _containers.RepeatedCompositeFieldContainer[IpAddress]
    public_ip: str
    comment: str
    def __init__(self, id: _Optional[int] = ..., source_addrs: _Optional[_Iterable[_Union[IpAddress, _Mapping]]] = ..., public_ip: _Optional[str] = ..., comment: _Optional[str] = ...) -> None: ...

class FirewallConfig(_message.Message):
    __slots__ = ("default_policy", "rules", "snat_bindings")
    DEFAULT_POLICY_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    SNAT_BINDINGS_FIELD_NUMBER: _ClassVar[int]
    default_policy: FirewallPolicy
    rules: _containers.RepeatedCompositeFieldContainer[FirewallRule]
    snat_bindings: _containers.RepeatedCompositeFieldContainer[SnatBinding]
    def __init__(self, default_policy: _Optional[_Union[FirewallPolicy, str]] = ..., rules: _Optional[_Iterable[_Union[FirewallRule, _Mapping]]] = ..., snat_bindings: _Optional[_Iterable[_Union[SnatBinding, _Mapping]]] = ...) -> None: ...
