"""Metrics in a run of Weights & Biases."""

import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

from jdecouple._files import is_stored, replace, resolved
from jdecouple.train.tracking.writer import Start, finite

FILE_NAME = "wandb.json"


class WeightsAndBiases:
    """Writes a run of W&B: "train/loss", "test/exit_0/accuracy" and so on by step.

    Its id, and the last step of each split that it has, are in `wandb.json` in the workdir: a run
    that goes on does so in the same run of W&B, and repeats no line. One that begins anew has a new
    id. The settings of W&B are the user's (variables `WANDB_...`, `wandb online`). Without them the
    run is offline, in `wandb/` in the workdir (where that is in an object store, in the folder that
    the program runs in), so that nothing leaves the machine, and belongs to the project jdecouple
    under the name of the workdir.
    """

    def __init__(self, start: Start):
        if "WANDB_MODE" not in os.environ:  # it would report errors, whatever its mode is
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        user = wandb.setup().settings
        known = user.model_fields_set
        self._path = start.workdir / FILE_NAME
        kept = self._kept() if start.step is not None else {}
        self._id = user.run_id or kept.get("id") or secrets.token_hex(4)
        self._written = kept.get("written", {}) if self._id == kept.get("id") else {}
        own: dict[str, Any] = {"console": "off", "quiet": True, "reinit": "create_new"}
        given: dict[str, Any] = {
            "mode": user.mode if "mode" in known else "offline",
            "dir": None if "root_dir" in known or is_stored(start.workdir) else start.workdir,
            "project": user.project or "jdecouple",
            "name": user.run_name or resolved(start.workdir).name,
        }
        try:
            self._run = wandb.init(
                id=self._id,
                resume="allow",
                config=start.config.to_dict(),
                settings=wandb.Settings(**{k: v for k, v in own.items() if k not in known}),
                **given,
            )
        except BaseException:
            self._end_process()
            raise
        news = [line for line in start.written() if self._is_new(*line[:2])]
        self._keep()
        for line in news:
            self._log(*line)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Logs the values that are finite, unless the run has that line."""
        if self._is_new(step, split):
            self._keep()  # first, as a line that is lost is less than one that is there twice
            self._log(step, split, values)

    def close(self) -> None:
        """Ends the run, and W&B's own process unless another run needs it."""
        self._run.finish()
        self._end_process()

    def _end_process(self) -> None:
        if self._wandb.setup().most_recent_active_run is not None:
            return
        try:
            self._wandb.teardown()
        except SystemExit as error:
            raise RuntimeError(f"the process of W&B ended with {error.code}") from error

    def _is_new(self, step: int, split: str) -> bool:
        """Whether the run lacks a line; it then counts as there."""
        if step <= self._written.get(split, -1):
            return False
        self._written[split] = step
        return True

    def _log(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        self._run.log({f"{split}/{k}": v for k, v in finite(values).items()}, step=step)

    def _kept(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._path.read_text())
            written = {str(split): int(step) for split, step in kept["written"].items()}
            return {"id": str(kept["id"]), "written": written}
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return {}

    def _keep(self) -> None:
        text = json.dumps({"id": self._id, "written": self._written}) + "\n"
        replace(self._path, lambda temporary: temporary.write_text(text))
