"""What a stage keeps on disk: its checkpoints, its metrics, and where others find it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jdecouple._files import replace
from jdecouple.checkpoint import Checkpointer

_PLACE = "place.json"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the process of a stage is, what it trains, and how many have been started for it."""

    address: str
    port: int
    config: dict[str, Any]
    starts: int


class StageFolder:
    """The folder of a stage in a workdir that all processes see."""

    def __init__(self, workdir: Path, index: int):
        self.path = workdir / "stages" / str(index)

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_step(self) -> int:
        """Step of its last checkpoint, -1 without one."""
        step = Checkpointer(self.checkpoints, read_only=True).latest_step
        return -1 if step is None else step

    @property
    def place(self) -> Place | None:
        """Its place since the last start; None before the first."""
        try:
            return Place(**json.loads((self.path / _PLACE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, address: str, port: int, config: dict[str, Any]) -> None:
        """Counts a start, and says where the stage above finds this one."""
        before = self.place
        starts = 1 + (before.starts if before else 0)
        text = json.dumps(dataclasses.asdict(Place(address, port, config, starts)))
        replace(self.path / _PLACE, lambda path: path.write_text(text))
