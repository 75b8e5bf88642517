"""A trained network, taken from a workdir without the data that it was trained on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import logging

from jdecouple._errors import first_line
from jdecouple._files import absolute, any_folder
from jdecouple.inference.description import Description, Network
from jdecouple.inference.run import Arrays, Run
from jdecouple.methods.routes import Unit
from jdecouple.pipeline.build import split_blocks
from jdecouple.pipeline.mesh import StageDevices, StageMesh, as_stage_mesh, make_mesh
from jdecouple.pipeline.state import spec

if TYPE_CHECKING:
    from jdecouple.checkpoint import Checkpointer, Restored

_ATTEMPTS = 10  # to read what a training may have just deleted
_KINDS = ("params", "stats")
_AVERAGES = "ema"  # of both, where a run keeps them


def load(
    workdir: str | os.PathLike[str],
    step: int | str = "best",
    *,
    mesh: StageMesh | jax.sharding.Mesh | None = None,
) -> Run:
    """Loads a trained network; the data are not needed, and nothing is written.

    It has the averages of the weights, where these were trained with `ema`. A training may go on in
    the workdir meanwhile.

    Args:
        workdir: what it was trained with.
        step: that of a checkpoint, "last", or "best": the one of the highest validation accuracy,
            the last where none has been validated. A warning tells if another one is taken, as
            that is damaged.
        mesh: what `jdecouple.make_mesh` returns, to spread the blocks over several devices; by
            default all are on the first.

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError: a mesh that is none.
        ValueError: there is no such checkpoint, or it cannot be used; in one line. A model, method
            or data set of one's own has to be registered first.
    """
    folder = any_folder(workdir)
    restored = read_weights(folder, step)
    where = f"checkpoint {restored.step} in {absolute(folder / 'checkpoints')}"
    if "inference" not in restored.extra:
        raise ValueError(
            f"{where} does not describe its network, as those of version 0.1 do not: train it on "
            "for a few steps (the same command with a larger config.steps) and load what that saves"
        )
    try:
        description = Description.from_json(restored.extra["inference"])
        network = description.build()
        values = [_values(unit, restored.arrays) for unit in network.built.units]
    except (KeyError, TypeError, ValueError) as error:
        reason = first_line(error)
        if reason.startswith(("unknown method", "unknown model")):
            reason += (
                "; one of your own is known to a program that registers it and then calls jd.load"
            )
        raise ValueError(f"{where} cannot be loaded: {reason}") from error
    groups = as_stage_mesh(make_mesh() if mesh is None else mesh).device_groups
    boundaries = _boundaries(network, description, len(groups))
    return Run(
        workdir=folder,
        step=restored.step,
        description=description,
        method=network.method,
        built=network.built,
        params=tuple(params for params, _ in values),
        stats=tuple(stats for _, stats in values),
        boundaries=boundaries,
        placements=tuple(map(StageDevices.on, groups)),
    )


def read_weights(folder: Path, step: int | str) -> Restored:
    """Reads weights and statistics of a run, "block_0/params/..." and "block_0/stats/...".

    They are the averages of these, where the run keeps some. In place of the best or last
    checkpoint the next one is read where that is damaged; a warning tells it.

    Args:
        folder: the workdir.
        step: as of `load`.

    Raises:
        FileNotFoundError, ValueError: as of `load`.
    """
    from jdecouple.checkpoint import Checkpointer  # Orbax, which takes as long as much of JAX

    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"there is no run in '{folder}': it has no folder 'checkpoints'")
    checkpoints = Checkpointer(folder / "checkpoints", read_only=True)
    if step in ("best", "last"):
        restored = _read(checkpoints, step == "best")
    elif not isinstance(step, Integral) or isinstance(step, bool):
        raise ValueError(f"step is {step!r}: 'best', 'last' or that of a checkpoint is needed")
    else:
        restored = checkpoints.read(int(step), _is_needed)
    averages = {
        name.replace(f"/{_AVERAGES}/", "/", 1): array
        for name, array in restored.arrays.items()
        if name.split("/")[1] == _AVERAGES
    }
    arrays = {name: x for name, x in restored.arrays.items() if name.split("/")[1] in _KINDS}
    return restored._replace(arrays=arrays | averages)


def _read(checkpoints: Checkpointer, by_validation: bool) -> Restored:
    """Reads the best or last checkpoint, while a training may delete and save some."""
    damaged: dict[int, str] = {}
    for attempt in itertools.count(1):
        present = checkpoints.steps()
        sound = checkpoints.extras()
        for step in ({*present} - {*sound}) & {*checkpoints.steps()}:
            damaged[step] = "info/metadata is damaged"
        if not sound:
            reason = "".join(f": {step}: {damaged[step]}" for step in [*damaged][-1:])
            raise ValueError(f"no usable checkpoint in {checkpoints.directory}{reason}")
        best = checkpoints.best_step if by_validation else None
        chosen = max(sound) if best is None else best
        try:
            restored = checkpoints.read(chosen, _is_needed)
        except ValueError as error:
            if chosen in checkpoints.steps():
                damaged[chosen] = first_line(error)
                checkpoints.refuse(chosen)
            elif attempt == _ATTEMPTS:
                raise
            continue
        passed = [step for step in sorted(damaged) if by_validation or step > chosen]
        if passed:
            listed = ", ".join(map(str, passed))
            logging.warning("checkpoint %s is damaged: %d is taken instead", listed, chosen)
        return restored
    raise AssertionError


def _is_needed(name: str) -> bool:
    owner, kind, *_ = [*name.split("/"), ""]
    return owner.startswith("block_") and kind in (*_KINDS, _AVERAGES)


def _values(unit: Unit, arrays: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
    """The arrays of a unit; ValueError for one that does not fit."""
    found: tuple[Arrays, Arrays] = ({}, {})
    for kind, wanted, values in zip(_KINDS, unit.initial(), found, strict=True):
        for key, like in wanted.items():
            name = f"block_{unit.index}/{kind}/{key}"
            holds = spec(arrays[name]) if name in arrays else "nothing"
            if holds != spec(like):
                raise ValueError(
                    f"it holds {holds} as {name!r}, but the network has {spec(like)}: this program "
                    "builds another than the one that was trained"
                )
            values[key] = arrays[name]
    return found


def _boundaries(network: Network, description: Description, count: int) -> tuple[int, ...]:
    """Index of the first block of so many stages; those of training if it had as many."""
    given = description.boundaries if len(description.boundaries) == count else None
    return split_blocks(network.model, network.built, network.method.route, count, given)
