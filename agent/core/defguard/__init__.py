"""Speaks to a Defguard core of either generation, in the place of Defguard's own gateway."""

import logging
import os

# gRPC's own words, at any level of ours, are none of an operator's; what matters comes as a call's failure.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
logging.getLogger("grpc").setLevel(logging.WARNING)
