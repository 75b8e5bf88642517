"""Reader of the golden vectors: what the papers' released PyTorch code computed.

`tests/golden/CASE.npz` holds float64 inputs and weights, and the results in both precisions;
`CASE.json`, where there is one, the settings and the formula. Dense weights are (out, in),
convolutions OIHW, images NCHW; the functions here turn them into flax's layouts.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    """One case: `golden["out64.loss"]` is an array, `golden.settings["lr"]` a setting."""

    name: str
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]

    def __getitem__(self, key):
        return self.arrays[key] if isinstance(key, str) else tuple.__getitem__(self, key)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose key starts with `prefix` and a dot or slash, by the rest of the key."""
        start = prefix if prefix.endswith("/") else prefix + "."
        return {k.removeprefix(start): v for k, v in self.arrays.items() if k.startswith(start)}


def cases(prefix: str) -> list[str]:
    """Names of the cases that start with `prefix`."""
    found = sorted(path.stem for path in FOLDER.glob(f"{prefix}*.npz"))
    assert found, f"no golden vectors {prefix}* in {FOLDER}"
    return found


@cache
def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    settings = FOLDER / f"{name}.json"
    return Golden(name, arrays, json.loads(settings.read_text()) if settings.is_file() else {})


def images(x: np.ndarray) -> np.ndarray:
    """[..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(x, -3, -1)


def conv_kernel(weight: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO, further leading axes kept."""
    return np.moveaxis(weight, (-4, -3), (-1, -2))


def dense_kernel(weight: np.ndarray, image: tuple[int, int, int] | None = None) -> np.ndarray:
    """(out, in) -> (in, out), further leading axes kept.

    With `image` = (C, H, W) the layer reads a flattened image: rows go from NCHW to NHWC order.
    """
    kernel = np.swapaxes(weight, -1, -2)
    if image is None:
        return kernel
    rows = np.arange(np.prod(image)).reshape(image).transpose(1, 2, 0).ravel()
    return kernel[..., rows, :]


def relative_error(actual, expected, scale: float | None = None) -> float:
    """Largest absolute error over the largest absolute value expected (or over `scale`).

    Of the array's scale, not elementwise: an entry that cancels to nearly nothing carries the
    rounding of the terms that it came from.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.all(np.isfinite(actual)), actual
    if scale is None:
        scale = float(np.max(np.abs(expected), initial=0.0))
    error = float(np.max(np.abs(actual - expected), initial=0.0))
    return error / scale if scale else error
