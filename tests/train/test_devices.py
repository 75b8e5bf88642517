"""The first lines of a run, and the warning of a GPU that it does not use."""

import types

import pytest
import runs
import text_sets

from jdecouple.train import devices, loop
from jdecouple.train.run import build

CUDA12 = {"jax-cuda12-plugin": "0.7.2"}


@pytest.fixture(scope="module")
def run():
    return build(runs.tiny(dtype="bfloat16"))


@pytest.fixture
def nobody_asked(monkeypatch):
    """As where JAX fell back to the CPU, on a machine without any GPU."""
    monkeypatch.setattr(devices, "cpu_is_meant", lambda: False)
    monkeypatch.setattr(devices, "nvidia_devices", list)
    monkeypatch.setattr(devices, "cuda_plugins", dict)


def test_first_lines(run, capsys):
    devices.introduce(run.config)
    devices.announce(run)
    out, err = capsys.readouterr()
    assert out == (
        "model mlp | method deinforeg | data synthetic | dtype bfloat16\n"
        "stages 1 | devices 1 x cpu\n"
    )
    assert err == ""  # the tests ask for the CPU


def test_devices_are_counted_once(capsys):
    delayed = build(runs.tiny(num_stages=2, mesh__stages=2, mesh__data=2))
    devices.announce(delayed)
    assert capsys.readouterr().out == "stages 2 | devices 4 x cpu\n"


def test_a_proposal_follows_it(capsys):
    devices.announce(build(runs.tiny(mesh__stages=2, mesh__propose=True)))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("stages 2 | ")
    assert second.startswith("proposal: ")


def test_texts_that_are_padded_too_far(tmp_path, capsys):
    name = text_sets.csv_set(tmp_path, longest=5)
    devices.announce(build(text_sets.tiny(name, data__buckets=None)))
    _, line = capsys.readouterr().out.splitlines()
    said = "texts are padded to 256 words, the longest has 5: config.data.max_length=5 is faster"
    assert line == said
    devices.announce(build(text_sets.tiny(name, data__buckets=None, data__max_length=200)))
    devices.announce(build(text_sets.tiny(name)))
    assert "padded" not in capsys.readouterr().out


@pytest.mark.usefixtures("nobody_asked")
def test_no_gpu_no_warning(run, capsys):
    devices.announce(run)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("nobody_asked")
@pytest.mark.parametrize(
    ("present", "plugins", "said"),
    [
        (["/dev/nvidia0"], {}, ["/dev/nvidia0 is present, but JAX has no CUDA plugin", "cuda13"]),
        ([], CUDA12, ["jax-cuda12-plugin 0.7.2 does not fit jaxlib"]),
        (["/dev/nvidia0"], CUDA12, ["jax-cuda12-plugin 0.7.2 does not fit jaxlib"]),
    ],
)
def test_an_unused_gpu_is_told_on_one_line(run, capsys, monkeypatch, present, plugins, said):
    monkeypatch.setattr(devices, "nvidia_devices", lambda: present)
    monkeypatch.setattr(devices, "cuda_plugins", lambda: plugins)
    devices.announce(run)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: ")
    assert all(words in line for words in [*said, 'pip install -U "jax[cuda12]"', "JAX_PLATFORMS"])


@pytest.mark.parametrize(
    ("present", "plugins", "said"),
    [
        (["/dev/nvidia0"], {"jax-cuda13-plugin": "0.10.2"}, "jax-cuda13-plugin cannot use it"),
        (["/dev/nvidia0"], {"jax-cuda13-plugin": "0.11.0"}, 'pip install -U "jax[cuda13]".'),
        ([], {"jax-cuda12-plugin": "0.7.2", "jax-cuda13-plugin": "0.10.2"}, None),
        ([], {"jax-cuda12-plugin": "0.10.2+local"}, None),
        ([], {}, None),
    ],
)
def test_what_fits_is_no_reason(present, plugins, said):
    found = devices.unused_gpu(present, plugins, "0.10.2")
    assert found is None if said is None else said in found


def test_devices_of_the_driver(tmp_path):
    assert devices.nvidia_devices(tmp_path) == []
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "proc/driver/nvidia/gpus/0000:00:04.0").mkdir(parents=True)
    names = [name.removeprefix(f"{tmp_path}/") for name in devices.nvidia_devices(tmp_path)]
    assert names == ["dev/nvidia0", "proc/driver/nvidia/gpus/0000:00:04.0"]


def test_plugins_are_found_without_their_import(tmp_path, monkeypatch):
    assert devices.cuda_plugins() == {}
    folder = tmp_path / "jax_cuda12_plugin-0.7.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: jax-cuda12-plugin\nVersion: 0.7.2"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert devices.cuda_plugins() == CUDA12


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [
        ("jax_platforms", "cpu", True),
        ("jax_platforms", "cpu,cuda", True),
        ("jax_platforms", "cuda,cpu", False),
        ("jax_platforms", None, False),
        ("jax_platform_name", "cpu", True),
    ],
)
def test_the_cpu_is_meant_where_it_was_asked_for(monkeypatch, option, value, meant):
    options = {"jax_platforms": None, "jax_platform_name": None, option: value}
    monkeypatch.setattr(devices.jax, "config", types.SimpleNamespace(values=options))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.cpu_is_meant() is meant
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.cpu_is_meant()


@pytest.mark.slow
def test_the_first_comes_before_anything_is_built(tmp_path, capsys, monkeypatch):
    printed = []

    def built(config):
        printed.append(capsys.readouterr().out)
        return build(config)

    monkeypatch.setattr(loop, "build", built)
    loop.train_and_evaluate(runs.tiny(steps=1), tmp_path)
    assert printed == ["model mlp | method deinforeg | data synthetic | dtype float32\n"]
    assert capsys.readouterr().out.startswith("stages 1 | devices ")
