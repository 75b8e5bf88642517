"""What a configuration asks for, checked: data set, model, method and optimiser, not yet made."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from jdecouple import data, methods, models, optim
from jdecouple.methods.routes.stage import Transform
from jdecouple.train import config as configuration
from jdecouple.train import memory, phases, rates
from jdecouple.train.config import chosen
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.profile import WARM_UP_STEPS
from jdecouple.train.rules import DTYPES, MOST


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a configuration asks for, of which nothing has been made: weights need no memory yet."""

    config: ConfigDict
    dataset: data.Dataset
    transform: Transform | None
    method: methods.Method
    schedules: Sequence[optim.Schedule]
    """The learning rate of every phase."""
    optimizers: Sequence[Any]
    """That of every phase."""
    accumulate: int
    """Batches to an optimiser's step."""
    make_model: Callable[[nnx.Rngs], models.Model]
    starts: tuple[int, ...]
    steps_per_epoch: int
    total_steps: int

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments but for model, optimizer, placement and example."""
        config = self.config
        return {
            "method": self.method,
            "microbatches": config.microbatches,
            "num_classes": self.dataset.num_classes,
            "seed": config.seed,
            "transform": self.transform,
            "dtype": DTYPES[config.dtype],
            "clip_norm": config.clip_norm,
            "accumulate": config.accumulate,
            "ema": config.ema,
            "remat": config.remat,
            "fuse": False if config.profile else None,  # a timeline shows stages
            "max_in_flight": config.max_in_flight,
            "gradient_norms": config.gradient_norms,
            "wire": config.wire,
            "shard_optimizer": config.mesh.shard_optimizer,
        }


def prepare(config: ConfigDict | Mapping) -> Parts:
    """Loads the data set of a configuration and checks what else it asks for.

    Raises:
        ConfigError: in one line, whatever is wrong with the values or the data.
    """
    config = configuration.validate(config)
    with one_line(config.data, "config.data"):
        dataset = load_data(config)
        transform = dataset.transform(config.data.augment, **_augmentation(config))
    with one_line(config.method, "config.method"):
        method = methods.get(config.method.name, **method_arguments(config, dataset))
    _check_corrector(config, method)
    with one_line(config):
        steps_per_epoch = data.steps_per_epoch(dataset.train, config.batch_size)
    _check_validation(config, dataset)
    total_steps = config.steps or config.epochs * steps_per_epoch
    accumulate = max(config.accumulate, method.route.accumulate)  # not both, says the trainer
    _check_length(config, total_steps)
    starts = phases.starts(config, steps_per_epoch)
    _check_accumulate(config, [*starts, total_steps], accumulate)
    with one_line(config.optimizer, "config.optimizer"):
        lengths = phases.scheduled(config, starts, total_steps)
        schedules = [rates.schedule(config, steps, steps_per_epoch) for steps in lengths]
        optimizers = [rates.optimizer(config, each, accumulate) for each in schedules]
    make_model = functools.partial(_model, config, dataset)
    return Parts(
        config,
        dataset,
        transform,
        method,
        schedules,
        optimizers,
        accumulate,
        make_model,
        starts,
        steps_per_epoch,
        total_steps,
    )


def _check_corrector(config: ConfigDict, method: methods.Method) -> None:
    """Raises ConfigError for a corrector of gradients that are not late."""
    if config.corrector.name != "none" and not method.route.delay(0, num_stages=2):
        raise ConfigError(
            f"config.corrector.name is {config.corrector.name!r}: by method {method.name!r} no "
            "gradient is late; leave it at 'none'"
        )


def _check_validation(config: ConfigDict, dataset: data.Dataset) -> None:
    """Raises ConfigError for early stopping without examples to judge it by."""
    if config.early_stopping.patience is not None and not len(dataset.validation):
        raise ConfigError(
            f"config.early_stopping.patience is {config.early_stopping.patience}: data set "
            f"{dataset.name!r} has no validation split to judge it by; set config.data.validation"
        )


def _check_length(config: ConfigDict, total_steps: int) -> None:
    """Raises ConfigError for a run that is too long to count, or for what it is too short for."""
    if total_steps > MOST:
        raise ConfigError(
            f"config.epochs is {config.epochs}: at most {MOST} steps are allowed, these are "
            f"{total_steps}"
        )
    needed = WARM_UP_STEPS + (config.profile or 0)
    if config.profile and needed > total_steps:
        raise ConfigError(
            f"config.profile is {config.profile}: it needs {needed} steps, as the first "
            f"{WARM_UP_STEPS} are not traced, but the run has {total_steps}"
        )


def _check_accumulate(config: ConfigDict, ends: Sequence[int], accumulate: int) -> None:
    """Raises ConfigError for more batches to an optimizer's step than are trained between ends."""
    lengths = [later - now for now, later in itertools.pairwise(ends) if later > now]
    if accumulate > (steps := min(lengths)):
        key = "accumulate" if config.accumulate == accumulate else "method.accumulate"
        part = "the run has" if len(lengths) == 1 else "growth leaves a net"
        raise ConfigError(
            f"config.{key} is {accumulate}: {part} {steps} step(s), so that its optimizer would "
            "not step once"
        )


def load_data(config: ConfigDict) -> data.Dataset:
    """The data set of a complete configuration; ValueError or ConfigError where there is none."""
    memory.check_data(config)
    options = inspect.signature(data.load).parameters
    section = {key: value for key, value in config.data.items() if key in options}
    if config.data.buckets:
        section["max_length"] = config.data.buckets[-1]
    return data.load(**section, seed=config.seed)


def _augmentation(config: ConfigDict) -> dict[str, Any]:
    """The options of the augmentation that are set."""
    defaults = data.augment.OPTIONS.items()
    return {key: config.data[key] for key, value in defaults if config.data[key] != value}


def _model(config: ConfigDict, dataset: data.Dataset, rngs: nnx.Rngs) -> models.Model:
    name, inputs = config.model.name, dataset.model_arguments()
    what = f"data set {dataset.name!r} holds {dataset.kind}"
    if not _takes(name, inputs):
        fitting = ", ".join(x for x in models.names() if _takes(x, inputs)) or "no model"
        raise ConfigError(f"config.model.name is {name!r}: {what}, which {fitting} read")
    model = models.get(name)(dataset.num_classes, **inputs, rngs=rngs, **chosen(config, "model"))
    height, width = getattr(dataset, "image_shape", (0, 0))[:2]
    if height != width and not any(
        isinstance(layer, models.layers.GlobalAveragePool)
        for module in (model.blocks[-1], model.classifier)
        for _, layer in nnx.iter_graph(module)
    ):
        raise ConfigError(
            f"config.model.name is {name!r}, which reads square images, but {what} of "
            f"{height} x {width} pixels; set config.data.image_size or take a ResNet"
        )
    return model


def _takes(model: str, inputs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(models.get(model)).bind_partial(**inputs)
    except TypeError:
        return False
    return True


def method_arguments(config: ConfigDict, dataset: data.Dataset) -> dict[str, Any]:
    """What the configuration sets, and the images' statistics where the method asks for them."""
    allowed = methods.arguments(config.method.name)
    known = {key: value for key, value in dataset.method_arguments().items() if key in allowed}
    return known | chosen(config, "method")
