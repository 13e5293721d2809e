"""`HopCheckpointIO`: any trial of a run, by its id, wherever a Trainer takes the path of a checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cerebro_tune.errors import ConfigurationError
from cerebro_tune_lightning.checkpoint import EXTRAS, write
from cerebro_tune_lightning.strategy import hosts_in_use, with_bases

if TYPE_CHECKING:
    from lightning_fabric.plugins import TorchCheckpointIO as Base
else:
    Base = object

_BASE = "plugins.io.TorchCheckpointIO"
_TRIAL = re.compile(r"trial-\d{4,}")
_KINDS = ("last", "best")


class HopCheckpointIO(Base):
    """Give it to a plain Trainer, `pl.Trainer(plugins=[HopCheckpointIO("runs/a")])`, to go on with trials of a run.

    `ckpt_path="trial-0007"` is the trial's last checkpoint and `"trial-0007/best"` its best one, for `fit`, `validate`,
    `test` and `predict`; any other path is what it says. `fit` goes on at the epoch and the step that the trial had
    reached; a trial that was cut short in mid-epoch has the rest of that epoch before it, as Lightning has it.

    Args:
        run_dir: The folder of a run, `Results.run_dir`; or an executor's `run_dir`, for the last run in it.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> HopCheckpointIO:  # noqa: D102
        kind: type[HopCheckpointIO] = with_bases(cls, hosts_in_use("HopCheckpointIO"), _BASE)
        return object.__new__(kind)

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        if not any(self.run_dir.glob("trial-*")):
            runs = {trial.parent for trial in self.run_dir.glob("*/trial-*")}
            self.run_dir = max(runs, default=self.run_dir)  # their names count up

    def path(self, given: str | os.PathLike[str]) -> str:
        """The file that is meant; ConfigurationError for a trial that has none."""
        parts = Path(given).parts
        if os.path.exists(given) or not parts or not _TRIAL.fullmatch(parts[0]) or len(parts) > 2:
            return str(given)
        trial, kind = parts[0], parts[1] if len(parts) == 2 else "last"
        if kind not in _KINDS:
            raise ConfigurationError(f"{given} is no checkpoint of {trial}; valid: {trial}, {trial}/best.")
        # What was best in the last unit is not written twice.
        found = [self.run_dir / trial / f"{name}.ckpt" for name in ((kind,) if kind == "best" else _KINDS)]
        existing = [path for path in found if path.exists()]
        if not existing:
            raise ConfigurationError(
                f"{self.run_dir} has no {kind} checkpoint of {trial}; it has {self._trials() or 'no trials at all'}."
            )
        return str(existing[0])

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, of a trial or any other; what only workers know of a trial is left out."""
        checkpoint: dict[str, Any] = super().load_checkpoint(self.path(path), *args, **kwargs)
        checkpoint.pop(EXTRAS, None)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint as the executor saves those of trials: whole or not at all."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(checkpoint, Path(path))

    def _trials(self) -> str:
        return ", ".join(sorted({path.parent.name for path in self.run_dir.glob("trial-*/*.ckpt")}))
