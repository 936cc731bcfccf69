"""Speaks to a Defguard core of either generation, in the place of Defguard's own gateway."""

import os

# gRPC's own log is none of JSON lines; what matters of it comes as the failure of a call.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
