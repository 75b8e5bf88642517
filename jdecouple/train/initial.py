"""What a new run begins with: fresh weights, or those of another run (fine-tuning)."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jdecouple._errors import first_line
from jdecouple._files import any_folder
from jdecouple.data.inputs import Inputs, TextInputs, TokenInputs, from_json
from jdecouple.inference.load import read_weights
from jdecouple.pipeline.state import spec
from jdecouple.train import hosts
from jdecouple.train.config import ConfigError
from jdecouple.train.run import Run
from jdecouple.trainer import State, Trainer


def begin(run: Run, trainer: Trainer, processes: hosts.MultiProcess) -> State:
    """The state of a trainer for a new run, step 0, with weights of `init_from` where that is set.

    A line tells what is taken. The first process reads and sends every other one what its stages
    need. All call it.

    Raises:
        ConfigError: `init_from` holds no checkpoint that can be used, or another network's.
    """
    if run.config.init_from is not None:
        found: dict[str, np.ndarray] = {}
        if processes.first:
            found, told = _taken(run, trainer)
            print(told, flush=True)
        wanted = [*_weights(trainer, addressable=True)]
        _set_weights(trainer, hosts.scatter(processes, wanted, found))
    return trainer.init()


def _weights(trainer: Trainer, addressable: bool = False) -> dict[str, Any]:
    """Shapes of weights and statistics by name."""
    shapes = trainer.to_arrays(trainer.abstract(addressable=addressable))
    return {
        name: leaf for name, leaf in shapes.items() if name.split("/")[1] in ("params", "stats")
    }


def _set_weights(trainer: Trainer, arrays: Mapping[str, np.ndarray]) -> None:
    """Lets a trainer, whose states optimisers may read, begin with other weights."""
    for unit in itertools.chain.from_iterable(stage.units for stage in trainer.stages):
        for kind, variables in (("params", unit.params), ("stats", unit.stats)):
            for key, variable in variables.items():
                if (name := f"block_{unit.index}/{kind}/{key}") in arrays:
                    variable.set_value(arrays[name])


def _taken(run: Run, trainer: Trainer) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of another run that this one begins with, and what to say of them."""
    given = run.config.init_from
    place, step = _place_and_step(given)
    try:
        restored = read_weights(any_folder(place), step)
        _check_words(run.dataset.inputs, restored.extra)
        held = {name: spec(array) for name, array in restored.arrays.items()}
        needed = {name: spec(leaf) for name, leaf in _weights(trainer).items()}
        for name in dict.fromkeys([*needed, *held]):
            has, needs = held.get(name, "nothing"), needed.get(name, "nothing")
            if _part(name)[1] == "block" and has != needs:
                raise ValueError(
                    f"checkpoint {restored.step} holds {has} as {name!r}, this network {needs}"
                    f"{_other_cut(run, restored.extra)}"
                )
    except (OSError, ValueError) as error:
        raise ConfigError(f"config.init_from is {given!r}: {first_line(error)}") from error
    ours, theirs = _parts(needed), _parts(held)
    same = [part for part in ours if ours[part] == theirs.get(part)]
    fresh = [part for part in ours if part not in same]
    told = (
        f"begins with checkpoint {restored.step} of {place}; taken: {_listed(same)}; fresh: "
        f"{', '.join(filter(None, (_listed(fresh), 'optimizer')))}"
    )
    return {name: restored.arrays[name] for name in needed if _part(name) in same}, told


def _place_and_step(given: str) -> tuple[str, int | str]:
    """A workdir, and the step behind an @ if there is one."""
    match = re.fullmatch(r"(.+)@(\d+|best|last)", given, re.DOTALL)
    if not match or any_folder(given).exists():
        return given, "best"
    return match[1], int(match[2]) if match[2].isdecimal() else match[2]


def _check_words(inputs: Inputs, extra: Mapping[str, Any]) -> None:
    """Raises ValueError where words or tokens had other numbers: their vectors are others'."""
    described = extra.get("inference", {}).get("inputs")
    before = from_json(described) if described else None
    if before is None:
        return
    if isinstance(inputs, TextInputs) and getattr(before, "words", None) != inputs.words:
        raise ValueError("its words have other numbers: texts with the same vocabulary are needed")
    if isinstance(inputs, TokenInputs) and getattr(before, "tokenizer", "") != inputs.tokenizer:
        raise ValueError("its tokens have other numbers: the same tokenizer is needed")


def _other_cut(run: Run, extra: Mapping[str, Any]) -> str:
    """What to say where the two networks have other local modules."""
    models = extra.get("identity", {}).get("model", {}), run.config.model
    theirs, ours = (model.get("cut", "units") for model in models)
    return f"; its config.model.cut is {theirs!r}, here {ours!r}" if theirs != ours else ""


def _part(name: str) -> tuple[int, str]:
    """Which part of a network an array belongs to: of which block, "block" or a part of its head.

    >>> _part("block_2/params/block/conv/kernel"), _part("block_2/stats/head/projector/norm/mean")
    ((2, 'block'), (2, 'projector'))
    """
    block, _, owner, *rest = name.split("/")
    return int(block.removeprefix("block_")), owner if owner == "block" else rest[0]


def _parts(arrays: Mapping[str, str]) -> dict[tuple[int, str], dict[str, str]]:
    """The arrays of every part."""
    parts: dict[tuple[int, str], dict[str, str]] = {}
    for name, kind in arrays.items():
        parts.setdefault(_part(name), {})[name] = kind
    return parts


def _listed(parts: Iterable[tuple[int, str]]) -> str:
    """Parts by their names, each with the blocks that have it.

    >>> _listed([(0, "block"), (0, "classifier"), (1, "block"), (2, "block")])
    'block 0-2, classifier 0'
    """
    blocks: dict[str, list[int]] = {}
    for index, part in parts:
        blocks.setdefault(part, []).append(index)
    return ", ".join(f"{part} {_ranges(indices)}" for part, indices in blocks.items())


def _ranges(numbers: Iterable[int]) -> str:
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ends = ([number for _, number in run] for _, run in runs)
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends)
