"""Callbacks that people give: which have nothing to do in a worker, and which cannot train by hops.

Importing this module imports no Lightning: a callback is known by the names of the classes it derives from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from cerebro_tune.errors import ConfigurationError, NotTrainableError

_IDLE = ("ModelCheckpoint", "OnExceptionCheckpoint", "ModelSummary", "ProgressBar")
"""What these show and save is the coordinator's to show and save, once."""

_REFUSED = {
    "StochasticWeightAveraging": "which swaps schedulers and adds an epoch of its own: use Lightning's WeightAveraging "
    "or EMAWeightAveraging callback instead.",
    "LearningRateFinder": "which trains on batches of its own: make the learning rate part of the search space.",
    "BatchSizeFinder": "which trains on batches of its own: make batch_size part of the search space.",
    "ModelPruning": "which replaces parameters of the module, so that no fresh build can take up the state: prune the "
    "trained model.",
    "Timer": "but a trial's time is spread over workers and pauses: limit the epochs, or let the tuner stop trials.",
    "Checkpoint": "but the executor writes the checkpoints: use a ModelCheckpoint, whose monitor and mode count, or a "
    "plain Callback.",
}
"""What cannot hop, and what to do instead."""

_PRUNING = "PyTorchLightningPruningCallback"
"""Of optuna-integration, where it lies in one module or another."""


def as_list(callbacks: Any) -> list[Any]:
    """What may be given as a Trainer's callbacks, as a list."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]


def working(callbacks: Iterable[Any], name: str) -> list[Any]:
    """The callbacks that have something to do in a worker; an error for one that cannot hop, or must not.

    `name` is that of what is trained, for the message.
    """
    kept = [callback for callback in callbacks if not derives(callback, _IDLE)]
    for callback in kept:
        if any(base.__name__ == _PRUNING for base in type(callback).__mro__):
            metric = getattr(callback, "monitor", "val_loss")
            raise ConfigurationError(
                f"{name} is trained with {_PRUNING}(trial, monitor={metric!r}), but a trial that hops reports by "
                "itself: take that callback out, and give HopStrategy, optimize or fit the metric, as in "
                f"HopStrategy(cerebro, trial, metric={metric!r})."
            )
        if found := derives(callback, _REFUSED):
            raise NotTrainableError(f"{name} is trained with the callback {type(callback).__name__}, {_REFUSED[found]}")
    return kept


def checkpoint_callback(callbacks: Iterable[Any]) -> Any:
    """The first ModelCheckpoint, whose monitor and mode say which checkpoint is the best; None if there is none."""
    return next((callback for callback in callbacks if derives(callback, ("ModelCheckpoint",))), None)


def derives(thing: Any, names: Collection[str], part: str = "callbacks") -> str | None:
    """The first of Lightning's own classes of these names, in this part of it, that a thing's class derives from."""
    packages = (f"pytorch_lightning.{part}", f"lightning.pytorch.{part}")
    bases = type(thing).__mro__
    return next(
        (base.__name__ for base in bases if base.__name__ in names and base.__module__.startswith(packages)), None
    )
