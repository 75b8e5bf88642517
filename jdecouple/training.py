"""Training as a configuration says, with metrics, checkpoints and resume in a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jdecouple import hosts, report
from jdecouple.checkpoint import Checkpointer
from jdecouple.config import ConfigError, one_line
from jdecouple.interrupt import Interrupt
from jdecouple.loop import Loop, NonFiniteError
from jdecouple.metrics import MetricsWriter, plot_curves, read_metrics
from jdecouple.processes import Unwritten, check_alike
from jdecouple.profile import Profile
from jdecouple.resume import restore
from jdecouple.run import Run, build

__all__ = ["NonFiniteError", "Run", "build", "train_and_evaluate"]


def train_and_evaluate(
    config: ConfigDict | Mapping,
    workdir: str | os.PathLike[str],
    processes: hosts.Alone = hosts.ALONE,
) -> dict[str, Any]:
    """Trains as a configuration says; continues what the workdir already holds.

    Args:
        config: made from `jdecouple.config.default()`.
        workdir: folder for `config.json`, `metrics.jsonl`, `checkpoints/` and `curves.png`, and
            with `config.profile` `profile/` and `timeline.png`; made if missing. Of several
            processes the first alone reads and writes it.
        processes: what `jdecouple.hosts.join` returned, where there are several.

    Returns:
        "step"; "finished" (False after SIGTERM or Ctrl-C, which save and return); and, when
        finished, on the first process, "test" (metrics at the last step),
        "test_at_best_validation" and "best_test" (the papers' figure: the best step by test
        accuracy, never a result).

    Raises:
        ConfigError: bad values or input, in one line; checkpoints are left untouched.
        NonFiniteError: the training diverged; the last good checkpoint is kept.
    """
    run = build(config)
    folder = Path(workdir)
    with one_line():
        check_alike(run.config, processes)
        checkpoints = _open(folder, run) if processes.first else Unwritten()
    processes.on_loss(checkpoints.wait)
    with checkpoints, Interrupt() as interrupt:
        with one_line():
            state, start = restore(run, checkpoints, processes)
            writer: MetricsWriter | Unwritten = Unwritten()
            if processes.first:
                report.write_config(folder, run)
                writer = MetricsWriter(folder, resume_step=state.step if start else None)
        with writer:
            profile = Profile(run.trainer, folder, run.config.profile, state.step, run.title)
            loop = Loop(run, checkpoints, writer, interrupt, profile, processes)
            state = loop.train(state, start)
        if processes.first:
            plot_curves(folder, title=run.title)
    result = {"step": state.step, "finished": state.step >= run.total_steps}
    if not processes.first:
        return result
    if result["finished"]:
        result |= report.summary(read_metrics(folder))
        report.show(result, folder, checkpoints.best_step)
    else:
        print(f"stopped at step {state.step} of {run.total_steps}: the same command continues")
    return result


def _open(folder: Path, run: Run) -> Checkpointer:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"workdir {str(folder)!r}: {error.strerror}") from error
    return Checkpointer(folder / "checkpoints", keep=run.config.checkpoint.keep)
