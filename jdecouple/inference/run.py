"""A trained network in use."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple._errors import first_line, gigabytes, machine_bytes, require_int
from jdecouple.data import Split, evaluation_batches
from jdecouple.data.inputs import Inputs
from jdecouple.data.token_inputs import TokenInputs
from jdecouple.inference import calibration, costs
from jdecouple.inference.adaptive import AdaptivePredictor, require_exits
from jdecouple.inference.description import Description
from jdecouple.inference.generate import Continuation, Generator, Sampling, continued
from jdecouple.inference.rules import Rule
from jdecouple.methods import Method
from jdecouple.methods.routes import Unit
from jdecouple.pipeline.batch import as_arrays
from jdecouple.pipeline.build import BuiltModel
from jdecouple.pipeline.evaluate import Evaluator
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.predict import Predictor

_NUMBER_BYTES = 4  # of a pixel or a word, as the network reads it

Arrays = dict[str, Any]
Labelled = Split | Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""Examples with labels: a split of a data set, a batch {"x": ..., "label": ...}, or several."""


class Predictions(NamedTuple):
    """What a network answers to n inputs.

    Attributes:
        logits: of every exit, float32 [exits, n, classes]; nan where an input had left before.
        probabilities: of the exit that was used, float32 [n, classes].
        labels: the likeliest class there, integers [n].
        class_names: of all classes, by label.
        exit: the exit that was used, one of `Run.exits`, integers [n].
    """

    logits: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    exit: np.ndarray

    @property
    def names(self) -> list[str]:
        """The class name of every label."""
        return [self.class_names[label] for label in self.labels]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained network: what `load` returns.

    Attributes:
        workdir: where it was trained.
        step: that of the checkpoint.
        description: how it is built.
        method: what trained it.
        built: its blocks with their heads, and what they receive.
        params: trained arrays by name, a dict for each block.
        stats: all other arrays, such as BatchNorm statistics, likewise.
        boundaries: index of the first block of every stage.
        placements: devices of every stage.
    """

    workdir: Path
    step: int
    description: Description
    method: Method
    built: BuiltModel
    params: tuple[Arrays, ...]
    stats: tuple[Arrays, ...]
    boundaries: tuple[int, ...]
    placements: tuple[StageDevices, ...]
    _leaving: dict[Any, AdaptivePredictor] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def units(self) -> tuple[Unit, ...]:
        """Its blocks with their heads, as functions of arrays."""
        return self.built.units

    @property
    def inputs(self) -> Inputs:
        """What it reads: `ImageInputs` or `TextInputs`."""
        return self.description.inputs

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """What its labels stand for."""
        return tuple(self.description.class_names)

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """Number of every exit: that of its block, as in the metrics of training."""
        return self.predictor.exits

    @cached_property
    def predictor(self) -> Predictor:
        """The evaluation forward of the stages, for inputs such as were trained on."""
        return self._predictor(self.inputs.example[1])

    @cached_property
    def _float_predictor(self) -> Predictor:
        return self._predictor("float32")

    def _predictor(self, dtype: str) -> Predictor:
        example = self.description.example()
        example["x"] = jax.ShapeDtypeStruct(example["x"].shape, dtype)
        return Predictor(
            [self.units[a:b] for a, b in self._cuts],
            self.placements,
            transform=self.inputs.transform("none"),
            seed=self.description.seed,
            example=example,
        )

    def _predictor_for(self, x: np.ndarray) -> Predictor:
        same = x.dtype == self.inputs.example[1]
        return self.predictor if same else self._float_predictor

    def predict(
        self, x: Any, exit: int | Rule | None = None, batch_size: int | None = None
    ) -> Predictions:
        """Classifies images or texts.

        The logits are those that training's evaluation scored, to the last bit, where the batches
        are as large and the replicas of each stage as many.

        Args:
            x: what `inputs.encode` takes: uint8 or float arrays, Pillow images, paths of images or
                of a folder of them; strings or numbers of words; one or several.
            exit: number of the exit that labels are read at, by default the last; or a rule by
                which every input leaves early.
            batch_size: inputs that are computed together, by default as in training's evaluation;
                fewer are padded to it.

        Raises:
            TypeError, ValueError: what `inputs.encode` refuses, an exit that there is not, or a
                batch that is more than the memory.
        """
        self.require_classes()
        size, x = self.rows(batch_size), self.inputs.encode(x)
        with _in_memory(size):
            return self._predict(x, exit, size)

    def require_classes(self) -> None:
        """Raises ValueError unless the network classifies whole inputs."""
        if self.inputs.kind == "tokens":
            raise ValueError("the network goes on with texts: evaluate and generate are for it")

    def measure(self, data: Labelled, batch_size: int | None = None) -> dict[str, float]:
        """Loss and accuracy of every exit on labelled examples, added up where they are computed.

        Args:
            data: as of `logits`.
            batch_size: as of `predict`.

        Returns:
            What `jdecouple.Trainer.evaluate` does.

        Raises:
            ValueError: there are no examples, or others than the network reads.
        """
        size = self.rows(batch_size)
        with _in_memory(size):
            batches = _batches(data, size)
            return Evaluator(self.predictor)(self._states, batches, len(self.class_names))

    def generate(
        self,
        prompt: str,
        max_tokens: int = 256,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        exit: int | Rule | None = None,
    ) -> Continuation:
        """Goes on with a text, in the dtype of the weights.

        Args:
            prompt: the beginning of a document, "" for a new one. Of one that is longer than the
                context of the network, the end is seen.
            max_tokens: after which it ends, if the document has not.
            temperature: what logits are divided by; 0: the likeliest token is taken.
            top_k: so many of the likeliest tokens may be chosen; 0: all.
            seed: of the draws.
            exit: number of the exit that tells the next token, by default the last; or a rule by
                which every token that is new leaves early, see `jdecouple.inference.generate`.

        Returns:
            What follows on the prompt, a `str`, with the exit of every token.

        Raises:
            ValueError: a value out of range, or a network that goes on with no texts.
        """
        sampling = Sampling(temperature, top_k, seed)
        if not isinstance(self.inputs, TokenInputs):
            raise ValueError(f"the network reads {self.inputs.kind}: it goes on with no texts")
        rule, exits = None, self.exits
        if isinstance(exit, Rule):
            require_exits(self.predictor)
            rule = exit
        else:
            exits = (exits[self._index(exit)],)
        heads = [head if i in exits else None for i, head in enumerate(self.heads)]
        count = exits[-1] + 1
        generator = Generator(self.blocks[:count], heads[:count], self.inputs.context, rule)
        return continued(generator, self.inputs.pieces, prompt, exits, max_tokens, sampling)

    def _predict(self, x: np.ndarray, exit: int | Rule | None, size: int) -> Predictions:
        predictor = self._predictor_for(x)
        parts = (x[first : first + size] for first in range(0, len(x), size))
        batches = map(self.inputs.entries, parts)
        if isinstance(exit, Rule):
            key = exit, size, predictor
            if key not in self._leaving:
                self._leaving[key] = AdaptivePredictor(predictor, self._states, exit, size)
            answers, used = self._leaving[key].predict(batches)
            logits = np.full((len(self.exits), *answers.shape), np.nan, answers.dtype)
            logits[used, np.arange(len(used))] = answers
        else:
            used = np.full(len(x), self._index(exit))
            logits = predictor.predict(self._states, batches, size=size)
            answers = logits[used, np.arange(len(used))]
        powers = np.exp(answers - answers.max(axis=-1, keepdims=True))
        probabilities = powers / powers.sum(axis=-1, keepdims=True)
        labels, exits = answers.argmax(axis=-1), np.array(self.exits)[used]
        return Predictions(logits, probabilities, labels, self.class_names, exits)

    def logits(
        self, data: Labelled, batch_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits of all exits, [exits, n, classes], and labels [n] of labelled examples.

        Raises:
            ValueError: there are none, or others than the network reads, or a batch that is more
                than the memory.
        """
        self.require_classes()
        size = self.rows(batch_size)
        labels: list[np.ndarray] = []

        def batches() -> Iterator[Mapping[str, Any]]:
            for batch in _batches(data, size):
                labels.append(np.asarray(as_arrays(batch)["label"]))
                yield self.inputs.entries(self.inputs.encode(self.inputs.whole(batch)))

        given = batches()
        if (first := next(given, None)) is None:
            raise ValueError("there are no examples: at least one is needed")
        predictor = self._predictor_for(first["x"])
        with _in_memory(size):
            logits = predictor.predict(self._states, itertools.chain([first], given), size=size)
        return logits, np.concatenate(labels)

    def calibrate(
        self,
        data: Labelled,
        *,
        accuracy: float | None = None,
        cost: float | None = None,
        rule: str = "confidence",
        patience: int = 1,
        temperatures: Any = 1.0,
        costs: Any = None,
    ) -> Rule:
        """Chooses thresholds by which inputs leave early, see `calibration.choose`.

        Args:
            data: validation examples; never those that the result is measured on.
            accuracy: the smallest fraction of right answers, or
            cost: the largest mean cost of an example, in the unit of `costs`.
            rule: one of `rules.NAMES`.
            patience: exits in succession that must be sure.
            temperatures: what logits are divided by: of all exits, or of each.
            costs: of an example up to every exit, [exits]: by default floating-point operations
                (`Run.costs`); what `Run.seconds` returns for a wish in time.

        Raises:
            TypeError, ValueError: what `calibration.choose` refuses, or a network of one exit.
        """
        require_exits(self.predictor)
        options = {"accuracy": accuracy, "cost": cost, "temperatures": temperatures}
        logits, labels = self.logits(data)
        costs = self.costs if costs is None else costs
        return calibration.choose(rule, logits, labels, costs, patience=patience, **options)

    @cached_property
    def costs(self) -> np.ndarray:
        """Floating-point operations of an example up to every exit, [exits]."""
        return costs.flops_by_exit(self.units, self.built.carries)

    def seconds(self, x: Any, batch_size: int | None = None, runs: int = 7) -> np.ndarray:
        """Seconds of an input up to every exit, [exits], measured on these.

        Args:
            x: as of `predict`; several full batches tell more than a part of one.
            batch_size: as of `predict`.
            runs: measurements of each exit, of which the median counts.
        """
        x, count = self.inputs.encode(x), len(self.exits)

        def answer(exit: int) -> np.ndarray:
            leaves = Rule("confidence", (*[math.inf] * exit, *[0.0] * (count - exit)))
            return self.predict(x, leaves, batch_size).logits

        return costs.seconds_by_exit(answer, count, len(x), runs=runs)

    def export(
        self,
        folder: str | os.PathLike[str],
        exit: int | str | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Path:
        """Writes the network, or its first blocks and their exit, for others; see `export.export`.

        Args:
            folder: a new or an empty one.
            exit: number of the exit to end at, by default the last; or "all".
            batch_size: the only number of inputs, by default any.
            **options: other arguments of `export.export`.
        """
        self.require_classes()
        if any(unit.entries != ("x",) for unit in self.units):
            raise ValueError("export takes one input: this network reads further parts of a text")
        from jdecouple.inference.export import export  # whose packages nothing else needs

        shape, dtype = self.inputs.example
        known = self.description.to_json()
        about = {key: known[key] for key in ("model", "method")}
        about["class_names"] = self.class_names
        about["inputs"] = {"kind": self.inputs.kind, **dataclasses.asdict(self.inputs)}
        return export(
            folder,
            self.units,
            self.params,
            self.stats,
            jax.ShapeDtypeStruct(shape, dtype),
            transform=self.inputs.transform("none"),
            exit=exit,
            batch_size=batch_size,
            about={**about, "step": self.step},
            **options,
        )

    @property
    def blocks(self) -> list[nnx.Module]:
        """Its blocks, in evaluation mode; the first reads what `transform` returns."""
        return [block for block, _ in self._modules]

    @property
    def heads(self) -> list[nnx.Module | None]:
        """The head of every block, in evaluation mode; None where it has none."""
        return [head for _, head in self._modules]

    @property
    def classifier(self) -> nnx.Module | None:
        """The model's classifier, in evaluation mode; None where the method trains none."""
        trained = self.method.objective.trains_classifier
        return getattr(self.heads[-1], "classifier", None) if trained else None

    def transform(self, x: Any) -> jax.Array:
        """What the first block reads, of what `inputs.encode` takes."""
        batch, transform = {"x": jnp.asarray(self.inputs.encode(x))}, self.inputs.transform("none")
        return (transform(batch, None, False) if transform else batch)["x"]

    def _index(self, exit: int | None) -> int:
        chosen = self.exits[-1] if exit is None else exit
        if isinstance(chosen, bool) or chosen not in self.exits:
            allowed = ", ".join(map(str, self.exits))
            raise ValueError(f"exit is {exit!r}: allowed are {allowed}, or a rule")
        return self.exits.index(chosen)

    def rows(self, batch_size: int | None) -> int:
        """Rows of a batch, of which every replica has as many.

        Raises:
            ValueError: a size that is no whole number, or whose inputs are more than the memory.
        """
        size = self.description.batch_size if batch_size is None else batch_size
        require_int(1, batch_size=size)
        needed = size * math.prod(self.inputs.example[0]) * _NUMBER_BYTES
        if needed > (have := machine_bytes()):
            raise ValueError(
                f"batch_size is {size}: its inputs need {gigabytes(needed)} in memory, but this "
                f"machine has {gigabytes(have)}"
            )
        replicas = self.predictor.replicas
        return -(-size // replicas) * replicas

    @cached_property
    def _modules(self) -> list[tuple[nnx.Module, nnx.Module | None]]:
        pairs = []
        for unit, params, stats in zip(self.units, self.params, self.stats, strict=True):
            block, head = unit.modules(*jax.tree.map(jnp.asarray, (params, stats)))
            for module in (block, head):
                if module is not None:
                    module.eval()
            pairs.append((block, head))
        return pairs

    @cached_property
    def _states(self) -> tuple:
        """The arrays of every stage, on its devices."""
        return self.predictor.place(
            [{"params": self.params[a:b], "stats": self.stats[a:b]} for a, b in self._cuts]
        )

    @property
    def _cuts(self) -> list[tuple[int, int]]:
        return [*itertools.pairwise((*self.boundaries, len(self.units)))]


@contextlib.contextmanager
def _in_memory(size: int) -> Iterator[None]:
    """Turns an error about a lack of memory, here or of a device, into a ValueError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(
                f"batch_size is {size}: there is not enough memory for so many inputs at once "
                f"({first_line(error)})"
            ) from error
        raise


def _batches(data: Labelled, size: int) -> Iterable[Mapping[str, Any]]:
    if isinstance(data, Split):
        return evaluation_batches(data, size)
    return [data] if isinstance(data, Mapping) else data
