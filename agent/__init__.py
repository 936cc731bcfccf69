"""wg-agent: MFA sessions on a WireGuard gateway's interface on time, and off it on time."""

__version__ = "0.1.0"
