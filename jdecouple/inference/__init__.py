"""What was trained, in use: loading, prediction, rules of leaving early, calibration, reports."""

from jdecouple.inference.adaptive import AdaptivePredictor
from jdecouple.inference.load import load
from jdecouple.inference.rules import Rule
from jdecouple.inference.run import Predictions, Run

__all__ = ["AdaptivePredictor", "Predictions", "Rule", "Run", "load"]
