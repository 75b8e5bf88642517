"""A block with its head as pure functions over flat dicts of arrays."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple.methods.objectives import Descending, HeadOutput, Scaling
from jdecouple.methods.objectives.following import Source
from jdecouple.methods.routes import loss_scale
from jdecouple.models.channels import NO_CHANNELS, Alive, handed, handed_entries, read_entries
from jdecouple.models.materialized import materialize
from jdecouple.models.reversible import is_reversible

Arrays = dict[str, jax.Array]
Carry = dict[str, Any]
"""What a stage hands on: "x", "label" and what heads add, of arrays with the batch axis first.

Where channels are alive (`jdecouple.models.channels`), "x" is a dict of the activation "x" and of
them: they go up with it, and their error comes down with its.
"""
Train = Callable[..., tuple[Any, HeadOutput | None, Arrays]]

_RESERVED = ("x", "label", "loss", "weight")


class Tie(NamedTuple):
    """A parameter that several blocks share.

    Attributes:
        uses: index of every block that uses it, in order, and its name there.
    """

    uses: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        """That of the first block's copy among the arrays of a state."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all copies there."""
        return tuple(f"block_{block}/params/{name}" for block, name in self.uses)


class _Pair(nnx.Module):
    def __init__(self, block: nnx.Module, head: nnx.Module | None):
        self.block = block
        self.head = head


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One block and the head that an objective gave it, split once.

    Flat dicts instead of module objects cross the jit boundary: flattening them costs
    microseconds, and their keys ("block/conv/kernel") name the leaves of a checkpoint.

    Attributes:
        index: index of the block in the model.
        params: trained variables by name.
        stats: all other variables (BatchNorm statistics, ...) by name, moved by the forward.
        has_loss: whether the block trains on the loss of a head of its own.
        descends: whether the head is one whose answer comes down from the last block.
        dtype: compute dtype; parameters and activations are cast to it. None casts nothing.
        inputs: entries that the block reads beside "x"; it names them in its attribute `inputs` and
            is called with them by name.
        outputs: entries that it hands on, which it names in its attribute `outputs`.
        channels: which of those that blocks hand on are alive before and behind it.
        frozen: whether nothing of the block and its head is trained.
        hands_on: whether the head writes into the carry.
        scales: factors on an optimiser's updates by the names of parameters; 1 for all others.
        follows: what of the block above moving averages follow, by their names in the statistics.
        shared: names of the parameters that other units use, too.
        reversible: whether the block has an inverse, and neither a head nor anything by name.
    """

    index: int
    params: dict[str, nnx.Variable]
    stats: dict[str, nnx.Variable]
    has_loss: bool
    descends: bool
    dtype: Any
    _paths: dict[str, tuple]
    _keys: dict[tuple, nnx.Variable]
    _definitions: dict[bool, nnx.GraphDef]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    channels: Alive = NO_CHANNELS
    frozen: bool = False
    hands_on: bool = False
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    follows: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    reversible: bool = False
    _shared: Train | None = None

    @classmethod
    def build(
        cls,
        index: int,
        block: nnx.Module,
        head: nnx.Module | None,
        dtype: Any,
        channels: Alive = NO_CHANNELS,
    ) -> "Unit":
        """Splits a block and its head; neither object is changed."""
        pair = nnx.clone(_Pair(block, head))
        definitions: dict[bool, nnx.GraphDef] = {}
        for train in (False, True):
            pair.train() if train else pair.eval()
            definitions[train], params, keys, stats = nnx.split(  # type: ignore[misc]
                pair, nnx.Param, nnx.RngState, ...
            )
        paths: dict[str, tuple] = {}

        def flat(state: nnx.State) -> dict[str, nnx.Variable]:
            named = {}
            for path, variable in nnx.to_flat_state(state):
                name = "/".join(map(str, path))
                paths[name] = path
                named[name] = variable
            return named

        trained, others = flat(params), flat(stats)
        sources = {name: Source.of(variable) for name, variable in others.items()}
        return cls(
            index=index,
            params=trained,
            stats=others,
            has_loss=head is not None,
            descends=isinstance(head, Descending),
            dtype=dtype,
            _paths=paths,
            _keys=dict(nnx.to_flat_state(keys)),
            _definitions=definitions,
            inputs=_free_names(index, "inputs", read_entries(block)),
            outputs=_free_names(index, "outputs", handed_entries(block)),
            channels=channels,
            reversible=head is None and channels == NO_CHANNELS and is_reversible(block),
            scales=_scales(index, head, trained),
            follows={name: source for name, source in sources.items() if source},
        )

    def same_definition(self, other: "Unit") -> bool:
        """Whether another unit is made of equal modules, whatever their arrays."""
        names = self.inputs, self.outputs, self.channels
        others = other.inputs, other.outputs, other.channels
        return names == others and self._definitions == other._definitions

    @property
    def entries(self) -> tuple[str, ...]:
        """Entries of the carry that the block reads."""
        before = self.channels.before
        return ("x", *(name for name in self.inputs if name not in before))

    def same_program(self, other: "Unit") -> bool:
        """Whether another unit computes the same from arrays of the same shapes."""
        try:
            same = self.same_definition(other)
        except (TypeError, ValueError):  # modules that hold arrays which are no variables
            return False
        shapes, others = (jax.eval_shape(unit.initial) for unit in (self, other))
        return same and self.dtype == other.dtype and shapes == others

    def initial(self) -> tuple[Arrays, Arrays]:
        """Initial parameters and statistics, as the modules carry them.

        Those of an abstract unit are zeros, which are to be traced and not computed.
        """
        return (
            {name: _value(variable) for name, variable in self.params.items()},
            {name: _value(variable) for name, variable in self.stats.items()},
        )

    def variables(self) -> tuple[dict[str, nnx.Variable], dict[str, nnx.Variable], list]:
        """Parameters, statistics and keys, whose values `abstract` takes as shapes."""
        return self.params, self.stats, list(self._keys.values())

    def abstract(self, variables: tuple) -> "Unit":
        """The unit with variables that hold shapes instead of arrays: `variables` of that kind."""
        params, stats, keys = variables
        paths = dict(zip(self._keys, keys, strict=True))
        return dataclasses.replace(self, params=params, stats=stats, _keys=paths, _shared=None)

    def train(
        self, params: Arrays, stats: Arrays, carry: Carry, key: jax.Array
    ) -> tuple[Any, HeadOutput | None, Arrays]:
        """Training forward on `carry["x"]`; every random stream of the block comes from `key`.

        Returns the "x" behind the block, the head's output (None without one), moved statistics.
        """
        module = self._module(True, params, stats, key)
        features, sent, carry = self._call(module.block, carry)
        output = None if module.head is None else module.head(features, carry)
        moved = nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        values = {path: variable.get_value() for path, variable in nnx.to_flat_state(moved)}
        new_stats = {
            name: values[self._paths[name]].astype(variable.get_value().dtype)
            for name, variable in self.stats.items()
        }
        new_stats |= {name: stats[name] for name in self.follows}
        if loss_scale.is_for(self.dtype):  # no step undoes what an activation's overflow leaves
            new_stats = {
                name: jnp.where(jnp.isfinite(new), new, stats[name])
                if jnp.issubdtype(new.dtype, jnp.floating)
                else new
                for name, new in new_stats.items()
            }
        return sent, output, new_stats

    @property
    def train_inline(self) -> Train:
        """`train` for traced arguments, traced once for all units that share it."""
        return self._shared or self.train

    def head_outputs(self, features: Any, carry: Carry) -> Carry:
        """Shapes of what the head writes into the carry, from those of the features and of it.

        Raises:
            ValueError: an entry that is not for heads to write.
        """

        def head(params, stats, features, carry, key):
            head = self._module(True, params, stats, key).head
            return {} if head is None else dict(head(features, self.opened(carry)).carry)

        key = jax.eval_shape(lambda: jax.random.key(0))
        outputs = jax.eval_shape(head, *jax.eval_shape(self.initial), features, carry, key)
        if reserved := {"x", "loss"} & outputs.keys():
            raise ValueError(
                f"the head of block {self.index} writes {', '.join(sorted(reserved))} into the "
                "carry: all names but x and loss are allowed"
            )
        return outputs

    def evaluate(self, params: Arrays, stats: Arrays, carry: Carry) -> tuple[Any, jax.Array | None]:
        """Evaluation forward: the "x" behind the block, and its exit's logits, if it has one."""
        module = self._module(False, params, stats, jax.random.key(0))
        features, sent, _ = self._call(module.block, carry)
        logits = None if module.head is None else module.head.logits(features)
        return sent, logits

    def pass_on(self, params: Arrays, stats: Arrays, carry: Carry) -> tuple[Any, HeadOutput | None]:
        """Evaluation forward in training, of a block that is frozen.

        Returns the "x" behind the block, and the output of a head that writes into the carry.
        """
        module = self._module(False, params, stats, jax.random.key(0))
        features, sent, carry = self._call(module.block, carry)
        return sent, module.head(features, carry) if self.hands_on else None

    def invert(self, params: Arrays, stats: Arrays, x: Any, key: jax.Array) -> Any:
        """The input of a reversible block in training, of its output; `key` as in `train`."""
        block = self._module(True, params, stats, key).block
        return block.inverse(_cast(x, self.dtype))

    def turn(self, params: Arrays, stats: Arrays, features: Any) -> Any:
        """What comes down from the last block, whose output the features are."""
        return self._module(False, params, stats, jax.random.key(0)).head.turn(features)

    def descend(self, params: Arrays, stats: Arrays, target: Any) -> Any:
        """What the block below gets for what came down."""
        return self._module(False, params, stats, jax.random.key(0)).head.descend(target)

    def following(self, stats: Arrays, above: Arrays) -> Arrays:
        """Statistics behind a batch, from parameters and averages of the block above in it."""
        if self.frozen or not self.follows:
            return stats
        moved = {}
        for name, source in self.follows.items():
            now = above[source.name].astype(stats[name].dtype)
            moved[name] = source.momentum * stats[name] + (1 - source.momentum) * now
        return {**stats, **moved}

    def own(self, arrays: Arrays) -> Arrays:
        """Of arrays by the names of parameters those that no other unit shares."""
        if not self.shared:
            return arrays
        return {name: leaf for name, leaf in arrays.items() if name not in self.shared}

    def scaled(self, updates: Arrays) -> Arrays:
        """An optimiser's updates by the names of parameters, times the factors."""
        if not self.scales:
            return updates
        return {name: self.scales.get(name, 1.0) * update for name, update in updates.items()}

    def modules(self, params: Arrays, stats: Arrays) -> tuple[nnx.Module, nnx.Module | None]:
        """The block and its head as nnx modules in training mode, with the given values."""
        keys = {path: key.replace(key.get_value()) for path, key in self._keys.items()}
        pair = self._merge(True, params, stats, keys)
        return pair.block, pair.head

    def features(self, sent: Any) -> Any:
        """The block's output of the "x" behind it."""
        return sent["x"] if self.channels.behind else sent

    def opened(self, carry: Carry) -> Carry:
        """The carry as a head sees it: its "x" is the activation alone."""
        return {**carry, "x": carry["x"]["x"]} if self.channels.before else carry

    def _call(self, block: Any, carry: Carry) -> tuple[Any, Any, Carry]:
        """The block's output, the "x" behind it, and the carry as a head sees it."""
        opened = self.opened(carry)
        known = {name: carry["x"][name] for name in self.channels.before}
        others = {name: _cast({**carry, **known}[name], self.dtype) for name in self.inputs}
        features, new = handed(block, block(_cast(opened["x"], self.dtype), **others))
        features = materialize(features)
        known |= new
        behind = {name: known[name] for name in self.channels.behind}
        return features, {"x": features, **behind} if behind else features, opened

    def _module(self, train: bool, params: Arrays, stats: Arrays, key: jax.Array) -> Any:
        streams = {}
        for number, (path, variable) in enumerate(self._keys.items()):
            is_key, old = isinstance(variable, nnx.RngKey), variable.get_value()
            new = jax.random.fold_in(key, number) if is_key else jnp.zeros_like(old)
            streams[path] = variable.replace(new)
        averages = {name: stats[name] for name in self.follows}
        stats = {**stats, **_cast(averages, self.dtype)}
        return self._merge(train, _cast(params, self.dtype), stats, streams)

    def _merge(
        self, train: bool, params: Arrays, stats: Arrays, streams: Mapping[tuple, nnx.Variable]
    ) -> Any:
        flat = [
            (self._paths[name], templates[name].replace(values[name]))
            for templates, values in ((self.params, params), (self.stats, stats))
            for name in templates
        ]
        return nnx.merge(self._definitions[train], nnx.from_flat_state([*flat, *streams.items()]))


