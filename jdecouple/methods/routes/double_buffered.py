"""PipeDream-2BW (arXiv 2006.09503): a delay of one update at any depth, by two versions of weights.

Batches come in groups of M, and a group makes one step with the mean of its gradients. Group t goes
forward and backward by the weights W(t-1) in all stages, so that with learning rate r and the mean
loss f of a group

    W(t+1) = W(t) - r grad f(W(t-1))

(section 3.1: microbatch b, counted from 0, uses version max(floor(b / M) - 1, 0)). Nothing is
flushed between groups: a forward and a backward take turns (1F1B), which is the schedule of DDG.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from jdecouple.methods.routes.delayed import Delayed
from jdecouple.methods.routes.remat import REMATS
from jdecouple.methods.routes.route import Forward, Staleness
from jdecouple.methods.routes.stage import Stage, StageState
from jdecouple.methods.routes.unit import Carry


@dataclasses.dataclass(frozen=True)
class DoubleBuffered(Delayed):
    """Backpropagation whose gradients are of the weights before the latest step, in every stage.

    Attributes:
        accumulate: M, backward passes to one optimiser step; one less than stages at least.
    """

    forward_pass: str = "locked"
    accumulate_mean: bool = True
    may_look_ahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        passes = self.forward_pass, self.backward_pass
        if passes != ("locked", "pipelined"):
            raise ValueError(
                f"forward_pass {passes[0]!r} with backward_pass {passes[1]!r}: two versions of the "
                "weights need locked with pipelined"
            )

    def passes_per_version(self, num_stages: int) -> int | None:
        """A group; ValueError where a batch would be under way for longer than that."""
        if self.accumulate < num_stages - 1:
            raise ValueError(
                f"accumulate is {self.accumulate}: two versions of the weights for {num_stages} "
                f"stages need {num_stages - 1} batches a step or more"
            )
        return self.accumulate if num_stages > 1 else None

    @property
    def stashes_weights(self) -> bool:
        """The stage keeps the version of the forward by itself, until the backward."""
        return False

    @property
    def remats(self) -> tuple[str, ...]:
        """A queue is on the device; what is repeated is by the weights of the forward."""
        return tuple(remat for remat in REMATS if remat != "offload")

    def forward(self, stage: Stage, state: StageState, carry: Carry, step_id: jax.Array) -> Forward:
        """Forward by the version of the batch's group: of a stage that is a step behind the latest.

        The last stage never is. Of the others only those batches find it so that enter before the
        group below theirs has come back.
        """
        forward = super().forward
        if "previous" not in state:
            return forward(stage, state, carry, step_id)

        def by(params: Any) -> Forward:
            return forward(stage, {**state, "params": params}, carry, step_id)

        if stage.is_last:
            return by(state["previous"])
        is_behind = state["passes"] // self.accumulate < step_id[0] // self.accumulate
        branches = (lambda new, _: by(new)), (lambda _, old: by(old))
        return jax.lax.cond(is_behind, *branches, state["params"], state["previous"])

    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any]:
        """Backward by the weights before the latest step, which are those of the forward."""
        version = {"params": state["previous"]} if "previous" in state else {}
        return super().backward(stage, {**state, **version}, residuals, cotangent, step_id)

    def staleness(self, stage: int, num_stages: int, *, shared: bool = False) -> Staleness:
        """One update for the weights of all stages; the error's is an average over the passes."""
        above = num_stages - 1 - stage
        return Staleness(float(num_stages > 1), above / self.accumulate)
