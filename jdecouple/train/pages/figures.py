"""How far a run is, and the numbers that it ends with."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from jdecouple.train import report
from jdecouple.train.pages.record import Record

_REFUSED = "checkpoints_refused"


class Standing(NamedTuple):
    """How far a run is: whether what it has measured are results, and in words."""

    finished: bool
    text: str


def standing(run: Record) -> Standing:
    """How far a run is.

    One that has diverged is known by the checkpoints that it has moved away, by its last checkpoint
    being suspect, and by a training loss that is no number.
    """
    total = run.total_steps
    place = f"step {run.step:,} of {'unknown' if total is None else f'{total:,}'}"
    if run.finished:
        return Standing(True, "finished" if run.step == total else f"finished early, {place}")
    if not run.lines:
        return Standing(False, "no metrics yet")
    last = [line for line in run.lines if line["split"] == "train"][-1:]
    spoilt = any(line.get("loss", 0.0) is None for line in last)
    suspect = (run.extra.get("range") or {}).get("suspect") is not None
    if spoilt or suspect or (run.folder / _REFUSED).is_dir():
        return Standing(False, f"diverged, {place}")
    return Standing(False, f"unfinished, {place}")


class Final(NamedTuple):
    """The numbers that a run ends with; None stands where one is not known, or is no result.

    Attributes:
        standing: how far it is, in words.
        test: accuracy of the last exit at the last step, a fraction.
        chosen: the same at the step with the best validation accuracy.
        chosen_at: that step.
        papers: the best test accuracy of any exit and step: not a result, as the test set chose it.
        step: the last.
        parameters: numbers that are learnt.
        examples_per_second: median of the lines of the training.
        seconds: see `times.Seconds`.
    """

    standing: str
    test: float | None
    chosen: float | None
    chosen_at: int | None
    papers: float | None
    step: int
    parameters: int | None
    examples_per_second: float | None
    seconds: float | None


def final(run: Record) -> Final:
    """The numbers that a run ends with; accuracies only of one that is finished."""
    found: Mapping[str, Any] = {}
    finished, text = standing(run)
    if finished:
        try:
            found = run.summary()
        except ValueError:
            text += ", no test of the last step"
    chosen = found.get("test_at_best_validation", {})
    exits = report.exits(found["best_test"]).values() if "best_test" in found else ()
    train = (line for line in run.lines if line["split"] == "train")
    speeds = [speed for line in train if (speed := line.get("examples_per_second") or 0) > 0]
    return Final(
        standing=text,
        test=found.get("test", {}).get("accuracy"),
        chosen=chosen.get("accuracy"),
        chosen_at=chosen.get("step"),
        papers=max(exits, default=None),
        step=run.step,
        parameters=run.content.get("parameters"),
        examples_per_second=statistics.median(speeds) if speeds else None,
        seconds=run.seconds,
    )
