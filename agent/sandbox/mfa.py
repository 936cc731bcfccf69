"""The second factor: TOTP (RFC 6238) and e-mailed codes.

A code works once, for one device, and not for ever; wrong ones are counted per user, whatever the
method, so that neither can be guessed. State is in the database, so a restart resets no limit.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Final, Literal

import aiosmtplib
import pyotp

from agent.encoding import clean_name
from agent.sandbox.config import Mfa, Smtp, secret
from agent.sandbox.directory import Device, Directory, Location
from agent.sandbox.errors import Refusal
from agent.sandbox.store import Store

Method = Literal["totp", "email"]
_STEP: Final = 30
_DIGITS: Final = 6
# Steps that a client's clock may be off by (RFC 6238, section 5.2), and how far back a code is
# still recognised as late rather than wrong.
_SKEW: Final = 1
_LATE: Final = 10


@dataclass(frozen=True, slots=True)
class Started:
    """An authentication that waits for its code until ``expires_at`` (Unix seconds)."""

    token: str
    method: Method
    expires_at: float


@dataclass(frozen=True, slots=True)
class Authenticated:
    """Who has proved themselves, with which device."""

    device: Device
    location: Location
    method: str


class Mailer:
    """Sends codes through the configured SMTP server."""

    def __init__(self, smtp: Smtp) -> None:
        self._smtp = smtp
        self._password = secret(smtp.password, smtp.password_file, "smtp.password")

    async def send_code(self, recipient: str, code: str, location: str, valid_until: float) -> None:
        """Send a code. Raises Refusal (502) if the server does not take the message."""
        until = datetime.fromtimestamp(valid_until, UTC)
        message = EmailMessage()
        message["From"] = self._smtp.sender
        message["To"] = recipient
        message["Subject"] = "Your VPN sign-in code"
        message["Date"] = format_datetime(datetime.now(UTC))
        message["Message-ID"] = make_msgid(domain="localhost")
        message.set_content(
            f"Your code for the VPN {clean_name(location)} is {code}\n\n"
            f"It works once, until {until:%H:%M:%S} UTC. If you did not ask for it,"
            " somebody else is trying to sign in as you.\n"
        )
        try:
            await aiosmtplib.send(
                message,
                hostname=self._smtp.host,
                port=self._smtp.port,
                username=self._smtp.username,
                password=self._password,
                use_tls=self._smtp.security == "tls",
                start_tls=self._smtp.security == "starttls",
                timeout=self._smtp.timeout,
            )
        except (aiosmtplib.SMTPException, OSError):
            raise Refusal(
                502, "mail_failed", "The code could not be e-mailed; try again or use TOTP."
            ) from None


class Authenticator:
    """Starts and finishes authentications. ``now`` is in Unix seconds; refusals raise Refusal."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        limits: Mfa,
        send_code: Callable[[str, str, str, float], Awaitable[None]],
    ) -> None:
        """``send_code(recipient, code, location, valid_until)`` delivers an e-mailed code."""
        self._store = store
        self._directory = directory
        self._limits = limits
        self._send_code = send_code

    def enable_totp(self, user: str) -> tuple[str, str]:
        """Give a user a new TOTP secret; return it in base32 and as an otpauth URI."""
        user_id = self._directory.user(user).id
        key = pyotp.random_base32()
        self._store.execute("UPDATE users SET totp_secret = ?, totp_last_step = 0 WHERE id = ?", key, user_id)
        uri = pyotp.TOTP(key).provisioning_uri(name=user, issuer_name=self._limits.issuer)
        return key, uri

    def disable_totp(self, user: str) -> None:
        """Take TOTP from a user."""
        user_id = self._directory.user(user).id
        self._store.execute("UPDATE users SET totp_secret = NULL WHERE id = ?", user_id)

    def enable_email(self, user: str, *, enabled: bool = True) -> None:
        """Let a user authenticate by e-mailed codes, or not any more."""
        held = self._directory.user(user)
        if enabled and held.email is None:
            raise Refusal(409, "no_email", f"{held.name} has no e-mail address.")
        self._store.execute("UPDATE users SET email_enabled = ? WHERE id = ?", enabled, held.id)

    def device_of(self, user: str, public_key: str) -> tuple[Device, Location]:
        """Return a user's device by its public key; who asks learns nothing of other users."""
        device = self._directory.device_by_key(public_key)
        row = self._store.row("SELECT id FROM users WHERE name = ?", user)
        if device is None or row is None or device.user_id != row["id"]:
            raise Refusal(404, "unknown_device", "No device with this key is registered for this user.")
        return device, self._directory.location_by_id(device.location_id)

    async def start(self, user: str, public_key: str, method: Method, now: float) -> Started:
        """Start an authentication; with ``email`` a code is sent. An earlier one is superseded."""
        device, location = self.device_of(user, public_key)
        if not location.mfa_required or device.mfa_exempt:
            raise Refusal(409, "mfa_not_required", "This device connects without authentication here.")
        held = self._directory.user(user)
        if method not in held.methods:
            raise Refusal(
                403,
                "method_not_enabled",
                f"{method} is not enabled for this user; use another method"
                " or ask the administrator to enable it.",
            )
        self._limit(held.id, "failure", self._limits.max_failures, now)
        code: str | None = None
        if method == "email":
            self._limit(held.id, "mail", self._limits.max_mails, now)
            self._count(held.id, "mail", now)
            code = f"{secrets.randbelow(10**_DIGITS):0{_DIGITS}}"
        started = Started(secrets.token_urlsafe(24), method, now + self._limits.code_lifetime)
        with self._store.transaction():
            self._store.execute(
                "UPDATE challenges SET superseded = 1 WHERE user_id = ? AND public_key = ?",
                held.id,
                public_key,
            )
            self._store.execute(
                "INSERT INTO challenges (token_hash, user_id, public_key, method, code_hash,"
                " created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                _digest(started.token),
                held.id,
                public_key,
                method,
                None if code is None else _digest(started.token, code),
                now,
                started.expires_at,
            )
        if code is not None and held.email is not None:
            await self._send_code(held.email, code, location.name, started.expires_at)
        return started

    def finish(self, token: str, code: str, now: float) -> Authenticated:
        """Check a code. It is used up when this returns."""
        row = self._store.row("SELECT * FROM challenges WHERE token_hash = ?", _digest(token))
        if row is None:
            raise Refusal(401, "unknown_challenge", "This authentication is not known; start a new one.")
        if row["used_at"] is not None:
            raise Refusal(401, "code_reused", "This code has been used; each connection needs a new one.")
        self._limit(row["user_id"], "failure", self._limits.max_failures, now)
        if row["superseded"]:
            raise Refusal(401, "code_expired", "A newer authentication was started; use its code.")
        if now >= row["expires_at"]:
            raise Refusal(401, "code_expired", "The time to enter the code is over; start again.")
        digits = "".join(code.split())
        device = self._directory.device_by_key(row["public_key"])
        if device is None or device.user_id != row["user_id"]:
            raise Refusal(401, "unknown_challenge", "The device has been removed.")
        try:
            with self._store.transaction():
                if row["method"] == "totp":
                    self._use_totp(row["user_id"], digits, now)
                else:
                    self._check_email(row, token, digits)
                self._store.execute(
                    "UPDATE challenges SET used_at = ? WHERE token_hash = ?", now, row["token_hash"]
                )
                self._store.execute(
                    "DELETE FROM attempts WHERE user_id = ? AND kind = 'failure'", row["user_id"]
                )
        except Refusal:
            self._count(row["user_id"], "failure", now)
            raise
        return Authenticated(device, self._directory.location_by_id(device.location_id), row["method"])

    def forget(self, now: float) -> None:
        """Delete what no limit and no answer needs any more."""
        self._store.execute("DELETE FROM attempts WHERE at <= ?", now - self._limits.window)
        self._store.execute("DELETE FROM challenges WHERE expires_at <= ?", now - self._limits.code_lifetime)

    def _check_email(self, row: sqlite3.Row, token: str, digits: str) -> None:
        user = self._store.row("SELECT email_enabled FROM users WHERE id = ?", row["user_id"])
        if user is None or not user["email_enabled"]:
            raise Refusal(403, "method_not_enabled", "E-mailed codes are not enabled any more.")
        if not hmac.compare_digest(row["code_hash"], _digest(token, digits)):
            raise Refusal(401, "wrong_code", "The code is wrong; look at the newest message.")

    def _use_totp(self, user_id: int, digits: str, now: float) -> None:
        user = self._store.row("SELECT totp_secret, totp_last_step FROM users WHERE id = ?", user_id)
        if user is None or user["totp_secret"] is None:
            raise Refusal(403, "method_not_enabled", "TOTP is not enabled any more.")
        totp = pyotp.TOTP(user["totp_secret"], digits=_DIGITS, interval=_STEP)
        step = int(now) // _STEP
        matching = [s for s in range(step - _LATE, step + _SKEW + 1) if _same(totp.generate_otp(s), digits)]
        if not matching:
            raise Refusal(401, "wrong_code", "The code is wrong; check the device's clock as well.")
        if matching[-1] < step - _SKEW:
            raise Refusal(401, "code_expired", "The code is no longer valid; use the current one.")
        # RFC 6238, section 5.2: a code is accepted once, so neither is its step nor an earlier one.
        used = self._store.execute(
            "UPDATE users SET totp_last_step = ? WHERE id = ? AND totp_last_step < ?",
            matching[-1],
            user_id,
            matching[-1],
        )
        if not used:
            raise Refusal(401, "code_reused", "This code has been used; wait for the next one.")

    def _limit(self, user_id: int, kind: str, most: int, now: float) -> None:
        rows = self._store.rows(
            "SELECT at FROM attempts WHERE user_id = ? AND kind = ? AND at > ? ORDER BY at DESC",
            user_id,
            kind,
            now - self._limits.window,
        )
        if len(rows) >= most:
            wait = rows[most - 1]["at"] + self._limits.window - now
            what = "wrong codes" if kind == "failure" else "codes asked for"
            raise Refusal(
                429,
                "too_many_attempts",
                f"Too many {what}; try again in {max(wait, 1):.0f} s.",
                retry_after=wait,
            )

    def _count(self, user_id: int, kind: str, now: float) -> None:
        self._store.execute("INSERT INTO attempts VALUES (?, ?, ?)", user_id, kind, now)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
