"""Several processes as one run: who they are, how they meet, and how they end together."""

from jdecouple.hosts.exchange import gather, hand_out, merged_rows
from jdecouple.hosts.group import ALONE, Alone, Hosts
from jdecouple.hosts.join import join
from jdecouple.hosts.place import Place, find_place

__all__ = [
    "ALONE",
    "Alone",
    "Hosts",
    "Place",
    "find_place",
    "gather",
    "hand_out",
    "join",
    "merged_rows",
]
