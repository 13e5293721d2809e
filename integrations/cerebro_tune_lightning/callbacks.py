"""Callbacks that people give: which have nothing to do in a worker, and which cannot train by hops.

Importing this module imports no Lightning: a callback is known by the names of the classes it derives from.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

from cerebro_tune.errors import ConfigurationError, NotTrainableError

_IDLE = ("ModelCheckpoint", "OnExceptionCheckpoint", "ModelSummary", "ProgressBar")
"""What these show and save is the coordinator's to show and save, once."""

_SAVERS = ("ModelCheckpoint",)
_FREE = frozenset({"__init__", "__module__", "__doc__", "format_checkpoint_name", "state_key"}) | vars(object).keys()
"""What a ModelCheckpoint of the user's own may define: it is used, or makes no difference."""
_PACKAGES = ("pytorch_lightning.", "lightning.", "builtins", "abc")

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


def savers(callbacks: Iterable[Any]) -> list[Any]:
    """The ModelCheckpoints."""
    return [callback for callback in callbacks if derives(callback, _SAVERS)]


def checkpoint_callback(callbacks: Iterable[Any]) -> Any:
    """The first ModelCheckpoint, whose monitor and mode say which checkpoint is the best; None if there is none."""
    return next(iter(savers(callbacks)), None)


def check_savers(callbacks: Iterable[Any], name: str) -> None:
    """Raise NotTrainableError for a ModelCheckpoint that wants what the executor does not save; warn if it has less."""
    for saver in savers(callbacks):
        _refuse_times(saver, name)
        _refuse_hooks(saver, name)
        if saver.save_top_k not in (0, 1):
            warnings.warn(
                f"A ModelCheckpoint has save_top_k={saver.save_top_k}, but of each trial the best checkpoint and the "
                "last are kept: best_k_models will have the best.",
                stacklevel=2,
            )


def _refuse_times(saver: Any, name: str) -> None:
    asked = {
        "every_n_train_steps": (saver._every_n_train_steps, (0,)),
        "train_time_interval": (saver._train_time_interval, (None,)),
        "every_n_epochs": (saver._every_n_epochs, (0, 1)),
        "save_on_exception": (saver.save_on_exception, (False,)),
    }
    for what, (value, valid) in asked.items():
        if value not in valid:
            raise NotTrainableError(
                f"{name} is trained with a ModelCheckpoint with {what}={value!r}, but the executor saves a trial when "
                "it reports: leave it out, and give Cerebro report_every='unit' or 'epoch'."
            )


def _refuse_hooks(saver: Any, name: str) -> None:
    own = [base for base in type(saver).__mro__ if not base.__module__.startswith(_PACKAGES)]
    (lightnings, *_) = (base for base in type(saver).__mro__ if base.__name__ in _SAVERS and base not in own)
    if hooks := sorted(
        {n for base in own for n, v in vars(base).items() if callable(v) and hasattr(lightnings, n)} - _FREE
    ):
        raise NotTrainableError(
            f"{name} is trained with the callback {type(saver).__name__}, a ModelCheckpoint with its own "
            f"{', '.join(hooks)}, which would not be called: the executor saves. Put that into a plain Callback."
        )


def derives(thing: Any, names: Collection[str], part: str = "callbacks") -> str | None:
    """The first of Lightning's own classes of these names, in this part of it, that a thing's class derives from."""
    packages = (f"pytorch_lightning.{part}", f"lightning.pytorch.{part}")
    bases = type(thing).__mro__
    return next(
        (base.__name__ for base in bases if base.__name__ in names and base.__module__.startswith(packages)), None
    )
