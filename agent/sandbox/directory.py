"""Locations, users and devices: who may have access, and each change of it as an event."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from msgspec import UNSET, UnsetType

from agent.encoding import (
    clean_name,
    parse_interface_address,
    parse_prefix,
    parse_preshared_key,
    parse_public_key,
)
from agent.sandbox import config, specs
from agent.sandbox.addresses import AddressPlan, networks
from agent.sandbox.errors import Refusal
from agent.sandbox.liveness import Announced, sent_policy
from agent.sandbox.store import Store, session_object

_INTERFACE: Final = ("addresses", "listen_port", "mtu", "fwmark")
_POLICY: Final = ("idle_timeout", "connect_timeout", "max_lifetime", "liveness")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Location:
    """A location. ``interface`` and ``policy`` are as gateways get them; times in seconds."""

    id: int
    name: str
    mfa_required: bool
    epoch: str
    revision: int
    interface: dict[str, Any]
    policy: dict[str, Any]
    endpoint: str | None
    server_public_key: str | None
    routes: list[str]

    @property
    def client_routes(self) -> list[str]:
        """The prefixes that a client sends into the tunnel."""
        return self.routes or [str(n) for n in networks(self.interface.get("addresses", []))]

    def message(self) -> dict[str, Any]:
        """The members of a snapshot and of ``location_changed`` that describe the location."""
        return {
            "location": {
                "id": str(self.id),
                "name": self.name,
                "mfa_required": self.mfa_required,
            },
            "interface": self.interface,
            "session_policy": self.policy,
        }


@dataclass(frozen=True, slots=True)
class User:
    """A user; ``methods`` are those of ``totp`` and ``email`` that work for them."""

    id: int
    name: str
    email: str | None
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Device:
    """A device of one location: a peer, whether it has access or not."""

    id: int
    user_id: int | None
    location_id: int
    name: str
    public_key: str
    allowed_ips: list[str]
    persistent_keepalive: int
    mfa_exempt: bool
    has_preshared_key: bool


def peer_message(row: sqlite3.Row, session: dict[str, Any] | None) -> dict[str, Any]:
    """Return a device's row as the protocol's peer."""
    return {
        "public_key": row["public_key"],
        "name": row["name"],
        "allowed_ips": json.loads(row["allowed_ips"]),
        "persistent_keepalive": row["persistent_keepalive"],
        "mfa_exempt": bool(row["mfa_exempt"]),
        "preshared_key": row["preshared_key"],
        "session": session,
    }


class Directory:
    """Reads and changes locations, users and devices. Every refused request raises Refusal."""

    def __init__(self, store: Store, defaults: config.Sessions, shared: frozenset[str] = frozenset()) -> None:
        """``defaults``: the session policy of a location that is created without one.

        ``shared``: names of the locations that several gateways serve, where core judges liveness
        whatever the policy says.
        """
        self._store = store
        self._defaults = defaults
        self._shared = shared
        self._announced = Announced(store)

    def announce_liveness(self) -> None:
        """Tell gateways who judges liveness where that has changed with the configuration."""
        with self._store.transaction():
            for location in self.locations():
                if self._announced.differs(location.id, location.policy["liveness"]):
                    self._store.append(location.id, "location_changed", location.message())
                    self._announced.note(location.id, location.policy["liveness"])

    def locations(self) -> list[Location]:
        """Return all locations."""
        return [self._location(row) for row in self._store.rows("SELECT * FROM locations ORDER BY id")]

    def location(self, name: str) -> Location:
        """Return a location by name."""
        return self._location(self._location_row(name))

    def location_by_id(self, location_id: int) -> Location:
        """Return a location by its number."""
        row = self._store.row("SELECT * FROM locations WHERE id = ?", location_id)
        if row is None:
            raise Refusal(404, "unknown_location", "There is no such location.")
        return self._location(row)

    def add_location(self, spec: specs.LocationSpec) -> Location:
        """Create a location, with an epoch of its own at revision 1."""
        _check_location(spec)
        policy = {
            "idle_timeout": self._defaults.idle_timeout,
            "connect_timeout": self._defaults.connect_timeout,
            "max_lifetime": self._defaults.max_lifetime,
            "liveness": "gateway",
        }
        try:
            location_id = self._store.insert(
                "INSERT INTO locations (name, mfa_required, epoch, revision, interface, policy,"
                " endpoint, server_public_key, routes) VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?)",
                spec.name,
                _or(spec.mfa_required, True),
                secrets.token_hex(4),
                json.dumps(_merged({}, spec, _INTERFACE)),
                json.dumps(_merged(policy, spec, _POLICY)),
                _or(spec.endpoint, None),
                _or(spec.server_public_key, None),
                json.dumps(_or(spec.routes, [])),
            )
        except sqlite3.IntegrityError:
            raise Refusal(409, "location_exists", f"There is a location {spec.name!r} already.") from None
        location = self.location_by_id(location_id)
        self._announced.note(location.id, location.policy["liveness"])
        return location

    def change_location(self, name: str, patch: specs.LocationPatch) -> Location:
        """Change a location; gateways hear of what concerns them as ``location_changed``."""
        _check_location(patch)
        with self._store.transaction():
            before = self.location(name)
            policy = json.loads(self._location_row(name)["policy"])
            self._store.execute(
                "UPDATE locations SET mfa_required = ?, interface = ?, policy = ?, endpoint = ?,"
                " server_public_key = ?, routes = ? WHERE id = ?",
                _or(patch.mfa_required, before.mfa_required),
                json.dumps(_merged(before.interface, patch, _INTERFACE)),
                json.dumps(_merged(policy, patch, _POLICY)),
                _or(patch.endpoint, before.endpoint),
                _or(patch.server_public_key, before.server_public_key),
                json.dumps(_or(patch.routes, before.routes)),
                before.id,
            )
            after = self.location(name)
            if after.message() != before.message():
                self._store.append(before.id, "location_changed", after.message())
                self._announced.note(after.id, after.policy["liveness"])
        return self.location(name)

    def users(self) -> list[User]:
        """Return all users."""
        return [_user(row) for row in self._store.rows("SELECT * FROM users ORDER BY id")]

    def user(self, name: str) -> User:
        """Return a user by name."""
        row = self._store.row("SELECT * FROM users WHERE name = ?", name)
        if row is None:
            raise Refusal(404, "unknown_user", f"There is no user {clean_name(name)!r}.")
        return _user(row)

    def add_user(self, spec: specs.UserSpec) -> User:
        """Create a user, without any method of authentication yet."""
        try:
            self._store.insert("INSERT INTO users (name, email) VALUES (?, ?)", spec.name, spec.email)
        except sqlite3.IntegrityError:
            raise Refusal(409, "user_exists", f"There is a user {spec.name!r} already.") from None
        return self.user(spec.name)

    def devices(self, location: str | None = None) -> list[Device]:
        """Return the devices, of one location or of all."""
        if location is None:
            rows = self._store.rows("SELECT * FROM devices ORDER BY id")
        else:
            rows = self._store.rows(
                "SELECT * FROM devices WHERE location_id = ? ORDER BY id",
                self.location(location).id,
            )
        return [_device(row) for row in rows]

    def device(self, device_id: int) -> Device:
        """Return a device by its number."""
        return _device(self._device_row(device_id))

    def device_by_key(self, public_key: str) -> Device | None:
        """Return the device with a public key, or None."""
        row = self._store.row("SELECT * FROM devices WHERE public_key = ?", public_key)
        return None if row is None else _device(row)

    def add_devices(self, wanted: list[specs.DeviceSpec]) -> list[Device]:
        """Create devices, all or none, each with an event ``peer_upserted``."""
        added = []
        plans: dict[int, AddressPlan] = {}
        with self._store.transaction():
            for spec in wanted:
                location = self.location(spec.location)
                if location.id not in plans:
                    plans[location.id] = self._address_plan(location)
                added.append(self._add_device(spec, location, plans[location.id]))
        return added

    def _add_device(self, spec: specs.DeviceSpec, location: Location, plan: AddressPlan) -> Device:
        _checked("public_key", parse_public_key, spec.public_key)
        if spec.preshared_key is not None:
            _checked("preshared_key", parse_preshared_key, spec.preshared_key)
        if spec.public_key == location.server_public_key:
            raise Refusal(409, "gateway_key", "That is the gateway's own public key.")
        allowed_ips = plan.claim(spec.allowed_ips) if spec.allowed_ips else plan.allocate()
        try:
            device_id = self._store.insert(
                "INSERT INTO devices (user_id, location_id, name, public_key, allowed_ips,"
                " persistent_keepalive, mfa_exempt, preshared_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                None if spec.user is None else self.user(spec.user).id,
                location.id,
                spec.name,
                spec.public_key,
                json.dumps(allowed_ips),
                spec.persistent_keepalive,
                spec.mfa_exempt,
                spec.preshared_key,
            )
        except sqlite3.IntegrityError:
            raise Refusal(409, "device_exists", f"The key of {spec.name!r} is registered already.") from None
        row = self._device_row(device_id)
        self._store.append(location.id, "peer_upserted", peer_message(row, None))
        return _device(row)

    def change_device(self, device_id: int, patch: specs.DevicePatch) -> Device:
        """Change a device, sent as ``peer_upserted`` with its live session, if it has one."""
        if patch.preshared_key is not UNSET and patch.preshared_key is not None:
            _checked("preshared_key", parse_preshared_key, patch.preshared_key)
        with self._store.transaction():
            row = self._device_row(device_id)
            allowed_ips = json.loads(row["allowed_ips"])
            if patch.allowed_ips is not UNSET:
                plan = self._address_plan(self.location_by_id(row["location_id"]), but=device_id)
                allowed_ips = plan.claim(patch.allowed_ips)
            self._store.execute(
                "UPDATE devices SET name = ?, allowed_ips = ?, persistent_keepalive = ?,"
                " mfa_exempt = ?, preshared_key = ? WHERE id = ?",
                _or(patch.name, row["name"]),
                json.dumps(allowed_ips),
                _or(patch.persistent_keepalive, row["persistent_keepalive"]),
                _or(patch.mfa_exempt, bool(row["mfa_exempt"])),
                _or(patch.preshared_key, row["preshared_key"]),
                device_id,
            )
            row = self._device_row(device_id)
            live = self._store.row(
                "SELECT * FROM sessions WHERE public_key = ? AND ended_at IS NULL",
                row["public_key"],
            )
            self._store.append(
                row["location_id"],
                "peer_upserted",
                peer_message(row, None if live is None else session_object(live, psk="")),
                session_id=None if live is None else live["id"],
            )
        return _device(row)

    def remove_device(self, device_id: int, now: float) -> None:
        """Remove a device; its session ends with it (``peer_removed``)."""
        with self._store.transaction():
            row = self._device_row(device_id)
            self._store.execute(
                "UPDATE sessions SET ended_at = ?, reason = 'peer_removed'"
                " WHERE public_key = ? AND ended_at IS NULL",
                now,
                row["public_key"],
            )
            self._store.execute("DELETE FROM devices WHERE id = ?", device_id)
            self._store.append(row["location_id"], "peer_removed", {"public_key": row["public_key"]})

    def _location_row(self, name: str) -> sqlite3.Row:
        row = self._store.row("SELECT * FROM locations WHERE name = ?", name)
        if row is None:
            raise Refusal(404, "unknown_location", f"There is no location {clean_name(name)!r}.")
        return row

    def _location(self, row: sqlite3.Row) -> Location:
        return Location(
            id=row["id"],
            name=row["name"],
            mfa_required=bool(row["mfa_required"]),
            epoch=row["epoch"],
            revision=row["revision"],
            interface=json.loads(row["interface"]),
            policy=sent_policy(json.loads(row["policy"]), shared=row["name"] in self._shared),
            endpoint=row["endpoint"],
            server_public_key=row["server_public_key"],
            routes=json.loads(row["routes"]),
        )

    def _device_row(self, device_id: int) -> sqlite3.Row:
        row = self._store.row("SELECT * FROM devices WHERE id = ?", device_id)
        if row is None:
            raise Refusal(404, "unknown_device", f"There is no device {device_id}.")
        return row

    def _address_plan(self, location: Location, *, but: int = 0) -> AddressPlan:
        rows = self._store.rows(
            "SELECT allowed_ips FROM devices WHERE location_id = ? AND id != ?", location.id, but
        )
        held = (prefix for row in rows for prefix in json.loads(row["allowed_ips"]))
        return AddressPlan(location.interface.get("addresses", []), held)


def _or(value: T | UnsetType, default: T) -> T:
    return default if isinstance(value, UnsetType) else value


def _checked(what: str, parse: Callable[[object], object], text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        raise Refusal(400, f"bad_{what}", f"{what} can't be used: {error}.") from None


def _check_location(patch: specs.LocationPatch) -> None:
    for address in _or(patch.addresses, []):
        _checked("addresses", parse_interface_address, address)
    for route in _or(patch.routes, []):
        _checked("routes", parse_prefix, route)
    key = _or(patch.server_public_key, None)
    if key is not None:
        _checked("server_public_key", parse_public_key, key)
    endpoint = _or(patch.endpoint, None)
    if endpoint is not None:
        host, colon, port = endpoint.rpartition(":")
        if not host or not colon or not port.isdecimal() or not 0 < int(port) <= 65535:
            raise Refusal(400, "bad_endpoint", "endpoint can't be used: write HOST:PORT.")


def _merged(held: dict[str, Any], patch: specs.LocationPatch, members: tuple[str, ...]) -> dict[str, Any]:
    merged = held | {name: getattr(patch, name) for name in members}
    merged = {n: held.get(n) if value is UNSET else value for n, value in merged.items()}
    return {name: value for name, value in merged.items() if value is not None}


def _user(row: sqlite3.Row) -> User:
    methods = [
        name
        for name, enabled in (
            ("totp", row["totp_secret"] is not None),
            ("email", bool(row["email_enabled"])),
        )
        if enabled
    ]
    return User(row["id"], row["name"], row["email"], tuple(methods))


def _device(row: sqlite3.Row) -> Device:
    return Device(
        id=row["id"],
        user_id=row["user_id"],
        location_id=row["location_id"],
        name=row["name"],
        public_key=row["public_key"],
        allowed_ips=json.loads(row["allowed_ips"]),
        persistent_keepalive=row["persistent_keepalive"],
        mfa_exempt=bool(row["mfa_exempt"]),
        has_preshared_key=row["preshared_key"] is not None,
    )
