"""Learning-rate finder: the losses of a training whose learning rate rises (arXiv 1506.01186)."""

import argparse
import dataclasses
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jdecouple import data
from jdecouple._errors import first_line, require_int, require_number
from jdecouple._files import any_folder, make_folder
from jdecouple.inference import pictures
from jdecouple.train import cli as train_cli
from jdecouple.train import config as configuration
from jdecouple.train import devices, hosts, report
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.initial import begin
from jdecouple.train.metrics import Progress
from jdecouple.train.rates import optimizer as make_optimizer
from jdecouple.train.run import Run, build
from jdecouple.trainer import Trainer

FILE_NAME = "lr_finder.png"
_LOW, _HIGH, _STEPS = 1e-6, 10.0, 100
_RECENT = 5  # losses whose mean tells whether the training diverges
_FAR = 3.0  # sizes of the lowest such mean, above which it does
_WIDTH = 0.03  # of the Gaussian that smooths, as a share of the range
_SAFETY = 10.0  # how far below the rate of the lowest loss, which is too high, to go
_SHOWN_EVERY = 20
_OWN = "[--low X] [--high X] [--steps N] "  # flags


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses by learning rate, smoothed.

    Attributes:
        rates: rising learning rates `[n]`.
        losses: loss behind a step of each rate `[n]`.
        start: loss before the first step.
    """

    rates: np.ndarray
    losses: np.ndarray
    start: float = math.inf

    @property
    def steepest(self) -> float:
        """The rate at which the loss falls fastest, by decades of the rate."""
        return float(self.rates[np.argmin(np.gradient(self.losses, np.log10(self.rates)))])

    @property
    def before_lowest(self) -> float:
        """A tenth of the rate of the lowest loss."""
        return float(self.rates[np.argmin(self.losses)] / _SAFETY)

    @property
    def problem(self) -> str | None:
        """Why these rates say nothing: the loss does not fall and then rise, as far as they go."""
        lowest = int(np.argmin(self.losses))
        steps = np.diff(self.losses[: lowest + 1])
        if self.losses[lowest] >= self.start:  # as where the first step has spoilt all
            return "does not fall"
        if -steps[steps < 0].sum() <= 2 * steps[steps > 0].sum():
            return "does not fall"
        return "falls to the end" if lowest == len(self.losses) - 1 else None


def main(argv: Sequence[str]) -> None:
    """Trains for some steps with a rising learning rate, and suggests one for a configuration.

    Prints, of the loss and of that of every block, the rate at which it falls fastest, and a tenth
    of the rate at which it is lowest: the suggestion. Draws lr_finder.png in the workdir, where
    nothing else is read or written. The configuration is given as to `train`.
    """
    parser = argparse.ArgumentParser(
        prog="jdecouple find_lr",
        usage="%(prog)s --config FILE [--workdir FOLDER] "
        f"{_OWN}[--nocache] [--config.KEY=VALUE ...]",
        description=inspect.getdoc(main),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--low", type=float, default=_LOW, help="first rate (%(default)s)")
    parser.add_argument("--high", type=float, default=_HIGH, help="last rate (%(default)s)")
    parser.add_argument("--steps", type=int, default=_STEPS, help="rates (%(default)s)")
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(first_line(error)) from error
    arguments = [parser.prog, *rest]
    config, workdir = train_cli.parse(arguments, _OWN)
    if train_cli.parse_process_spec(arguments):
        raise ConfigError("find_lr needs one process, and not several of one run")
    find_lr(config, workdir, low=given.low, high=given.high, steps=given.steps)


def find_lr(
    config: ConfigDict | Mapping,
    workdir: str | os.PathLike[str],
    *,
    low: float = _LOW,
    high: float = _HIGH,
    steps: int = _STEPS,
) -> dict[str, Curve]:
    """Finds a learning rate for a configuration: the command `find_lr`.

    The training begins anew, with the first of its batches; it ends early where it diverges. Where
    the model grows, it is of the first blocks.

    Args:
        config: made from `jdecouple.config.default()`. Its learning rate and schedule are not used.
        workdir: folder for `lr_finder.png`; made if missing.
        low: first learning rate.
        high: last learning rate.
        steps: number of rates; of each the optimiser takes one step.

    Returns:
        The curve of "loss", the sum over the blocks, and where there are several of "block 0" on.

    Raises:
        ConfigError: bad values or input, in one line.
    """
    with one_line():
        require_number(positive=True, low=low, high=high)
        require_int(10, steps=steps)
        if not low < high:
            raise ValueError(f"high is {high}: more than low, {low}, is needed")
        folder = any_folder(workdir)
    config = _without_buckets(config)
    devices.introduce(config)
    run = build(config).at(1)
    devices.announce(run)
    curves = curves_of(run, np.geomspace(low, high, steps))
    with one_line():
        make_folder(folder)
        title = f"{run.config.method.name} on {run.config.data.name}"
        picture = draw(curves, folder / FILE_NAME, title=title)
    _print(curves, steps, picture)
    return curves


def _without_buckets(config: ConfigDict | Mapping) -> ConfigDict:
    """The configuration with texts of one length, the longest."""
    config = configuration.validate(config)
    if config.data.buckets:
        config.data.max_length, config.data.buckets = config.data.buckets[-1], None
    return config


def curves_of(run: Run, rates: np.ndarray) -> dict[str, Curve]:
    """Trains a run with these rates in turn; gives the smoothed curves of its losses."""
    config = run.config
    first, ratio = float(rates[0]), float(rates[1] / rates[0])

    def schedule(count: Any) -> Any:
        return first * jnp.power(ratio, count)

    with one_line(config.optimizer, "config.optimizer"):
        optimizer = make_optimizer(config, schedule, 1)
    changes = {"optimizer": optimizer, "ema": None}
    trainer = Trainer(run.trainer.model, **{**run.trainer.options, **changes})
    passes = max(config.accumulate, trainer.method.route.accumulate)
    batches = data.train_batches(run.dataset.train, config.batch_size, seed=config.seed)
    progress = Progress(len(rates), 0, passes * config.batch_size)
    state = begin(run, trainer, hosts.SingleProcess())
    rows: list[dict[str, float]] = []
    try:
        for _ in range(trainer.latency):  # no batch has reached the loss yet
            state, _ = trainer.step(state, next(batches))
        while len(rows) <= len(rates) and not _diverges([row["loss"] for row in rows]):
            sums: dict[str, float] = {}
            for _ in range(passes):
                state, metrics = trainer.step(state, next(batches))
                for name in filter(_is_loss, metrics):
                    sums[name] = sums.get(name, 0.0) + float(metrics[name])
            rows.append({name: value / passes for name, value in sums.items()})
            done = len(rows) - 1
            shown = {"loss": rows[-1]["loss"]} if done and done % _SHOWN_EVERY == 0 else {}
            progress.update(done, shown)
    finally:
        progress.close()
        batches.close()
    start, *rows = rows  # the loss behind a step is that of the next
    while rows and not all(map(math.isfinite, rows[-1].values())):
        rows.pop()
    if len(rows) < _RECENT:
        raise ConfigError(f"the training diverges at once, with a rate of {first:g}: lower --low")
    names = sorted(rows[0], key=lambda name: (name != "loss", int("0" + name[6:].split("/")[0])))
    if len(names) == 2:  # of one block, whose loss is the whole
        names = names[:1]
    return {
        name.removesuffix("/loss").replace("_", " "): Curve(
            rates[: len(rows)], _smoothed([row[name] for row in rows], len(rates)), start[name]
        )
        for name in names
    }


def _is_loss(name: str) -> bool:
    return name == "loss" or name.endswith("/loss")


def _diverges(losses: Sequence[float]) -> bool:
    """Whether the last losses are far above the lowest and, on the whole, above the first."""
    if losses and not math.isfinite(losses[-1]):
        return True
    if len(losses) < 2 * _RECENT:
        return False
    means = np.convolve(losses, np.full(_RECENT, 1 / _RECENT), "valid")
    lowest = float(means.min())
    return bool(means[-1] > max(means[0], lowest + _FAR * abs(lowest)))


def _smoothed(losses: Sequence[float], count: int) -> np.ndarray:
    """Losses without their noise, by a Gaussian over some of the `count` rates; it shifts none."""
    from scipy import ndimage  # JAX needs it, too

    return ndimage.gaussian_filter1d(np.array(losses), max(1.0, _WIDTH * count), mode="nearest")


def draw(curves: Mapping[str, Curve], path: Path, *, title: str = "") -> Path:
    """Draws losses against the learning rate, with the rates that are suggested by the whole."""
    from matplotlib.figure import Figure

    blocks = {name: curve for name, curve in curves.items() if name != "loss"}
    figure = Figure(figsize=(11 if blocks else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if blocks else 1, squeeze=False)[0]
    whole = curves["loss"]
    axes[0].plot(whole.rates, whole.losses, color="black", label="loss")
    if whole.problem is None:
        for label, rate, style in (
            ("steepest", whole.steepest, "--"),
            ("lowest / 10", whole.before_lowest, ":"),
        ):
            axes[0].axvline(rate, color="gray", linestyle=style, label=f"{label}: {rate:.2g}")
    colours = report.block_colours(len(blocks))
    for (name, curve), colour in zip(blocks.items(), colours, strict=True):
        axes[1].plot(curve.rates, curve.losses, color=colour, label=name)
    for each in axes:
        each.set_xscale("log")
        each.set_xlabel("learning rate")
        each.set_ylabel("loss")
        each.grid(alpha=0.3)
        each.legend(fontsize="small")
    if title:
        plain = title.encode(errors="backslashreplace").decode()
        figure.suptitle(plain, parse_math=False)
    pictures.save(figure, path, dpi=120)
    return path


def _print(curves: Mapping[str, Curve], steps: int, picture: Path) -> None:
    """Prints the suggestions, none of a loss that does not fall."""
    whole = curves["loss"]
    rates = whole.rates
    ended = "" if len(rates) == steps else ", where it diverges"
    print(f"\nlearning rates from {rates[0]:.1e} to {rates[-1]:.1e}{ended}")
    print(f"  {'':10} {'falls fastest':>14} {'lowest / 10':>14}")
    for name, curve in curves.items():
        cells = f"{curve.steepest:14.1e} {curve.before_lowest:14.1e}"
        print(f"  {name:10} {curve.problem or cells}")
    if whole.problem is None:
        print(f"suggested: --config.optimizer.learning_rate={whole.before_lowest:.1e}")
    else:
        print(f"suggested: nothing, the loss {whole.problem}; try other --low, --high or --steps")
    print(f"curves:    {picture}")
