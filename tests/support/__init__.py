"""What several test folders share: namespaces, pings and what this machine can do."""
