"""What an administrator may ask for, as the admin API's bodies and ``Directory``'s arguments."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Name = Annotated[str, Meta(min_length=1, max_length=64)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Mtu = Annotated[int, Meta(ge=576, le=65535)]
Mark = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
WholeSeconds = Annotated[int, Meta(ge=1)]
Keepalive = Annotated[int, Meta(ge=0, le=65535)]
Liveness = Literal["gateway", "core"]


class LocationPatch(Struct, kw_only=True, forbid_unknown_fields=True):
    """Members to change; absent ones stay, null takes an optional one away.

    ``addresses``: the gateway's own addresses with their networks, from which devices get theirs.
    ``endpoint`` (HOST:PORT) and ``server_public_key`` are what clients are told of the gateway,
    ``routes`` the prefixes that they send into the tunnel (the networks of ``addresses`` if
    empty). Timeouts are in seconds.
    """

    mfa_required: bool | UnsetType = UNSET
    addresses: list[str] | UnsetType = UNSET
    listen_port: Port | UnsetType | None = UNSET
    mtu: Mtu | UnsetType | None = UNSET
    fwmark: Mark | UnsetType | None = UNSET
    idle_timeout: WholeSeconds | UnsetType = UNSET
    connect_timeout: WholeSeconds | UnsetType = UNSET
    max_lifetime: WholeSeconds | UnsetType = UNSET
    liveness: Liveness | UnsetType = UNSET
    endpoint: str | UnsetType | None = UNSET
    server_public_key: str | UnsetType | None = UNSET
    routes: list[str] | UnsetType = UNSET


class LocationSpec(LocationPatch, kw_only=True, forbid_unknown_fields=True):
    """A new location. MFA is required unless said otherwise."""

    name: Name


class UserSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """A new user; ``email`` is where codes go."""

    name: Name
    email: Annotated[str, Meta(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$")] | None = None


class DeviceSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """A new device. Without ``allowed_ips`` it gets one free address of each of the location's networks.

    ``user`` may be absent for a device that belongs to nobody, such as a site router.
    ``preshared_key`` is the static PSK used while no session is needed.
    """

    location: Name
    name: Name
    public_key: str
    user: Name | None = None
    allowed_ips: list[str] = []
    persistent_keepalive: Keepalive = 25
    mfa_exempt: bool = False
    preshared_key: str | None = None

    def __repr__(self) -> str:
        return f"DeviceSpec({self.name!r})"


class DevicePatch(Struct, kw_only=True, forbid_unknown_fields=True):
    """Members of a device to change; absent ones stay."""

    name: Name | UnsetType = UNSET
    allowed_ips: Annotated[list[str], Meta(min_length=1)] | UnsetType = UNSET
    persistent_keepalive: Keepalive | UnsetType = UNSET
    mfa_exempt: bool | UnsetType = UNSET
    preshared_key: str | UnsetType | None = UNSET

    def __repr__(self) -> str:
        return "DevicePatch(…)"


class RenewSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """``lifetime``: seconds from now, cut to the location's ceiling. ``rotate``: a new PSK as well."""

    lifetime: Annotated[float, Meta(gt=0)]
    rotate: bool = False
