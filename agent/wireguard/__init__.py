"""The WireGuard interface: one port (``device``), two adapters, their codecs and the link's set-up."""
