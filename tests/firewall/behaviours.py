"""What the guard does to real packets and to what others keep in nftables, on any kernel."""

from tests.firewall import beside, passing, upkeep, writing

BEHAVIOURS = [*passing.behaviours, *writing.behaviours, *upkeep.behaviours, *beside.behaviours]