def parameters(block: nnx.Module, head: nnx.Module | None) -> dict[str, nnx.Variable]:
    """The parameters of a block and its head themselves, by their names in a unit."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(_Pair(block, head))
        if isinstance(node, nnx.Param)
    }


def find_ties(parameters: Sequence[Mapping[str, nnx.Variable]]) -> tuple[Tie, ...]:
    """The parameters that several units use, from those of each."""
    uses: dict[int, list[tuple[int, str]]] = {}
    for index, named in enumerate(parameters):
        for name, variable in named.items():
            uses.setdefault(id(variable), []).append((index, name))
    return tuple(Tie(tuple(own)) for own in uses.values() if len(own) > 1)


def _free_names(index: int, attribute: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that a block has in `inputs` or `outputs`; ValueError for one that is taken."""
    if wrong := [name for name in names if name in _RESERVED]:
        raise ValueError(
            f"block {index} names {wrong[0]!r} in its {attribute}: another entry than "
            f"{', '.join(_RESERVED)} is needed"
        )
    return names


def _scales(index: int, head: nnx.Module | None, names: Iterable[str]) -> dict[str, float]:
    """Factors on the updates of the parameters of those parts that a head gives another rate."""
    scales: dict[str, float] = {}
    if not isinstance(head, Scaling):
        return scales
    for part, scale in head.lr_scales.items():
        found = [name for name in names if name.startswith(f"head/{part}/")]
        if not found:
            raise ValueError(f"the head of block {index} has no parameters in {part!r} to scale")
        scales |= dict.fromkeys(found, scale)
    return scales


