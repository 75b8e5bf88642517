"""What metrics are written to beside metrics.jsonl: TensorBoard, W&B, writers of one's own."""

from jdecouple.train.tracking.table import names, register
from jdecouple.train.tracking.writer import Callback, Start, TrackingError, Writer

__all__ = ["Callback", "Start", "TrackingError", "Writer", "names", "register"]
