"""Measured timelines: the calls of a schedule, read back from a profiler's trace."""

import gzip
import itertools
import json

import jax
import nets
import pytest
import runs

import jdecouple as jd
from jdecouple.schedules import Kind, Span
from jdecouple.train import profile
from jdecouple.train import profile as timeline
from jdecouple.train.loop import train_and_evaluate

F, B, S = Kind.FORWARD, Kind.BACKWARD, Kind.STEP
DATA = nets.batches()


def build(name: str, **options) -> jd.Trainer:
    options = {"mesh": jd.make_mesh(2, options.pop("replicas", 1)), **options}
    return nets.build(name, model=nets.mlp(depth=2), num_stages=2, example=DATA[0], **options)


def traced(trainer: jd.Trainer, folder, steps: int) -> None:
    state, _ = nets.trained(trainer, DATA, 3)
    trainer.wait(state)
    jax.profiler.start_trace(folder)
    for step in range(steps):
        state, _ = trainer.step(state, DATA[step])
    trainer.wait(state)
    jax.profiler.stop_trace()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bp", {"schedule": "1f1b", "microbatches": 2, "clip_norm": 1.0}),
        pytest.param("deinforeg", {"microbatches": 2, "replicas": 2}, marks=pytest.mark.slow),
        pytest.param("fdg", {}, marks=pytest.mark.slow),
    ],
)
def test_calls_of_every_stage(tmp_path, name, options):
    trainer = build(name, **options)
    traced(trainer, tmp_path, 3)
    spans = profile.spans(tmp_path, trainer, 3, first_batch=7)
    calls = [(call, 7 + batch) for batch in range(3) for call in trainer.calls]
    found = [((span.stage, span.kinds, span.microbatches), span.batch) for span in spans]
    assert sorted(found, key=repr) == sorted(calls, key=repr)
    assert [span.device_group for span in spans] == [span.stage for span in spans]
    starts = [span.start for span in spans]
    assert starts == sorted(starts)
    assert starts[0] == 0
    for stage in (0, 1):
        own = [span for span in spans if span.stage == stage]
        assert all(span.start < span.end < 10 for span in own)
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
        assert [((s.stage, s.kinds, s.microbatches), s.batch) for s in own] == [
            each for each in calls if each[0].stage == stage
        ]
    # What a stage receives leaves the stage below at the end of its call; a delayed one's, one
    # step earlier.
    sent = {
        (m + s.batch, s.batch): s.end
        for s in spans
        if s.stage == 0
        for kind, m in zip(s.kinds, s.microbatches, strict=True)
        if kind is F
    }
    late = int(name == "fdg")
    for span in spans:
        if span.stage == 1 and F in span.kinds and span.batch > 7:
            microbatch = span.microbatches[span.kinds.index(F)]
            assert sent[microbatch + span.batch, span.batch - late] <= span.start


@pytest.mark.slow
def test_another_number_of_calls_is_refused(tmp_path):
    trainer = build("deinforeg")
    with pytest.raises(ValueError, match=r"no \*\.trace\.json\.gz in "):
        profile.spans(tmp_path, trainer, 1)
    traced(trainer, tmp_path, 2)
    with pytest.raises(ValueError, match=r"has 2 calls of stage 0: FBS, 3 step\(s\) make 3"):
        profile.spans(tmp_path, trainer, 3)
    with pytest.raises(ValueError, match="has 0 calls of stage 0: BSF"):
        profile.spans(tmp_path, build("fdg"), 1)


