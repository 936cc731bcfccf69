"""What each refusal and each end of a session means, and what to do about it: for ``wg-agent explain``."""

from __future__ import annotations

from typing import Final, NamedTuple

from agent.model import EndReason, Refusal


class Meaning(NamedTuple):
    """Two sentences without a full stop: what is wrong, and the remedy."""

    fault: str
    remedy: str


_AT_CORE: Final = "have core correct the entry; the agent takes the corrected one at once"

MEANINGS: Final[dict[Refusal, Meaning]] = {
    Refusal.INVALID_PEER: Meaning("core's entry for it can't be read", _AT_CORE),
    Refusal.INVALID_PUBLIC_KEY: Meaning(
        "its public key is not a key: 44 characters of base64 that decode and encode to themselves", _AT_CORE
    ),
    Refusal.INVALID_PRESHARED_KEY: Meaning(
        "its pre-shared key is missing, malformed or all zero",
        "have core make a new one from 32 random bytes",
    ),
    Refusal.INVALID_ALLOWED_IPS: Meaning(
        "its allowed IPs are missing or not prefixes: host bits are set, a zone or an IPv4-mapped address",
        _AT_CORE,
    ),
    Refusal.INVALID_KEEPALIVE: Meaning(
        "its persistent_keepalive is not a whole number from 0 to 65535", _AT_CORE
    ),
    Refusal.INVALID_MFA_EXEMPT: Meaning("its mfa_exempt is neither true nor false", _AT_CORE),
    Refusal.INVALID_SESSION: Meaning("its session can't be read, so the one before has ended, too", _AT_CORE),
    Refusal.INVALID_TIME: Meaning(
        "a time of its session has no offset or is out of range, so the one before has ended, too", _AT_CORE
    ),
    Refusal.OWN_KEY: Meaning(
        "it has the interface's own public key",
        "give the device a key pair of its own; it may have been copied",
    ),
    Refusal.DUPLICATE_KEY: Meaning(
        "core lists its public key more than once",
        "remove all entries but one, or give each device its own key",
    ),
    Refusal.PREFIX_CLAIMED: Meaning(
        "another peer claims one of its prefixes", "have core give each prefix to one peer only"
    ),
    Refusal.SESSION_ON_TWO_KEYS: Meaning(
        "core shows its session's id on another key, too",
        "core has to make an id per session; authenticate again",
    ),
    Refusal.SESSION_ENDED: Meaning(
        "the session that core shows has ended here, and an ended session stays dead", "authenticate again"
    ),
    Refusal.NOT_JOURNALLED: Meaning(
        "its session could not be written to the journal, and what a restart would not know is not let in",
        "see the disk of the state folder (paths.state): wg-agent check, and the log",
    ),
    Refusal.NOT_GUARDED: Meaning(
        "the kernel's own guard can't let it through, and firewall.required asks for it",
        "see why nftables refuses: wg-agent check, and the log",
    ),
    Refusal.DEVICE: Meaning("the interface refuses the peer", "the log has the kernel's reason"),
}

ENDS: Final[dict[EndReason, Meaning]] = {
    EndReason.EXPIRED: Meaning("it reached its deadline", "authenticate again"),
    EndReason.IDLE: Meaning("there was no sign of life for idle_timeout", "authenticate again"),
    EndReason.NEVER_CONNECTED: Meaning(
        "there was no handshake within connect_timeout",
        "see that the client has the new PSK, the endpoint and a way to it; then authenticate again",
    ),
    EndReason.REVOKED: Meaning("core revoked it", "ask whoever runs core why; then authenticate again"),
    EndReason.REPLACED: Meaning("core granted another in its place", "authenticate again"),
    EndReason.PEER_REMOVED: Meaning("core listed the peer no longer", "authenticate again"),
    EndReason.CORE_LOST: Meaning(
        "core was away for longer than sessions.core_lost_grace", "authenticate again once core is back"
    ),
    EndReason.OPERATOR: Meaning("somebody ended it with wg-agent end", "authenticate again"),
}
