"""What an elastic run leaves: the checkpoint and the metrics of all stages, as any other run's."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdecouple._files import replace
from jdecouple.checkpoint import Checkpointer
from jdecouple.train.elastic.folder import StageFolder
from jdecouple.train.metrics import FILE_NAME, Line, read_metrics
from jdecouple.train.resume import describe, origin
from jdecouple.train.run import Run

_GLANCE = 0.1  # seconds until one that waits looks again
_SHOWN = 8  # gaps that are listed


def await_stages(folder: Path, count: int, step: int, is_out_of_time: Callable[[], bool]) -> bool:
    """Waits until all stages have saved a step; whether they have."""
    for stage in (StageFolder(folder, index) for index in range(count)):
        while stage.last_step < step:
            if is_out_of_time():
                return False
            time.sleep(_GLANCE)
    return True


def join_stages(run: Run, folder: Path, step: int) -> list[dict[str, Any]]:
    """Writes the checkpoint and the metrics of the run from those of its stages.

    Returns:
        For every stage "starts" of its process, batches "trained" on, messages "replayed", and the
        steps whose batches it has "missed", as pairs of the first and the last.
    """
    stages = [StageFolder(folder, k) for k in range(len(run.trainer.stages))]
    read = [Checkpointer(stage.checkpoints, read_only=True).read(step) for stage in stages]
    told = []
    for stage, part in zip(stages, read, strict=True):
        counts = {name: part.extra[name] for name in ("trained", "replayed", "missed")}
        told.append({"starts": stage.place.starts if stage.place else 1, **counts})
    lines = _merged(read_metrics(folder), [read_metrics(stage.path) for stage in stages])
    with Checkpointer(folder / "checkpoints", keep=run.config.checkpoint.keep) as checkpoints:
        if checkpoints.latest_step is None or checkpoints.latest_step < step:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            replace(folder / FILE_NAME, lambda path: path.write_text(text))
            extra = {**origin(run), "inference": describe(run), "iterator": {"next_index": step}}
            extra |= {"means": None, "rows": len(lines), "stages": told}
            if step == run.total_steps:
                extra["evaluate"] = True
            arrays = {name: array for part in read for name, array in part.arrays.items()}
            checkpoints.save(step, arrays, extra)
    return told


def _merged(whole: Iterable[Line], stages: Sequence[Iterable[Line]]) -> list[Line]:
    """The training lines of all stages, one a step, among the other lines of the run.

    The last stage knows the sum of the losses and the last accuracy.
    """
    rows: dict[int, Line] = {}
    for line in itertools.chain(*stages):
        rows[line["step"]] = rows.get(line["step"], {}) | line
    others = [line for line in whole if line["split"] != "train"]
    return sorted([*rows.values(), *others], key=lambda line: line["step"])


def tell(stages: Sequence[Mapping[str, Any]]) -> None:
    """Prints what the stages have missed, for the end of the run."""
    for index, of in enumerate(stages):
        missed = sum(last - first + 1 for first, last in of["missed"])
        gaps = [f"{first}-{last}" for first, last in of["missed"][:_SHOWN]]
        more = len(of["missed"]) - len(gaps)
        listed = ", ".join(gaps) + (f" and {more} gaps more" if more else "")
        print(
            f"stage {index}: started {of['starts']} time(s), trained on {of['trained']} batches, "
            f"replayed {of['replayed']}, missed {missed}" + (f" (steps {listed})" if gaps else "")
        )
