"""What a run says first: what it trains, on what, and a warning of a GPU that it leaves alone."""

import collections
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax
from ml_collections import ConfigDict

from jdecouple._errors import first_line
from jdecouple.data import TextDataset
from jdecouple.train.places import cuda_plugins, nvidia_devices
from jdecouple.train.run import Run


def introduce(config: ConfigDict) -> None:
    """Prints what a checked configuration trains, before it is built, which may take seconds."""
    parts = {key: config[key].name for key in ("model", "method", "data")} | {"dtype": config.dtype}
    print(first_line(" | ".join(f"{name} {value}" for name, value in parts.items())), flush=True)


def announce(run: Run) -> None:
    """Prints on what it is trained; on stderr, if that is so, that a GPU is not used."""
    trainer = run.trainer
    used = {device for placement in trainer.placements for device in placement.devices}
    kinds = collections.Counter(device.device_kind for device in used)
    listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    print(f"stages {len(trainer.stages)} | devices {listed}", flush=True)
    if padding := _needless_padding(run):
        print(padding, flush=True)
    if run.proposal is not None:
        print(f"proposal: {run.proposal}")
    if run.grows:
        first, *later = ((phase.start, len(phase.trainer.model.blocks)) for phase in run.phases)
        text = "".join(f", {count} after step {start}" for start, count in later)
        early = run.grows[-1] >= run.total_steps
        end = f"; the run ends at step {run.total_steps}, before it has all" if early else ""
        print(f"blocks: {first[1]}{text}{end}", flush=True)
    if jax.default_backend() == "cpu" and not cpu_is_meant():
        warning = unused_gpu(nvidia_devices(), cuda_plugins(), metadata.version("jaxlib"))
        if warning:
            print(f"WARNING: {warning}", file=sys.stderr, flush=True)


def cpu_is_meant() -> bool:
    """Whether the environment or the program asked for the CPU, or hid the GPUs."""
    options = jax.config.values
    asked = options["jax_platforms"] or options["jax_platform_name"]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return hidden or (asked or "").split(",")[0] == "cpu"


def _needless_padding(run: Run) -> str:
    """What there is to say where nobody chose to what length texts are padded, and it is far."""
    given, dataset = run.config.data, run.dataset
    lengths = getattr(dataset.train.source, "lengths", None)  # a set of one's own may have none
    chosen = given.max_length or given.buckets or given.parts
    if chosen or lengths is None or not isinstance(dataset, TextDataset):
        return ""
    longest, padded = int(lengths.max()), dataset.max_length
    if 2 * longest > padded:
        return ""
    return (
        f"texts are padded to {padded} words, the longest has {longest}: "
        f"config.data.max_length={longest} is faster"
    )


def unused_gpu(devices: Sequence[str], plugins: Mapping[str, str], jaxlib: str) -> str | None:
    """Why JAX computes on the CPU although there is a GPU, or seems to be, and the remedy.

    A plugin without a GPU is no reason to warn if it fits jaxlib: images are made for both.

    >>> print(unused_gpu([], {"jax-cuda12-plugin": "0.7.2"}, "0.10.2").split(":")[0])
    jax-cuda12-plugin 0.7.2 does not fit jaxlib 0.10.2
    >>> unused_gpu([], {"jax-cuda12-plugin": "0.10.2"}, "0.10.2") is None
    True
    """
    fitting = [name for name, version in plugins.items() if _release(version) == _release(jaxlib)]
    others = [f"{name} {version}" for name, version in plugins.items() if name not in fitting]
    if not fitting and others:
        reason = f"{' and '.join(others)} does not fit jaxlib {jaxlib}"
    elif not devices:
        return None
    elif fitting:
        reason = f"{devices[0]} is present, but {fitting[0]} cannot use it (see nvidia-smi)"
    else:
        reason = f"{devices[0]} is present, but JAX has no CUDA plugin"
    names = sorted({name.split("-")[1] for name in plugins} or {"cuda12", "cuda13"})
    remedy = " or ".join(f'pip install -U "jax[{name}]"' for name in names)
    return (
        f"{reason}: this run uses the CPU, not a GPU. Remedy: {remedy}. "
        "JAX_PLATFORMS=cpu says that the CPU is meant"
    )


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:3]
