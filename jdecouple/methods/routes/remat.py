"""What a forward keeps for its backward; the backward repeats what is not kept."""

from collections.abc import Callable
from typing import Any

import jax

from jdecouple.models.kept import LARGE, SMALL

_policies = jax.checkpoint_policies
_POLICIES: dict[str, Any] = {
    "none": _policies.everything_saveable,
    "elementwise": _policies.save_from_both_policies(
        _policies.dots_saveable, _policies.save_only_these_names(LARGE, SMALL)
    ),
    "blocks": None,
    "stages": None,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[SMALL],
        names_which_can_be_offloaded=[LARGE],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

REMATS = tuple(_POLICIES)
"""Values of `remat`.

- "none": all that the backward needs is kept.
- "elementwise": results of products and convolutions are kept, beside inputs and what layers name
  by `jdecouple.models.kept`. Activations, normalisations and sums are repeated.
- "blocks": the input of every block is kept.
- "stages": the input of a stage is kept; of every block where blocks have losses of their own.
- "offload": as "elementwise", but what layers name as large lies in the host's memory meanwhile,
  and other products are repeated.
"""


def repeated(function: Callable, remat: str, **options: Any) -> Callable:
    """`function`, of which differentiation keeps what `remat` says: one of `REMATS`."""
    return jax.checkpoint(function, policy=_POLICIES[remat], **options)
