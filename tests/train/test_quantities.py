"""Numbers with their units on the command line."""

import pytest

from jdecouple.train import quantities
from jdecouple.train.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        *[("16GB", "B", 16e9), ("1.5 MiB", "B", 1.5 * 2**20), ("7B", "B", 7)],
        *[("12GB/s", "B/s", 12e9), ("50us", "s", 5e-5), ("2ms", "s", 2e-3), ("1s", "s", 1)],
        *[("8TFLOPS", "FLOPS", 8e12), ("1e3FLOPS", "FLOPS", 1e3)],
    ],
)
def test_quantities(text, unit, value):
    assert quantities.parse("x", text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "GB", "16", "16 XB", "-1GB", "0B", "infB", "16GBB", "1mB"])
def test_quantities_that_are_none(text):
    with pytest.raises(ConfigError, match="a number above 0 with its unit, such as 16GB"):
        quantities.parse("x", text, "B")
