"""Several processes as one run: who they are, how they meet, and how they end together."""

from jdecouple.train.hosts.exchange import gather, merge_metrics, scatter
from jdecouple.train.hosts.group import MultiProcess, SingleProcess
from jdecouple.train.hosts.join import join
from jdecouple.train.hosts.process_spec import ProcessSpec, detect_cluster

__all__ = [
    "MultiProcess",
    "ProcessSpec",
    "SingleProcess",
    "detect_cluster",
    "gather",
    "join",
    "merge_metrics",
    "scatter",
]
