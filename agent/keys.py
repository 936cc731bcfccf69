"""Secrets on disk: core's token, the push secret, the interface's private key.

Such a file is its owner's alone, or it is refused.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from agent.config import Config
from agent.curve25519 import clamp
from agent.encoding import format_key, parse_key
from agent.errors import ConfigError
from agent.expiry import expiries_of
from agent.folders import write_whole

_SECRET_SIZE: Final = 64 << 10
_TOKEN: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)  # what may stand in an Authorization header
_CERTIFICATES: Final[dict[str, Callable[[tuple[float, ...]], float]]] = {
    "core.ca": max,
    "core.client_cert": min,
    "push.tls_cert": min,
    "push.client_ca": max,
}
_MIN_PUSH_SECRET: Final = 24  # bytes; Standard Webhooks, "Signature scheme"


@dataclass(frozen=True, slots=True)
class Secrets:
    """What must never be shown: core's bearer token and, as ``whsec_…``, the push secret if any.

    The token is empty where core is the one that connects.
    """

    token: SecretStr
    push_secret: SecretStr | None = None


def load_secrets(config: Config) -> Secrets:
    """Read core's token and, if push is on, its secret; check the other files that are named.

    Raises ConfigError if one is missing or unreadable, malformed, or a secret and open to others.
    """
    _check_files(config)
    if config.core.calls:
        return Secrets(SecretStr(""), _load_push_secret(config))
    if config.core.token_file is None:
        raise ConfigError(
            "there is no token for core",
            "set core.token_file, or give the credential core.token (LoadCredential= in the unit)",
        )
    token = read_secret_file(config.core.token_file, "core.token_file").decode("utf-8", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"core.token_file: {config.core.token_file} does not hold a token",
            "write the token as its only line",
        )
    return Secrets(SecretStr(token), _load_push_secret(config))


def _load_push_secret(config: Config) -> SecretStr | None:
    path = config.push.secret_file
    if path is None:
        return None
    text = read_secret_file(path, "push.secret_file").decode("utf-8", "replace").strip()
    if not _is_push_secret(text):
        raise ConfigError(
            f"push.secret_file: {path} holds no Standard Webhooks secret",
            f"write whsec_ and at least {_MIN_PUSH_SECRET} random bytes in base64, "
            'such as: echo "whsec_$(head -c 32 /dev/urandom | base64)"',
        )
    return SecretStr(text)


def _check_files(config: Config) -> None:
    for key in ("core.client_key_file", "push.tls_key_file"):
        if path := _file(config, key):
            check_secret_mode(path, key)
    for key in (
        "core.ca_file",
        "core.client_cert_file",
        "core.client_key_file",
        "push.tls_cert_file",
        "push.tls_key_file",
        "push.client_ca_file",
    ):
        if path := _file(config, key):
            try:
                path.open("rb").close()
            except OSError as error:
                raise _unreadable(path, key, error) from None


def certificate_expiries(config: Config) -> dict[str, float]:
    """Return when each configured certificate expires, in Unix seconds, by the name of its key.

    Of a chain the first that expires counts, of authorities the last: until then some can be verified.
    A file that holds no certificate is left out: whoever uses it says what is wrong with it.
    """
    found = {}
    for name, judge in _CERTIFICATES.items():
        if path := _file(config, f"{name}_file"):
            with contextlib.suppress(OSError, ValueError):
                found[name] = judge(expiries_of(path.read_bytes()))
    return found


def _file(config: Config, dotted: str) -> Path | None:
    section, _, key = dotted.partition(".")
    path: Path | None = getattr(getattr(config, section), key)
    return path


def read_secret_file(path: Path, key: str) -> bytes:
    """Return the content of a file that only its owner may read; ``key`` names it in errors.

    Group-readable is allowed in ``$CREDENTIALS_DIRECTORY``, where systemd shows an ACL that way.
    Raises ConfigError if it is missing, unreadable, empty, too large, no file, or open to others.
    """
    check_secret_mode(path, key)
    try:
        with path.open("rb") as file:
            content = file.read(_SECRET_SIZE + 1)
    except OSError as error:
        raise _unreadable(path, key, error) from None
    if not content.strip() or len(content) > _SECRET_SIZE:
        raise ConfigError(
            f"{key}: {path} is {'too large' if content.strip() else 'empty'}",
            "put the secret in it",
        )
    return content


def check_secret_mode(path: Path, key: str) -> None:
    """Raise ConfigError unless the file exists and nobody but its owner has access to it."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, key, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{key}: {path} is not a file")
    mode = stat.S_IMODE(status.st_mode)
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    loose = 0o037 if folder and path.parent == Path(folder) else 0o077
    if mode & loose:
        raise ConfigError(f"{key}: {path} has mode {mode:04o}, so others may read it", f"chmod 600 {path}")


