"""What makes a plain `Trainer.fit` draw the random numbers that a trial drew by hops."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cerebro_tune.seeding import seed_unit, seed_validation

if TYPE_CHECKING:
    from pytorch_lightning import Callback

    Callbacks = (Callback,)
else:
    # A Trainer takes only callbacks of its own package, and both packages may be installed.
    Callbacks = tuple(
        import_module(package).Callback
        for package in ("pytorch_lightning", "lightning.pytorch")
        if find_spec(package.partition(".")[0])
    )


class ReseedCallback(*Callbacks):  # type: ignore[misc]
    """Seeds the generators where the units of a trial did; the first of a plain Trainer's callbacks.

    With the trial's batches from `cerebro_tune.seeding.VisitLoader`, which seeds at each shard, and the trial's initial
    weights, `Trainer.fit` then gives what the trial gave by hops, bit for bit.

    Args:
        seed: The seed of the run.
        trial_index: The trial's number in the run, from 0.
        visits: `TrialResult.visits`: tuples that begin with (epoch, shard), in the order they were made.
    """

    def __init__(self, seed: int, trial_index: int, visits: Sequence[Sequence[Any]]) -> None:
        self.seed, self.trial_index = seed, trial_index
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        for epoch, shard, *_ in visits:
            self.first.setdefault(epoch, shard)
            self.last[epoch] = shard

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed as the epoch's first unit does."""
        self._seed_unit(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed as the epoch's first unit does."""
        self._seed_unit(trainer.current_epoch)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed as the validation after the epoch's last unit does."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            epoch = trainer.current_epoch
            seed_validation(self.seed, self.trial_index, epoch, self.last[epoch])

    def _seed_unit(self, epoch: int) -> None:
        seed_unit(self.seed, self.trial_index, epoch, self.first[epoch])
