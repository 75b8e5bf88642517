"""Costs for the simulator, measured call by call."""

import jax.numpy as jnp
import nets
import numpy as np
import pytest

from jdecouple.schedules import simulate

pytestmark = pytest.mark.usefixtures("module_x64")

DATA = nets.batches(dtype=np.float64)


@pytest.mark.parametrize(
    ("name", "schedule", "microbatches"),
    [
        pytest.param("bp", "1f1b", 4, marks=pytest.mark.slow),
        pytest.param("deinforeg", "auto", 2, marks=pytest.mark.slow),
        ("fdg", "auto", 1),
    ],
)
def test_measured_costs_are_those_of_every_call(monkeypatch, name, schedule, microbatches):
    """The median of the batches after the first, which compiles."""
    trainer = nets.build(
        name,
        model=nets.user_model(depth=2, param_dtype=jnp.float64),
        num_stages=2,
        microbatches=microbatches,
        schedule=schedule,
        example=DATA[0],
    )
    measure = type(trainer).measure
    times = iter([9.0, 1.0, 5.0, 2.0])

    def timed(self, state, batch):
        state, found = measure(self, state, batch)
        seconds = next(times)
        return state, [(call, seconds + call.stage) for call, _ in found]

    monkeypatch.setattr(type(trainer), "measure", timed)
    state, costs = trainer.measured_costs(trainer.init(), DATA[:2], repeats=3)
    assert int(state.step) == 4
    calls = {(call.stage, call.kinds) for call in trainer.schedule.calls()}
    assert costs.calls == {(stage, kinds): 2.0 + stage for stage, kinds in calls}
    carry = trainer.stages[1].carry
    assert costs.error_bytes == [carry["x"].size * 8]
    assert costs.message_bytes[0] >= costs.error_bytes[0] + carry["label"].size * 4
    assert simulate(trainer.schedule, costs, batches=3).makespan > 0


def test_bad_measurements_are_refused():
    trainer = nets.build("deinforeg", model=nets.mlp(depth=2), example=DATA[0])
    for words, arguments in ((("repeats is 0",), (DATA, 0)), (("batches is empty",), ([], 1))):
        nets.assert_clear(
            ValueError, words, lambda a=arguments: trainer.measured_costs(trainer.init(), *a)
        )