def test_trace_of_gpus(tmp_path):
    """On a GPU every device has a line with an event a call; kernels have lines of their own."""

    def event(pid: int, tid: int, name: str, start: float, end: float) -> dict:
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": end - start}

    def line(pid: int, tid: int, name: str) -> dict:
        return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}

    events = [
        *(line(pid, 1, "Stream #13") for pid in range(4)),
        *(line(pid, 2, "XLA Modules") for pid in range(4)),
        *(event(pid, 1, "fusion", 1000, 2000) for pid in range(4)),
        # Stage 0 on devices 0 and 1, stage 1 on devices 2 and 3; two executables of stage 1.
        *(event(pid, 2, "jit_stage0_FBS(77)", 5000 + pid, 6000 + pid) for pid in (0, 1)),
        *(event(pid, 2, "jit_stage0_FBS(77)", 7000 + pid, 8000 + pid) for pid in (0, 1)),
        *(event(pid, 2, "jit_stage1_FBS(88)", 6500 + pid, 7500 + pid) for pid in (2, 3)),
        *(event(pid, 2, "jit_stage1_FBS(99)", 8500 + pid, 9500 + pid) for pid in (2, 3)),
        event(0, 2, "jit_convert_element_type(5)", 9600, 9700),
    ]
    file = tmp_path / "plugins" / "profile" / "now" / "host.trace.json.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events[::-1]}).encode()))
    call = (F, B, S), (0, 0, 0)
    assert profile.spans(tmp_path, build("deinforeg"), 2) == [
        Span(0, 0, *call, 0, 0, pytest.approx(0.001001)),
        Span(1, 1, *call, 0, pytest.approx(0.001502), pytest.approx(0.002503)),
        Span(0, 0, *call, 1, pytest.approx(0.002), pytest.approx(0.003001)),
        Span(1, 1, *call, 1, pytest.approx(0.003502), pytest.approx(0.004503)),
    ]


class Idle:
    """A trainer that has nothing to wait for."""

    def wait(self, state):
        pass


def test_what_cannot_be_written_is_told_and_raises_nothing(tmp_path, monkeypatch, caplog):
    """A folder for a file, and a file for a folder."""
    monkeypatch.setattr(profile, "spans", lambda *_: [Span(0, 0, (F,), (0,), 0, 0.0, 1.0)])
    (tmp_path / "timeline.png").mkdir()
    traced = profile.Profile(Idle(), tmp_path, 1, 0, "$a")
    traced.before(11, None)
    told = traced.after(11, None)
    assert told == f"no timeline: cannot write {tmp_path / 'timeline.png'}: Is a directory"
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "profile").touch()
    traced = profile.Profile(Idle(), tmp_path / "file", 1, 0, "$a")
    traced.before(11, None)
    assert traced.after(11, None) is None
    assert caplog.messages[-1].startswith("no timeline: [Errno 17] File exists: ")


# --- In a run ------------------------------------------------------------------------------------


def config(**values):
    made = runs.get_config()
    made.mesh.stages = 2
    made.update(values)
    return made


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_run_draws_the_steps_after_the_first_ten(tmp_path, capsys, monkeypatch):
    drawn = []
    draw = timeline.draw

    def spy(spans, *, title):
        drawn.append((spans, title))
        return draw(spans, title=title)

    monkeypatch.setattr(timeline, "draw", spy)
    train_and_evaluate(config(profile=3, steps=14), tmp_path)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert f"timeline of steps 11 to 13: {tmp_path / 'timeline.png'}" in capsys.readouterr().out
    ((spans, title),) = drawn
    assert title == "deinforeg on synthetic, steps 11 to 13"
    assert {(span.stage, span.batch) for span in spans} == {
        (stage, batch) for stage in (0, 1) for batch in (10, 11, 12)
    }


@pytest.mark.slow
@pytest.mark.parametrize("steps", [14, 16])
def test_run_that_goes_on_and_ends_before_its_profile(tmp_path, steps):
    train_and_evaluate(config(steps=4), tmp_path)
    result = train_and_evaluate(config(profile=3, steps=steps), tmp_path)  # 15 to 17
    assert result["finished"]
    assert not (tmp_path / "timeline.png").exists()
    assert (tmp_path / "profile").exists() == (steps > 14)
    jax.profiler.start_trace(tmp_path / "another")  # none is left open
    jax.profiler.stop_trace()


@pytest.mark.slow
def test_trace_without_the_calls_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "_events", lambda folder: [])
    assert train_and_evaluate(config(profile=1, steps=12), tmp_path)["finished"]
    assert "no timeline: the trace in " in capsys.readouterr().out
