"""What a scheduler holds of a trial's past, where stock Ray has a checkpoint on disk."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from pyarrow.fs import LocalFileSystem
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint

from cerebro_tune.trainable import Config
from cerebro_tune_ray.rows import Standing

LetGo = deque[tuple[str | None, str | None]]
"""Trials of the run, and files of states, that snapshots have held."""


class Snapshot(Checkpoint):
    """A trial's state as it was, held in the run for as long as somebody refers to this; copies are one and the same.

    It takes the place of a Checkpoint where a scheduler keeps one of a trial that others may exploit, and is no folder.
    One of a run that is over has a `standing`, until it is wanted and held.
    """

    hop: str | None = None
    standing: Standing | None = None
    _watch: weakref.finalize[Any, Any] | None = None

    def __init__(
        self, iteration: int, time_s: float, file: str | None, config: Config | None = None, fit: int = 0
    ) -> None:
        super().__init__("snapshot", LocalFileSystem())
        self.iteration, self.time_s, self._file, self.fit = iteration, time_s, file, fit
        self.config = config
        """What the state was trained under; None where that is not known."""

    @classmethod
    def of(cls, standing: Standing) -> Snapshot:
        """Where a trial stood in a run that is over."""
        snapshot = cls(standing.iteration, standing.time_s, standing.file, standing.trained_under, standing.fit)
        snapshot.standing = standing
        return snapshot

    @property
    def noted(self) -> Standing:
        """Where the trial stood, of a snapshot that holds none yet."""
        assert self.standing is not None, "it holds a trial of the run"
        return self.standing

    def hold(self, hop: str, let_go: LetGo) -> Snapshot:
        """Hold this trial of the run; it is left in `let_go` when nobody refers to the snapshot any more."""
        self.hop = hop
        return self.watched(let_go)

    def resolve(self) -> _TrainingResult:
        """What Ray's own saves give when they are done; PBT's replay asks for it."""
        return _TrainingResult(checkpoint=self, metrics={})

    def watched(self, let_go: LetGo) -> Snapshot:
        """Leave what this holds by then in `let_go` when nobody refers to it any more."""
        if self._watch is not None:
            self._watch.detach()
        # Whichever thread collects this must not call into the run, which may be in the middle of something.
        self._watch = weakref.finalize(self, let_go.append, (self.hop, self._file))
        self._watch.atexit = False
        return self

    def __copy__(self) -> Snapshot:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Checkpoint, (self.path, self.filesystem)  # what it holds does not outlive this process
