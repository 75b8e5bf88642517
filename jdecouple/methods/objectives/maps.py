"""Feature maps, and `head_pool`: heads that read their means over a few bins, not all pixels."""

import dataclasses
import functools
from typing import Any

import jax

from jdecouple.methods.objectives.base import BlockInfo
from jdecouple.models.resampling import adaptive_average_pool
from jdecouple.models.sequence import pooled


def is_map(features: Any) -> bool:
    """Whether an activation, or its shape and dtype, is `[batch, height, width, channels]`."""
    return len(getattr(features, "shape", ())) == 4


def pool_maps(features: Any, size: int) -> Any:
    """The array that a head reads, feature maps averaged over `size` x `size` bins.

    Of a sequence it is the summary, and any array but a map is left as it is. A `size` of 0 pools
    nothing, and a side of fewer pixels keeps those it has.
    """
    features = pooled(features)
    if not size or not is_map(features):
        return features
    height, width = (min(size, side) for side in features.shape[1:3])
    return adaptive_average_pool(features, height, width)


def pooled_info(info: BlockInfo, size: int) -> BlockInfo:
    """Where a head is that reads `pool_maps(features, size)`."""
    features = jax.eval_shape(functools.partial(pool_maps, size=size), info.features)
    return dataclasses.replace(info, features=features)
