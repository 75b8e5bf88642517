"""Growing: blocks are added behind those of a trained model, which are frozen or train on."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jdecouple._errors import require_type
from jdecouple.methods import Method
from jdecouple.methods.objectives import BlockInfo
from jdecouple.methods.objectives.maps import pool_maps, pooled_info
from jdecouple.models import Model, layers
from jdecouple.pipeline.outputs import block_outputs
from jdecouple.pipeline.state import State
from jdecouple.trainer import Trainer


def grow(
    trainer: Trainer,
    state: State,
    blocks: Sequence[nnx.Module],
    *,
    classifier: nnx.Module | None = None,
    freeze: bool = True,
    **changes: Any,
) -> tuple[Trainer, State]:
    """Adds blocks behind those of a trained model, for any local method.

    Old blocks keep their weights, and the heads and the optimiser state that they have; the
    classifier in the head of the block that was the last stays there, as an exit. New blocks and
    their heads begin fresh, and the step goes on.

    >>> import jdecouple as jd
    >>> rngs = nnx.Rngs(0)
    >>> model = jd.models.mlp(2, input_size=4, hidden=8, depth=2, rngs=rngs)
    >>> x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    >>> batch = {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}
    >>> method, optimizer = jd.methods.get("greedy_exit"), jd.optim.sgd(0.5)
    >>> trainer = Trainer(model, method, optimizer, num_stages=2, example=batch)
    >>> state, _ = trainer.step(trainer.init(), batch)
    >>> block = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.relu)
    >>> trainer, state = grow(trainer, state, [block], classifier=nnx.Linear(8, 2, rngs=rngs))
    >>> state, metrics = trainer.step(state, batch)
    >>> state.step, sorted(metrics)
    (2, ['accuracy', 'block_2/accuracy', 'block_2/cross_entropy', 'block_2/loss', 'loss'])

    Args:
        trainer: what has trained the model.
        state: its state; not changed.
        blocks: new blocks with their initial weights. One may read further entries of the batch,
            whose names its attribute `inputs` holds.
        classifier: the new last block's, where the method uses one.
        freeze: whether the old blocks are trained no more. They then cost an evaluation forward.
        **changes: arguments of the new `Trainer` that differ from the old one's, such as `mesh`,
            `num_stages` or `example`. Without any, the stages are as many, with a new split.

    Returns:
        The new trainer and its state.

    Raises:
        TypeError, ValueError: blocks or arguments that do not fit, a method that is not local, or
            a state of which other processes hold parts.
    """
    require_type(Trainer, trainer=trainer)
    require_type(Sequence, blocks=blocks)
    if trainer.schedule.sums_late:
        raise ValueError(
            f"to grow needs schedule 'local': given {trainer.schedule.name!r}, whose queues would "
            "not fit"
        )
    arrays = trainer.to_arrays(state)
    if any(values is None for values in state.stages):
        raise ValueError(
            "other processes hold stages of this state: save it, and give what the checkpoint "
            "holds to growth.from_arrays"
        )
    old = trainer.model
    model = Model((*old.blocks, *blocks), classifier, before=old)
    placed = changes.keys() & {"mesh", "num_stages", "boundaries"}
    changes = {
        "boundaries": None,
        "num_stages": None if placed else len(trainer.stages),
        "frozen": range(len(old.blocks)) if freeze else (),
        **changes,
    }
    grown = Trainer(model, **{**trainer.options, **changes})
    return grown, from_arrays(grown, state.step, arrays)


def from_arrays(trainer: Trainer, step: int, arrays: Mapping[str, Any]) -> State:
    """The state of a model that has grown since `arrays` were kept, as those of a checkpoint.

    As `Trainer.from_arrays`, but blocks that the arrays do not hold begin fresh, and so does the
    optimiser state of a block that was frozen and is so no more. Averages of weights that had none
    begin as these.

    Raises:
        ValueError: the arrays do not hold the first block, or of a block that they hold an array
            is missing or has another shape.
    """
    held = {tuple(name.split("/")[:2]) for name in arrays}
    blocks = {block for block, *_ in held}

    def is_fresh(name: str) -> bool:
        block, kind = name.split("/")[:2]
        return block not in blocks or (kind == "opt" and (block, kind) not in held)

    fresh = trainer.to_arrays(trainer.init())
    begun = {name: leaf for name, leaf in fresh.items() if is_fresh(name)}
    if any(name.startswith("block_0/params/") for name in begun):
        raise ValueError("arrays hold no block_0, with which the model begins: nothing has grown")
    averages = {
        name: arrays[name.replace("/ema/", "/", 1)].astype(leaf.dtype)
        for name, leaf in fresh.items()
        if name.split("/")[1] == "ema" and name not in arrays and name not in begun
    }
    return trainer.from_arrays(step, {**begun, **averages, **arrays})


class Readout(nnx.Module):
    """Classifier of a model that is yet to grow: one dense layer.

    It reads the means of feature maps, the summary of a sequence, or all else as it is.

    Args:
        info: where it is attached.
    """

    def __init__(self, info: BlockInfo, rngs: nnx.Rngs):
        size = pooled_info(info, 1).size
        self.dense = layers.perceptron(size, (info.num_classes,), **info.options(rngs))

    def __call__(self, features: Any) -> jax.Array:
        """Logits `[batch, classes]`."""
        return self.dense(pool_maps(features, 1))


def phases(
    model: Model,
    method: Method,
    counts: Sequence[int],
    carry: Mapping[str, Any],
    num_classes: int,
    *,
    seed: int = 0,
) -> tuple[Model, ...]:
    """What a model is while it grows: its first blocks, then more, at last all.

    Where the method trains a classifier, each but the last gets a `Readout` of its own.

    Args:
        model: the whole model.
        method: what is to train it.
        counts: rising numbers of blocks, the last that of all.
        carry: shapes of a batch as the first block reads it.
        num_classes: number of classes of the labels.
        seed: root of the initial weights.

    Raises:
        ValueError: counts that do not rise to the number of the model's blocks, or a method that is
            not local.
    """
    blocks = model.blocks
    if not method.route.local:
        raise ValueError(
            f"blocks is {tuple(counts)}: to grow needs a local method, given {method.name}"
        )
    if not counts or counts[-1] != len(blocks):
        raise ValueError(
            f"blocks is {tuple(counts)}: the last must be the number of the model's blocks, "
            f"{len(blocks)}"
        )
    outputs = block_outputs(blocks, dict(carry))
    # Keys that no head and no step has.
    root = jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))
    before: Model | None = None
    for count in counts[:-1]:
        classifier = None
        if method.objective.trains_classifier:
            rngs = nnx.Rngs(jax.random.fold_in(root, np.uint32(2**32 - 1 - count)))
            where = BlockInfo(count - 1, count, outputs[count - 1], num_classes, init=method.init)
            classifier = Readout(where, rngs)
        before = Model(blocks[:count], classifier, before=before)
    whole = Model(blocks, model.classifier, splits=model.splits, before=before)
    return _lineage(whole)


def _lineage(model: Model) -> tuple[Model, ...]:
    """A model and all that it was grown from, the first of them first."""
    return (*(_lineage(model.before) if model.before else ()), model)
