"""Where core is and how to trust it: ``core.url`` and the TLS files, checked at start."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from agent.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files: the CA that signed core's certificate, and a client certificate."""

    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """``core.url`` taken apart: what to join paths to, and the unix socket to connect to, if any."""

    http: str
    socket: str | None = None
    tls: bool = False


def parse_base_url(url: str) -> BaseUrl:
    """Check ``core.url`` and take it apart; a missing slash at its end is added.

    Forms: ``https://HOST/…/``, ``http://`` with a loopback HOST, and ``http+unix://SOCKET:/…/``.
    Raises ConfigError.
    """
    scheme, found, rest = url.partition("://")
    if found and scheme == "http+unix":
        socket, _, path = rest.partition(":")
        if not socket.startswith("/"):
            raise ConfigError(
                "core.url names no absolute socket path",
                "write it as http+unix:///run/core.sock:/gateway/v1/",
            )
        return BaseUrl(_with_slash(f"http://localhost/{path.lstrip('/')}"), socket)
    try:
        parsed = urlsplit(url)
        host, _port = parsed.hostname, parsed.port
    except ValueError:
        raise ConfigError("core.url is not a URL", "it looks like https://HOST/path/") from None
    if parsed.scheme not in {"http", "https"} or not host:
        raise ConfigError("core.url is not an https:// URL", "it looks like https://HOST/path/")
    if parsed.username or parsed.password or parsed.query or parsed.fragment:
        raise ConfigError(
            "core.url holds a user, a query or a fragment",
            "remove it; the token comes from core.token_file or the credential core.token",
        )
    if parsed.scheme == "http" and not _is_loopback(host):
        raise ConfigError(
            "core.url is plain http to another machine, where anybody on the way reads PSKs",
            "use https://, or http:// to a loopback address or a unix socket",
        )
    return BaseUrl(_with_slash(url), tls=parsed.scheme == "https")


def _with_slash(url: str) -> str:
    return url if url.endswith("/") else url + "/"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the context for https: the system's roots or ``ca_file``; raises ConfigError."""
    context = _trusting(files.ca_file)
    if files.client_cert_file is None:
        return context
    try:
        # Without a password callback OpenSSL would ask for one on the terminal.
        context.load_cert_chain(files.client_cert_file, files.client_key_file, _no_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the client certificate {files.client_cert_file} can't be used: {_reason(error)}",
            "core.client_cert_file and core.client_key_file are PEM files that belong together",
        ) from None
    return context


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"core.ca_file {ca_file} can't be used: {_reason(error)}",
            "it is a PEM file with the certificate of the CA that signed core's",
        ) from None


def _no_password() -> str:
    raise ConfigError("core.client_key_file is encrypted", "store the key without a passphrase, mode 0600")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "not PEM"
    return getattr(error, "strerror", None) or str(error)
