"""Everything the agent raises on purpose: one small tree, so that a caller can say whose fault it is."""

import errno
from typing import Final

_MAY_PASS: Final = frozenset(
    {
        *(errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENOSPC, errno.EDQUOT),
        *(errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EIO),
    }
)


class AgentError(Exception):
    """Base of the tree.

    ``str()`` is a sentence for an operator: what happened and, in ``hint``, what to do about it.
    Neither ever holds a secret.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(AgentError):
    """The configuration, a credential or a key file can't be used; the command ends with 2."""


class ConfigUnreadable(ConfigError):
    """There is no configuration to judge: the file can't be read, or is not TOML."""


class InvalidMessage(AgentError):
    """Core sent something that is not of the protocol; the whole message is refused."""


class CoreUnavailable(AgentError):
    """Core can't be reached, or not now: refused, timed out, 5xx, 429.

    ``retry_after`` is the wait in seconds that core asked for, if it did.
    """

    def __init__(self, message: str, hint: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class CoreRejected(AgentError):
    """Core answered and said no (401, 403, 404 …): an operator has to act. ``status`` is HTTP's."""

    def __init__(self, message: str, hint: str = "", *, status: int = 0) -> None:
        super().__init__(message, hint)
        self.status = status


class DeviceError(AgentError):
    """The interface can't be read or written. ``errno`` is the kernel's where there is one."""

    def __init__(self, message: str, hint: str = "", *, errno: int = 0) -> None:
        super().__init__(message, hint)
        self.errno = errno


class JournalError(AgentError):
    """The journal can't be read or written; nothing new may be admitted."""


class LockHeld(AgentError):
    """Another agent runs on this interface; the command ends with 1."""


class GuardError(AgentError):
    """The nftables table can't be read or written, or nftables can't be used here at all."""


class GuardDrifted(GuardError):
    """The nftables table is not as the agent left it: somebody has changed it."""


def cannot_start(error: OSError, message: str, hint: str = "") -> AgentError:
    """Return what to raise for something that the agent needs at its start and was refused.

    A ConfigError, unless the fault may pass by itself (a port in use, an address that is not there
    yet, a full disk): the unit tries again after any error but a ConfigError.
    """
    return (AgentError if error.errno in _MAY_PASS else ConfigError)(message, hint)