def _unreadable(path: Path, key: str, error: OSError) -> ConfigError:
    hint = "create it with mode 600, or correct the path"
    if isinstance(error, PermissionError):
        hint = "the agent's user must own it; under systemd pass it with LoadCredential= instead"
    return ConfigError(f"{key}: {path} can't be read: {error.strerror}", hint)


def _is_push_secret(text: str) -> bool:
    try:
        return len(binascii.a2b_base64(text.removeprefix("whsec_"), strict_mode=True)) >= _MIN_PUSH_SECRET
    except (binascii.Error, ValueError):
        return False


def write_secret_file(path: Path, key: str, content: bytes) -> None:
    """Make a file that only its owner may read; ``key`` names it in errors.

    Raises ConfigError if it can't be made whole, or is there already.
    """
    try:
        write_whole(path, content, replace=False)
    except FileExistsError:
        raise ConfigError(f"{key}: {path} is there already", "name a new file, or remove that one") from None
    except OSError as error:
        raise ConfigError(
            f"{key}: {path} can't be made: {error.strerror}", "name a file in a folder that is there, as root"
        ) from None


def load_private_key(config: Config, *, create: bool) -> bytes:
    """Return the interface's private key, 32 raw bytes.

    With ``create`` a missing file is made with a fresh key. Raises ConfigError if the file is
    missing, can't be used or made, or is open to others.
    """
    path = config.private_key_file
    key = "interface.private_key_file"
    if create and not os.path.lexists(path):
        return _create_private_key(path)
    text = read_secret_file(path, key).decode("ascii", "replace").strip()
    try:
        raw = parse_key(text)
        if any(raw):
            return raw
    except ValueError:
        pass
    raise ConfigError(
        f"{key}: {path} does not hold a WireGuard key",
        f"make one: (umask 077; wg genkey > {path})",
    )


def _create_private_key(path: Path) -> bytes:
    raw = clamp(secrets.token_bytes(32))
    _write_private_key(path, raw, replace=False)
    return raw


def check_private_key_storable(config: Config) -> None:
    """Raise ConfigError where core hands out the interface's key, and the file for it can't be written.

    The next start would give the interface its old key back, and cut every tunnel.
    """
    path = config.private_key_file
    if config.core.protocol == "defguard" and path.exists() and not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"interface.private_key_file: {path} can't be replaced, and core hands out the interface's key",
            "leave interface.private_key_file and the credential interface.private_key out",
        )


def store_private_key(path: Path, raw: bytes) -> None:
    """Have the file hold this key from now on, whole or not at all; raises ConfigError."""
    _write_private_key(path, raw, replace=True)


def _write_private_key(path: Path, raw: bytes, *, replace: bool) -> None:
    """No start must find half a key."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, format_key(raw).encode("ascii") + b"\n", replace=replace)
    except OSError as error:
        raise ConfigError(
            f"interface.private_key_file: {path} can't be made: {error.strerror}",
            "name a file that the agent may write, or give the credential interface.private_key",
        ) from None
