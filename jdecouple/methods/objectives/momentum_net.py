"""MAN's objective: an auxiliary net behind a moving average of the next unit (arXiv 2407.05623)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_bool, require_number
from jdecouple.methods.objectives.auxiliary_net import AuxiliaryNet
from jdecouple.methods.objectives.base import BlockInfo
from jdecouple.methods.objectives.following import follow
from jdecouple.models.renewal import renewed

_READ = ("h", "summary")


class MomentumFront(nnx.Module):
    """Two fresh copies of the next unit, whose outputs are added: one learns, one follows the unit.

    Args:
        learned: The learnable bias.
        followed: The moving average.
        scaled: Whether a number s, at first 1, weighs them by s and 2 - s.
    """

    def __init__(self, learned: Any, followed: Any, scaled: bool, param_dtype: Any):
        self.learned, self.followed = learned, followed
        self.scale = nnx.Param(jnp.ones((), param_dtype)) if scaled else None

    def __call__(self, features: Any) -> Any:
        """What the unit would make of a block's output, in its shapes."""
        return _added(self.learned(features), self.followed(features), self.scale)


def _added(bias: Any, average: Any, scale: nnx.Param | None) -> Any:
    """Their sum; of sequences that of states and summaries, and the rest of the first."""
    if isinstance(bias, Mapping):
        rest = {name: value for name, value in bias.items() if name not in _READ}
        read = bias.keys() & {*_READ}
        return {**rest, **{name: _added(bias[name], average[name], scale) for name in read}}
    if scale is None:
        return bias + average
    return scale[...] * bias + (2 - scale[...]) * average


@dataclasses.dataclass(frozen=True)
class MomentumNet(AuxiliaryNet):
    """Cross-entropy of an auxiliary net that reads the sum of two copies of the next unit.

    Both copies begin fresh. The weights of the one are learned by the block's loss; those of the
    other are a moving average of the unit's own and pass the gradient on. The rest is as in
    `AuxiliaryNet`, whose arguments it has.

    Attributes:
        aux: The auxiliary net, as of `AuxiliaryNet`.
        hidden: Width of its hidden dense layers, as of `AuxiliaryNet`.
        head_pool: Bins a side of maps before it, as of `AuxiliaryNet`.
        ema_decay: Share of the moving average that stays after a batch.
        scaled: Whether the copies are weighed by s and 2 - s, where s is learned and begins at 1
            (MAN++, arXiv 2507.16279).
    """

    ema_decay: float = 0.995
    scaled: bool = False
    follows_above: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require_number(below=1, ema_decay=self.ema_decay)
        require_bool(scaled=self.scaled)

    def front(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module | None:
        """The copies for any block but the last.

        Raises:
            ValueError: The next unit has no copy.
        """
        if info.is_last:
            return None
        unit, output = info.above[0]
        learned, followed = (
            renewed(unit, info.features, output, **info.options(rngs)) for _ in range(2)
        )
        follow(followed, info.unit + 1, self.ema_decay)
        return MomentumFront(learned, followed, self.scaled, info.param_dtype)
