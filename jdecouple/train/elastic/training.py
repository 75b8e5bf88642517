"""The loop of one stage over its batches: steps, messages, metrics and checkpoints."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdecouple.checkpoint import Checkpointer
from jdecouple.pipeline.mpmd.one_stage import OneStage
from jdecouple.pipeline.step_metrics import JoinedMetrics, StepMetrics, on_host
from jdecouple.train import config as configuration
from jdecouple.train import gauges, hosts
from jdecouple.train.divergence import fault, left_out, not_finite
from jdecouple.train.elastic.feed import FAREWELL, Batch, Reader, Receiver
from jdecouple.train.elastic.folder import StageFolder
from jdecouple.train.elastic.outbox import Outbox
from jdecouple.train.initial import begin
from jdecouple.train.interrupt import Interrupt
from jdecouple.train.loop import NonFiniteError
from jdecouple.train.metrics import Interval, MetricsWriter, Progress, clock
from jdecouple.train.resume import identity, origin
from jdecouple.train.run import Run
from jdecouple.trainer import State

_IN_FLIGHT = 2  # batches that are computed while another one is begun
_GLANCE = 0.1  # seconds until one that waits looks again


@dataclasses.dataclass
class StageTraining:
    """One stage's pass from its own checkpoint to the last step.

    Attributes:
        counts: what its weights have seen, as JSON: batches "trained" on, how many messages were
            "replayed", and as [first, last] the steps whose batches it has "missed".
        feed: where its batches come from; `outbox` takes its messages, None above the last.
    """

    run: Run
    stage: OneStage
    checkpoints: Checkpointer
    interrupt: Interrupt
    folder: Path
    outbox: Outbox | None = None
    feed: Reader | Receiver | None = None

    def __post_init__(self) -> None:
        self.counts: dict[str, Any] = {"trained": 0, "replayed": 0, "missed": []}
        self._pending: collections.deque[tuple[int | None, Sequence[jax.Array], JoinedMetrics]]
        self._pending = collections.deque()
        self._metrics: list[StepMetrics] = []
        self._since: float | None = None  # when it was asked to stop
        self._waited = 0.0  # seconds

    def tell(self, text: str) -> None:
        """Prints a line about this stage."""
        print(f"stage {self.stage.index}: {text}", flush=True)

    def is_asked(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return self.interrupt.requested

    def is_out_of_time(self) -> bool:
        """Whether the run was to stop so long ago that nobody is waited for."""
        if self._since is None and self.is_asked():
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() > self._since + FAREWELL

    def restore(self, whole: Path) -> tuple[State, dict[str, Any] | None]:
        """The state to begin with, and what its checkpoint says; None for a new run.

        It is the stage's own last one, or its part of one of the whole run, if that is later.

        Raises:
            ConfigError: they are another run's, or further than this one should go.
        """
        stage, own = self.stage, self._identity()
        extras = self.checkpoints.extras()
        if extras:
            configuration.check_identity(own, extras[max(extras)].get("identity", {}))
        restored = self.checkpoints.restore(stage.template())
        step = -1 if restored is None else restored.step
        others = Checkpointer(whole, read_only=True)
        if (latest := others.latest_step) is not None and latest > step:
            extra = others.extras().get(latest, {})
            configuration.check_identity(identity(self.run), extra.get("identity", {}))
            names = stage.template()
            found = others.read(latest, names.__contains__)
            restored = found._replace(extra={"settings": extra.get("settings"), "identity": own})
        if restored is None:
            if self.run.config.init_from is not None:
                begin(self.run, self.run.trainer, hosts.SingleProcess())
            return stage.init(), None
        if restored.step > (total := self.run.total_steps):
            raise configuration.ConfigError(
                f"the workdir holds step {restored.step}: the configuration ends at {total}"
            )
        self.counts |= {name: restored.extra.get(name, x) for name, x in self.counts.items()}
        return stage.from_arrays(restored.step, restored.arrays), restored.extra

    def train(self, state: State, start: dict[str, Any] | None) -> int:
        """Trains to the last step, or to where the stages stop; saves and returns that step."""
        total, config, first = self.run.total_steps, self.run.config, state.step
        assert self.feed is not None
        if start:
            self.tell(f"continues from step {first} of {total}")
        self._saved, self._logged = first if start else -1, first
        rows = (start or {}).get("rows", 0)
        self._writer = MetricsWriter(self.folder, resume_step=first if start else None, rows=rows)
        self._interval = Interval(self.counts["trained"], clock(0.0), (start or {}).get("means"))
        progress = Progress(total, first, config.batch_size, self.stage.index == 0)
        every = config.checkpoint.every or self.run.eval_every
        end: int | None = total
        with self._writer, contextlib.closing(progress), contextlib.closing(self.feed):
            while state.step < total:
                began = time.perf_counter()
                batch = self.feed.next()
                self._waited += time.perf_counter() - began
                if not isinstance(batch, Batch):
                    end = batch
                    break
                if batch.is_new:
                    self._miss(state.step, batch.number)
                state = self._step(state, batch)
                if batch.is_new:
                    progress.update(state.step, self._log(state.step))
                    if state.step // every > max(self._saved, 0) // every:
                        self._save(state)
            self._deliver(0)
            if end is not None:
                self._miss(state.step, end)
                state = dataclasses.replace(state, step=end)
            self._read_metrics()
            self._save(state)
            self.checkpoints.wait()
        if self.outbox is not None and end is not None:
            self.outbox.end(end)
        return state.step

    def leave(self, above: StageFolder, step: int) -> bool:
        """Waits until the stage above has come to a step as well; whether it has."""
        if step < self.run.total_steps:
            self._since = self._since or time.monotonic()
        while not self.stage.is_last and above.last_step < step:
            if self.is_out_of_time():
                return False
            time.sleep(_GLANCE)
        return True

    def _step(self, state: State, batch: Batch) -> State:
        state, message, metrics = self.stage.step(state, batch.carries, batch.number)
        for array in message:
            array.copy_to_host_async()
        self._pending.append((batch.number if batch.is_new else None, message, metrics))
        self.counts["trained" if batch.is_new else "replayed"] += 1
        if batch.is_new:
            self._metrics.append(StepMetrics([metrics]))
        self._deliver(_IN_FLIGHT)
        return state

    def _deliver(self, left: int) -> None:
        """Hands on the oldest messages, and waits for what they need, until so many are left."""
        while len(self._pending) > left:
            number, message, metrics = self._pending.popleft()
            jax.block_until_ready(metrics)
            if self.outbox is not None and number is not None:
                self.outbox.put(number, list(map(np.asarray, message)), self.is_out_of_time)

    def _miss(self, step: int, number: int) -> None:
        """Tells of the batches between a step and batch `number`, if there are any."""
        if number <= step:
            return
        first, prefix = step + 1, f"stage_{self.stage.index}/"
        self.counts["missed"].append([first, number])
        self.tell(f"misses the batches of steps {first} to {number}")
        values = {"missed": number - step, "missed_from": first}
        self._writer.write(number, "train", {prefix + name: x for name, x in values.items()})

    def _log(self, step: int) -> dict[str, Any]:
        """Writes a line where one is due; returns what the console shows."""
        every, last = self.run.config.log_every, step == self.run.total_steps
        rest = step % every
        if step // every == self._logged // every and not (
            last and (2 * rest >= every or step < every)
        ):
            return {}
        self._logged = step
        self._read_metrics()
        now, size = clock(self._waited), self.run.config.batch_size
        values = self._interval.end(self.counts["trained"], now, size)
        own = {name: values.pop(name) for name in ("examples_per_second", "input_wait")}
        own |= gauges.memory()
        if self.stage.index:
            own["replayed"] = self.counts["replayed"]
            own = {f"stage_{self.stage.index}/{name}": value for name, value in own.items()}
        else:
            own |= gauges.learning_rates(self.run.phases, step)
        self._writer.write(step if last else step - rest, "train", values | own)
        return {name: values[name] for name in ("loss", "accuracy") if name in values}

    def _read_metrics(self) -> None:
        """Adds the metrics of the steps since the last call to the means."""
        for row in on_host(self._metrics):
            if (reason := fault(row)) is not None:
                raise NonFiniteError(f"{reason} in stage {self.stage.index}")
            self._interval.add(row, finite=bool(left_out(row)))
        self._metrics = []

    def _save(self, state: State) -> None:
        if state.step == self._saved:
            return
        self._read_metrics()
        self._saved = state.step
        arrays = {k: np.asarray(x) for k, x in self.stage.to_arrays(state).items()}
        if name := not_finite(arrays.items()):
            raise NonFiniteError(f"{name} is not finite after step {state.step}")
        extra = {**origin(self.run), "identity": self._identity(), "means": self._interval.means}
        self.checkpoints.save(
            state.step, arrays, extra | {"rows": self._writer.rows, **self.counts}
        )

    def _identity(self) -> dict[str, Any]:
        return identity(self.run) | {"boundaries": list(self.run.trainer.boundaries)}
