"""The first callback of a kept Trainer: it sees a unit's losses, and times its validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cerebro_tune.trainable import UnitWork


def make_watcher(base: type, attach: Callable[[Any], None]) -> Any:
    """The callback itself; `base` is the Callback of either package, `attach` is called before any other's `setup`."""

    class Watcher(base):  # type: ignore[misc]  # known only when the module's class is
        losses: list[torch.Tensor | None]

        @contextmanager
        def unit(self, work: UnitWork) -> Iterator[None]:
            self._validating, self.losses = work.validating, []
            with ExitStack() as self._open:
                yield

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            attach(trainer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(outputs.get("loss"))

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self._open.enter_context(self._validating())

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self._open.close()

    return Watcher()