def share_traces(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Lets neighbouring units of one program share what JAX traces and differentiates of it.

    The operations are those of `Unit.train`, in its order: the compiler sees no difference.
    """
    runs: list[list[Unit]] = []
    for unit in units:
        if runs and runs[-1][0].same_program(unit):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return tuple(
        unit if len(run) == 1 else dataclasses.replace(unit, _shared=shared)
        for run, shared in zip(runs, (_inlined(first) for first, *_ in runs), strict=True)
        for unit in run
    )


def _inlined(unit: Unit) -> Train:
    def train(*arguments: Any) -> tuple[Any, HeadOutput | None, Arrays]:
        features, output, stats = unit.train(*arguments)
        return features, output and output._replace(carry=dict(output.carry)), stats

    return jax.jit(train, inline=True)


def share(ties: Sequence[Tie], modules: Sequence[tuple[nnx.Module | None, Any]]) -> None:
    """Lets blocks and heads, one pair a unit, share what is tied; (None, None) stays as it is."""

    def child(node: Any, key: str) -> Any:
        return node[int(key)] if key.isdigit() else getattr(node, key)

    for tie in ties:
        variable = None
        for index, name in tie.uses:
            part, *path, last = name.split("/")
            module = modules[index][part == "head"]
            if module is None:
                continue
            holder = functools.reduce(child, path, module)
            variable = child(holder, last) if variable is None else variable
            if last.isdigit():
                holder[int(last)] = variable  # type: ignore[index]
            else:
                setattr(holder, last, variable)


def _value(variable: nnx.Variable) -> Any:
    value = variable.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        return jnp.zeros(value.shape, value.dtype)
    return value


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
