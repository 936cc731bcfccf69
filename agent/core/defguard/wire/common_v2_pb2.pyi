from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class CertificateInfo(_message.Message):
    __slots__ = ("cert_hostname",)
    CERT_HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    cert_hostname: str
    def __init__(self, cert_hostname: _Optional[str] = ...) -> None: ...

class DerPayload(_message.Message):
    __slots__ = ("der_data",)
    DER_DATA_FIELD_NUMBER: _ClassVar[int]
    der_data: bytes
    def __init__(self, der_data: _Optional[bytes] = ...) -> None: ...

class CertBundle(_message.Message):
    __slots__ = ("component_cert_der", "ca_cert_der", "core_client_cert_der")
    COMPONENT_CERT_DER_FIELD_NUMBER: _ClassVar[int]
    CA_CERT_DER_FIELD_NUMBER: _ClassVar[int]
    CORE_CLIENT_CERT_DER_FIELD_NUMBER: _ClassVar[int]
    component_cert_der: bytes
    ca_cert_der: bytes
    core_client_cert_der: bytes
    def __init__(self, component_cert_der: _Optional[bytes] = ..., ca_cert_der: _Optional[bytes] = ..., core_client_cert_der: _Optional[bytes] = ...) -> None: ...

class LogEntry(_message.Message):
    __slots__ = ("level", "target", "message", "timestamp", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    level: str
    target: str
    message: str
    timestamp: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, level: _Optional[str] = ..., target: _Optional[str] = ..., message: _Optional[str] = ..., timestamp: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...
