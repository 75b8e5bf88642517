"""Mesh and placement, partitioning of blocks, the executor of a schedule and its costs."""

from jdecouple.pipeline.chunk import Chunks
from jdecouple.pipeline.executor import Executor
from jdecouple.pipeline.gather import gather
from jdecouple.pipeline.measure import measured_costs
from jdecouple.pipeline.placement import (
    Seat,
    StageMesh,
    as_stage_mesh,
    make_mesh,
    spread,
)
from jdecouple.pipeline.proposal import Proposal, propose
from jdecouple.pipeline.spmd import ENGINES, SpmdChunks, SpmdExecutor
from jdecouple.pipeline.transfer import transfer

__all__ = [
    "ENGINES",
    "Chunks",
    "Executor",
    "Proposal",
    "Seat",
    "SpmdChunks",
    "SpmdExecutor",
    "StageMesh",
    "as_stage_mesh",
    "gather",
    "make_mesh",
    "measured_costs",
    "propose",
    "spread",
    "transfer",
]
