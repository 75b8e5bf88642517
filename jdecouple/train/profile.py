"""Measured timelines: from a trace of JAX's profiler to the calls of a schedule."""

import collections
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jdecouple.schedules import Kind, Span, draw
from jdecouple.train.files import replace
from jdecouple.trainer import State, Trainer

FOLDER_NAME = "profile"
PICTURE_NAME = "timeline.png"
WARM_UP_STEPS = 10

_NAME = re.compile(r"jit_stage(\d+)_([FBS]+)(?:\(.*\))?")
_MODULES = "XLA Modules"  # the line of a GPU's trace that has an event a call

Key = tuple[int, tuple[Kind, ...]]
Times = tuple[float, float]


class Profile:
    """Traces some steps of a run, and draws what the stages did in them.

    Args:
        trainer: its stages must be apart (`fuse=False`).
        workdir: gets `profile/`, which TensorBoard and XProf read, and `timeline.png`.
        steps: how many steps to trace; None traces none.
        start: step that the run goes on from; the steps up to `start + WARM_UP_STEPS` are not
            traced, because the first of them compile.
        title: heading of the picture.
    """

    def __init__(
        self,
        trainer: Trainer,
        workdir: str | os.PathLike[str],
        steps: int | None,
        start: int = 0,
        title: str = "",
    ):
        self._trainer, self._workdir, self._title = trainer, Path(workdir), title
        self._first = start + WARM_UP_STEPS + 1
        self._last = self._first + steps - 1 if steps else 0
        self._tracing = False

    def before(self, step: int, state: State) -> None:
        """Begins the trace if `step`, which counts from 1 and begins with `state`, is the first."""
        if self._last and step == self._first:
            self._trainer.wait(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._workdir / FOLDER_NAME, profiler_options=options)
            self._tracing = True

    def after(self, step: int, state: State) -> str | None:
        """Ends the trace if `step` was the last; returns what to tell the user then."""
        if not self._tracing or step < self._last:
            return None
        self._trainer.wait(state)
        self.close()
        count = step - self._first + 1
        try:
            measured = spans(self._workdir / FOLDER_NAME, self._trainer, count, self._first - 1)
        except ValueError as error:  # no reason to end a training
            return f"no timeline: {error}"
        title = f"{self._title}, steps {self._first} to {step}".lstrip(", ")
        path = self._workdir / PICTURE_NAME
        figure = draw(measured, title=title)
        replace(path, lambda temporary: figure.savefig(temporary, format="png"))
        return f"timeline of steps {self._first} to {step}: {path}"

    def close(self) -> None:
        """Ends a trace that has begun."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def spans(
    folder: str | os.PathLike[str], trainer: Trainer, batches: int, first_batch: int = 0
) -> list[Span]:
    """Reads from a trace when each call of some steps ran.

    On the CPU a call lasts from the start of its first operation to the end of its last, on a GPU
    as its line "XLA Modules" says; on several replicas from the first's start to the last's end.

    Args:
        folder: where `jax.profiler.start_trace` wrote; of several traces the newest is read.
        trainer: what was traced, from `trainer.wait` before the first step to after the last.
        batches: how many steps were traced.
        first_batch: number of the first of them, from 0.

    Returns:
        The calls in order of time, which counts from the first.

    Raises:
        ValueError: no trace, or one with another number of calls.
    """
    ran = _calls(_events(Path(folder)))
    turns = collections.defaultdict(list)
    for call in trainer.calls:
        turns[call.stage, call.kinds].append(call.microbatches)
    result = []
    for (stage, kinds), microbatches in turns.items():
        times = ran.get((stage, kinds), [])
        name = f"stage {stage}: {''.join(kind.value for kind in kinds)}"
        if len(times) != batches * len(microbatches):
            raise ValueError(
                f"the trace in {os.fspath(folder)!r} has {len(times)} calls of {name}, "
                f"{batches} step(s) make {batches * len(microbatches)}"
            )
        for number, (start, end) in enumerate(times):
            batch, turn = divmod(number, len(microbatches))
            group, parts = trainer.schedule.device_group(stage), microbatches[turn]
            result.append(Span(stage, group, kinds, parts, first_batch + batch, start, end))
    result.sort(key=lambda span: (span.start, span.stage))
    zero = result[0].start
    return [span._replace(start=span.start - zero, end=span.end - zero) for span in result]


def _events(folder: Path) -> list[dict[str, Any]]:
    """All events of the newest trace; times are in microseconds."""
    paths = sorted(folder.glob("**/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ValueError(f"no *.trace.json.gz in {str(folder)!r}")
    with gzip.open(paths[-1]) as file:
        return json.load(file)["traceEvents"]


def _calls(events: list[dict[str, Any]]) -> dict[Key, list[Times]]:
    """When each call ran, in order of time, by stage and kinds; in seconds."""
    runs: dict[tuple[str, Any], list[Times]] = collections.defaultdict(list)
    for name, run, start, end in _pieces(events):
        runs[name, run].append((start, end))
    calls: dict[Key, list[Times]] = collections.defaultdict(list)
    for (name, _), pieces in runs.items():
        match = _NAME.fullmatch(name)
        assert match
        key = int(match[1]), tuple(map(Kind, match[2]))
        calls[key].append((min(a for a, _ in pieces) / 1e6, max(b for _, b in pieces) / 1e6))
    return {key: sorted(times) for key, times in calls.items()}


def _pieces(events: list[dict[str, Any]]) -> Iterator[tuple[str, Any, float, float]]:
    """Name of a call, what tells its runs apart, start and end: of runs, or of parts of them."""
    lines = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    modules = _MODULES in lines.values()
    turns: collections.Counter = collections.Counter()
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("ph") != "X":
            continue
        if modules:
            name, line = event["name"], (event["pid"], event["tid"])
            if lines.get(line) != _MODULES:
                continue
            # Every device has the runs of a call in the same order.
            turns[name, line] += 1
            run = turns[name, line]
        else:
            args = event.get("args", {})
            name, run = args.get("hlo_module", ""), args.get("run_id")
        if _NAME.fullmatch(name):
            yield name, run, event["ts"], event["ts"] + event.get("dur", 0)
