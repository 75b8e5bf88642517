"""Plans: what they say of a run, what they refuse, and that nothing is compiled for it."""

import dataclasses
import functools
import json
import re

import jax
import pytest
import runs
from text_sets import csv_set

from jdecouple import schedules
from jdecouple.pipeline.mesh import StageMesh, placed
from jdecouple.schedules import Costs
from jdecouple.train import cli, commands, memory, presets, programs
from jdecouple.train.config import ConfigError
from jdecouple.train.plan import Plan, plan
from jdecouple.train.planning import fit, tables, times
from jdecouple.train.planning.designs import Designer, size_of
from jdecouple.train.planning.devices import Devices
from jdecouple.train.run import build
from jdecouple.trainer import Trainer

FAST = {"flops": 1e9, "memory": 1e9}  # no speed is measured
SLOW = pytest.mark.slow


def tiny(method="bp", **values):
    """The tiny configuration in three blocks, which is traced in no time."""
    given = {"method__name": method, "optimizer__name": "sgd", "mesh__stages": None}
    given |= {"model__depth": 3, "data__augment": "none", **values}
    config = runs.tiny(**given)
    del config.method.projector  # deinforeg's
    return config


def planned(count=2, *, measure=False, devices=None, **values) -> Plan:
    """Its plan on described devices; `model__hidden=8` sets a key."""
    return plan(tiny(**values), devices or Devices(count, **FAST), measure=measure)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, caplog):
    """Runs `jdecouple plan` in an empty folder: its output, error and code; nothing is compiled."""
    monkeypatch.setattr(cli, "log_in_short", lambda: None)
    monkeypatch.setattr(programs, "keep", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = 0
        with jax.log_compiles(), caplog.at_level("WARNING"):
            try:
                commands.main(["jdecouple", "plan", *arguments])
            except SystemExit as end:
                code = end.code
        assert not [line for line in caplog.messages if "Finished XLA compilation" in line]
        assert [*tmp_path.iterdir()] == []
        return (*capsys.readouterr(), code)

    return run


QUICKSTART = """\
model vgg | method deinforeg | data digits | dtype float32 | batch 64

block  module                        output           parameters  FLOPs  weights  activations
    0  2 Conv, 2 BatchNorm, MaxPool  [64, 4, 4, 32]      242,218  297 M   969 kB       131 kB
    1  2 Conv, 2 BatchNorm, MaxPool  [64, 2, 2, 64]      222,602  284 M   890 kB      65.5 kB
    2  Conv, BatchNorm               [64, 2, 2, 128]     306,570  131 M  1.23 MB       131 kB
  all                                                    771,390  712 M  3.09 MB       328 kB

stage  blocks  devices   FLOPs  of all  a batch    sends  remat
    0  0       device 0  297 M     42%  37.1 us   131 kB   none
    1  1       device 1  284 M     40%  35.5 us  65.8 kB   none
    2  2       device 2  131 M     18%  16.3 us            none

engine mpmd, schedule local
stage 0 | F0 B0 S0 .  .
stage 1 | .  F0 B0 S0 .
stage 2 | .  .  F0 B0 S0

device    stages  weights  statistics  optimizer"""


@pytest.mark.slow
def test_the_quickstart(command):
    """The command, on devices that are described: a table for people is all of the JSON."""
    given = ["--config=quickstart", "--devices=4", "--memory=16GB", "--flops=8TFLOPS"]
    out, error, code = command(*given, "--link=12GB/s", "--latency=50us", "--format=json")
    assert (error, code) == ("", 0)
    found = json.loads(out)
    assert found["times"][0]["schedule"] == "local"
    assert [row["parameters"] for row in found["blocks"]] == [242218, 222602, 306570]
    text = tables.text_of(found)
    assert text.startswith(QUICKSTART)
    assert "memory of each device: 16 GB: it is enough\n" in text
    assert re.search(r"\nlocal +37\.1 us +1,7\d\d,\d{3} +20\.1% +3\n", text)
    assert "messages: 12 GB/s and 50 us each" in text


@pytest.mark.slow
def test_text_and_json_are_one(command):
    given = ["--config", runs.TINY, "--devices=1", "--flops=1GFLOPS", "--config.model.depth=1"]
    given += ["--config.method.name=bp", "--config.method.projector=None"]
    texts = [command(*given, *more)[0] for more in ([], ["--format=json"])]
    assert texts[0] == tables.text_of(json.loads(texts[1])) + "\n"


def test_what_a_plan_says_is_what_the_trainer_has():
    config = tiny(num_stages=2, microbatches=2)
    found, trainer = plan(config, Devices(2, **FAST)), build(config).trainer
    assert [row["flops"] for row in found.blocks] == trainer.block_costs()
    assert [row["first_block"] for row in found.stages] == [*trainer.boundaries]
    assert "\n".join(found.grid) == str(trainer.schedule)
    arrays = trainer.to_arrays(trainer.abstract()).items()
    weights = sum(size_of(leaf) for name, leaf in arrays if "/params/" in name)
    assert sum(row["weight_bytes"] for row in found.blocks) == weights
    assert sum(row["weights"] for row in found.memory) == weights


@functools.cache
def needed():
    """The fewest bytes that the fullest of two devices may need."""
    found = planned(mesh__stages=2, model__hidden=64, batch_size=64)
    return max(row["least"] for row in found.memory)


class TestRefused:
    def test_in_one_line_and_before_anything_is_compiled(self, command):
        given = ["--config", runs.TINY, "--devices=2", "--flops=1TFLOPS", "--memory=9kB"]
        given += ["--config.mesh.stages=2", "--config.model.depth=3", "--config.method.name=bp"]
        given += ["--config.method.projector=None"]
        out, error, code = command(*given)
        assert (out, code) == ("", 2)
        assert re.fullmatch(
            r"error: device \d \(stage \d\) needs at least [\d.]+ kB \(weights .*\), but it "
            r"has 9 kB; (what fits: config\.|neither more stages nor).*\n",
            error,
        )

    @pytest.mark.slow
    def test_what_would_fit_fits(self):
        devices = Devices(2, memory=needed() - 1, flops=1e9)
        values = {"mesh__stages": 2, "model__hidden": 64, "batch_size": 64}
        with pytest.raises(ConfigError) as error:
            planned(devices=devices, **values)
        stages = r"config\.mesh\.stages=(\d) on \1 devices"
        pattern = rf"; what fits: {stages} or config\.batch_size=(\d+)$"
        stages, batch = map(int, re.search(pattern, str(error.value)).groups())
        designer = Designer.of(tiny(**values), devices)

        def fits(size):
            return fit.fits(devices, designer.design(size, **designer.placement))

        assert fits(batch)
        assert not fits(batch + 1)
        more = dataclasses.replace(devices, count=stages)
        planned(devices=more, **{**values, "mesh__stages": stages})

    @pytest.mark.slow
    def test_where_nothing_fits(self):
        with pytest.raises(ConfigError, match="neither more stages nor"):
            planned(devices=Devices(2, memory=1e2, flops=1e9), mesh__stages=2)

    @pytest.mark.slow
    def test_devices_that_share_a_machine(self):
        """Together they need more than it has, though none of them does alone."""
        values = {"mesh__stages": 2, "model__hidden": 64, "batch_size": 64}
        found = planned(devices=Devices(2, memory=1.1 * needed(), flops=1e9), **values)
        assert found.memory_limit.endswith(": it may not be enough")
        devices = Devices(2, memory=1.1 * needed(), shared=True, flops=1e9)
        with pytest.raises(
            ConfigError, match="this machine, with all stages, needs at least "
        ) as error:
            planned(devices=devices, **values)
        assert "mesh.stages" not in str(error.value)  # they would share it, too

    @pytest.mark.parametrize(
        ("flag", "said"),
        [
            ("--memory=16", "--memory is '16': a number above 0 with its unit, such as 16GB, is"),
            ("--link=0GB/s", "--link is '0GB/s': a number above 0 with its unit, such as 12GB/s"),
            ("--latency=5", "--latency is '5': a number above 0 with its unit, such as 50us"),
            ("--flops=fast", "--flops is 'fast': a number above 0 with its unit, such as 8TFLOPS"),
            ("--devices=0", "--devices is 0: a whole number of at least 1 is needed"),
            ("--devices=two", "argument --devices: invalid int value: 'two'"),
            ("--measured", "unknown flag --measured; usage: jdecouple plan --config FILE"),
            (
                "--speeds=0",
                "speeds are (0.0,): a finite number above 0 is needed for each of 2",
            ),
            ("--speeds=fast", "argument --speeds: invalid float value: 'fast'"),
            ("--config.mesh.data=3", "mesh axis data is 3, but only 2 device(s) are present"),
            ("--config.model.hiden=3", "hiden"),
        ],
    )
    def test_bad_input(self, command, flag, said):
        out, error, code = command("--config", runs.TINY, "--devices=2", flag)
        assert (out, code, error.count("\n")) == ("", 2, 1)
        assert said in error

    @pytest.mark.parametrize(
        ("method", "values", "said"),
        [
            ("bp", {"chunk": 2}, "a chunk of 2 batches needs a local method"),
            ("fdg", {"schedule": "delayed_split", "microbatches": 2}, "delayed_split takes 1"),
        ],
    )
    def test_what_training_refuses(self, method, values, said):
        with pytest.raises(ConfigError, match=said):
            planned(method=method, mesh__stages=2, **values)

    def test_a_speed_that_is_given_and_measured(self, command):
        _, error, code = command("--config", runs.TINY, "--measure", "--flops=1TFLOPS")
        assert (error[:35], code) == ("error: --flops and --measure both s", 2)


class TestTimes:
    @pytest.mark.parametrize(
        ("values", "names"),
        [
            ({"microbatches": 4}, ["sequential", "gpipe", "1f1b", "interleaved_1f1b", "zb_h1"]),
            pytest.param({"method": "greedy_exit"}, ["local", "interleaved"], marks=SLOW),
            ({"method": "man"}, ["local"]),
            pytest.param({"method": "fdg"}, ["delayed", "delayed_split"], marks=SLOW),
        ],
    )
    def test_of_every_schedule_of_the_method(self, values, names):
        """As `simulate` has them with the same costs."""
        config = tiny(**values, num_stages=3)
        devices = Devices(3, flops=1e9, bandwidth=1e6, latency=1e-5)
        designer = Designer.of(config, devices)
        works = designer.works
        assert all(work.forward > 0 and work.backward > 0 for work in works)
        costs = times.estimated(designer.given(), works, 1e9, 1e6, 1e-5)
        assert costs.forward == [work.forward / 1e9 for work in works]
        found = plan(config, devices).times
        assert [time["schedule"] for time in found] == names
        for time in found:
            table = schedules.build(time["schedule"], 3, config.microbatches)
            played = schedules.simulate(table, costs, batches=12, max_in_flight=6)
            assert time["seconds"] == played.seconds_per_batch
            assert 0 <= time["bubble"] < 1

    def test_more_stages_than_devices(self):
        """What shares a device waits for it: alone, a device never waits."""
        table = schedules.build("sequential", 4, 1)
        costs = Costs([1.0] * 4, [2.0] * 4)
        for groups, bubble in (((0, 0, 0, 0), 0.0), ((0, 0, 1, 1), 0.5), ((0, 1, 2, 3), 0.75)):
            mesh = StageMesh(tuple((group,) for group in groups))
            found = times.timing(placed(table, mesh), costs, 8)
            assert (found.seconds, found.bubble) == (12.0, bubble)

    @pytest.mark.slow
    def test_from_measured_calls(self, monkeypatch):
        """What is not among the calls of one schedule is measured with another."""
        whole = {"F": 1.0, "FB": 2.0, "FBS": 3.0, "B": 4.0, "BS": 5.0, "S": 6.0}
        split = {
            "F": 1.0,
            "FB": 1.5,
            "B": 2.0,
            "BW": 4.0,
            "BWS": 5.0,
            "W": 1.0,
            "WS": 2.0,
            "S": 1.0,
        }
        made = []

        def measured_costs(trainer, state, batches, repeats):
            made.append(trainer.schedule.name)
            assert len({placement.devices for placement in trainer.placements}) == 1
            assert next(iter(batches)).parts[0]["x"].shape == (4, 8, 8, 1)
            kinds = {call[:2]: "".join(kind.value for kind in call.kinds) for call in trainer.calls}
            seconds = split if trainer.schedule.splits else whole
            return state, Costs(calls={key: seconds[text] for key, text in kinds.items()})

        monkeypatch.setattr(Trainer, "measured_costs", measured_costs)
        found = planned(measure=True, microbatches=2, num_stages=2)
        sequential = {"schedule": "sequential", "groups": 2}
        # Two microbatches one after the other: F, FB, B and F, FBS, BS.
        assert found.times[0] == {**sequential, "seconds": 16.0, "bubble": 0.5}
        # A backward that is split is another call.
        (zb_h1,) = [time for time in found.times if time["schedule"] == "zb_h1"]
        table = schedules.build("zb_h1", 2, 2)
        kinds = {call[:2]: "".join(kind.value for kind in call.kinds) for call in table.calls()}
        costs = Costs(calls={key: split[text] for key, text in kinds.items()})
        played = schedules.simulate(table, costs, batches=8, max_in_flight=4)
        assert zb_h1["seconds"] == played.seconds_per_batch
        assert made[0] == "sequential"
        assert len(made) < len(found.times)
        assert "medians of 5" in found.speed

    def test_steps_that_wait_for_the_norm(self):
        kinds = {kind.value: kind for kind in schedules.Kind}
        calls = {(0, tuple(map(kinds.get, text))): time for text, time in (("FB", 3.0), ("S", 1.0))}
        assert times._of_parts(calls, 0, tuple(map(kinds.get, "FBS"))) == 4.0

    def test_without_a_speed_one_is_measured(self):
        found = planned(devices=Devices(1, memory=1e9))
        assert re.search(r"FLOPS a device, measured here, on cpu 0, by a product of", found.speed)
        assert found.times[0]["seconds"] > 0


class TestSpeeds:
    """Devices of unequal speed."""

    @pytest.mark.slow
    def test_a_slow_device_takes_longer(self):
        """As its speed says: in its stage's time, and in that of the batch."""
        values = {"method": "greedy_exit", "mesh__stages": 2, "model__hidden": 64}
        equal, slow = (
            planned(devices=Devices(2, flops=1e9, speeds=speeds), **values)
            for speeds in ((), (1.0, 0.125))
        )
        first, second = (row["seconds"] for row in equal.stages)
        assert [row["seconds"] for row in slow.stages] == pytest.approx([first, 8 * second])
        assert slow.times[0]["seconds"] == pytest.approx(max(first, 8 * second))
        assert equal.times[0]["seconds"] == pytest.approx(max(first, second))
        assert slow.speed.endswith("a device, as given, times its speed")

    def test_the_best_gives_it_less(self):
        """Four equal blocks behind the first and its larger input, which is on the slow device."""
        values = {"method": "greedy_exit", "mesh__stages": 2, "model__depth": 5}
        devices = Devices(2, flops=1e9, speeds=(0.25, 1.0))
        found = planned(devices=devices, **values)
        own = [row["first_block"] for row in found.stages]
        boundaries = tuple(found.best["boundaries"])
        assert boundaries[1] < own[1]
        again = planned(devices=devices, **values, boundaries=boundaries)
        assert again.times[0]["seconds"] == pytest.approx(found.best["seconds"], rel=1e-9)
        assert again.times[0]["seconds"] < found.times[0]["seconds"]

    @pytest.mark.slow
    def test_calls_that_were_measured(self, monkeypatch):
        def measured_costs(trainer, state, batches, repeats):
            return state, Costs(calls=dict.fromkeys((call[:2] for call in trainer.calls), 1.0))

        monkeypatch.setattr(Trainer, "measured_costs", measured_costs)
        values = {"method": "greedy_exit", "mesh__stages": 2}
        found = planned(devices=Devices(2, speeds=(1.0, 0.5)), measure=True, **values)
        assert [row["seconds"] for row in found.stages] == [1.0, 2.0]
        assert "calls take as long on every device as on the one measured, by the speeds given" in (
            found.assumed
        )

    def test_on_the_command_line(self, command):
        given = ["--config", runs.TINY, "--flops=1GFLOPS", "--speeds", "1", "0.5", "2"]
        given += ["--config.method.name=bp", "--config.method.projector=None"]
        found = json.loads(command(*given, "--format=json")[0])
        assert len(found["memory"]) == 2  # blocks; three devices are described


class TestPlacements:
    def test_devices_that_are_described_need_not_be_here(self):
        count = jax.device_count() + 1
        found = planned(count, model__depth=count, model__hidden=4)
        assert [row["devices"] for row in found.stages] == [[f"device {k}"] for k in range(count)]
        assert len(found.memory) == count

    def test_devices_at_hand(self):
        found = plan(tiny(mesh__stages=2), dataclasses.replace(Devices.here(), flops=1e9))
        assert [row["devices"] for row in found.stages] == [["cpu 0"], ["cpu 1"]]
        assert "memory of this machine, for all devices" in found.memory_limit

    @pytest.mark.slow
    def test_the_best_is_faster_and_can_be_asked_for(self):
        found = planned(4, mesh__stages=1)
        assert found.best["seconds"] < found.times[0]["seconds"]
        replicas, boundaries = found.best["replicas"], found.best["boundaries"]
        again = planned(4, mesh__replicas=tuple(replicas), boundaries=tuple(boundaries))
        assert again.times[0]["seconds"] == pytest.approx(found.best["seconds"], rel=1e-9)
        assert again.best is None
        assert f"--config.mesh.replicas='({replicas[0]}," in str(found)

    def test_results_of_a_delayed_method_stay_what_they_are(self):
        """Another number of stages would be another training."""
        found = planned(4, method="fdg", num_stages=2, mesh__replicas=(1, 1))
        assert len(found.best["boundaries"]) == 2

    @pytest.mark.slow
    def test_a_proposal(self):
        found = planned(4, mesh__propose=True, mesh__stages=2)
        assert len(found.stages) == 2
        assert found.best is None or len(found.best["boundaries"]) != 2


@pytest.mark.slow
def test_a_growing_model_is_planned_as_it_is_at_last():
    values = {"method": "greedy_exit", "growth__blocks": (2, 3), "growth__steps": (0, 5)}
    found, whole = planned(**values), planned(method="greedy_exit")
    flops, others = ([row["flops"] for row in each.blocks] for each in (found, whole))
    assert flops[1] < 0.5 * others[1]  # frozen: a forward alone
    assert flops[2] == others[2]


def test_data_that_are_not_here(tmp_path):
    """Of a set of images TFDS tells the shapes without them; nothing is written or downloaded."""
    values = {
        "data__name": "cifar10",
        "data__data_dir": str(tmp_path),
        "data__synthetic_size": 4096,
    }
    found = planned(1, **values, data__channels=3, data__image_size=None)
    assert found.data == "cifar10"
    assert found.blocks[0]["parameters"] == (32 * 32 * 3 + 1) * 16
    assert found.assumed[0].startswith("data set cifar10 is not prepared here: shapes are")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(ConfigError, match="data set 'cifar11' cannot be opened"):
        planned(1, **{**values, "data__name": "cifar11"})


def stand_in(name, tmp_path):
    """A preset on a tiny set of its kind."""
    config = presets.load(name)
    texts = name in ("text", "growing")
    if texts or config.data.name != "digits":
        config.data.name = csv_set(tmp_path / "texts") if texts else "synthetic"
    if config.data.name == "synthetic":
        config.data.synthetic_size = 20
    config.batch_size = 8
    config.growth.epochs = None if config.growth.blocks is None else (0, 1)
    return config


@pytest.mark.parametrize("name", [*presets.names()])
@pytest.mark.slow
def test_every_preset_plans_on_a_stand_in(name, tmp_path):
    found = plan(stand_in(name, tmp_path), Devices(3, flops=1e12))
    assert found.times[0]["seconds"] > 0
    assert all(row["total"] > 0 for row in found.memory)
    assert tables.text_of(json.loads(found.to_json())) == str(found)


def test_states_with_queues_that_do_not_fit_are_not_trained(monkeypatch):
    """Weights would, but what waits between two steps does not."""
    trainer = build(tiny("ddg", num_stages=2)).trainer
    arrays = trainer.to_arrays(trainer.abstract())
    sizes = {name: size_of(leaf) for name, leaf in arrays.items()}
    assert sum(size for name, size in sizes.items() if "/waiting/" in name) > 1000
    total = sum(sizes.values())
    monkeypatch.setattr(memory, "machine_bytes", lambda: total)
    memory.check_stages(trainer)
    monkeypatch.setattr(memory, "machine_bytes", lambda: total - 1)
    with pytest.raises(ConfigError, match=r"states of all stages need .* waits in queues"):
        memory.check_stages(trainer)
