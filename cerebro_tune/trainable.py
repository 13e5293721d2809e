"""How one trial trains on one shard: the contract between a worker and what it trains.

A `Recipe` is what a user hands in, made uniform: it is pickled once per run and knows how to make trainables. A
`Trainable` is one trial in one worker; the worker keeps it between units and loads the trial's state into it whenever
the trial hops back. `as_recipe` finds the adapter for what the user gave through the entry point group
`cerebro_tune.trainables`, so the core knows no host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from cerebro_tune.data.order import batch_sizes
from cerebro_tune.errors import NotTrainableError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole horizon of one trial, known before its first step."""

    epochs: int
    batch_size: int
    shard_rows: tuple[int, ...]
    device: str = "cpu"
    last_batch: str = "spread"
    accumulate: int = 1

    @property
    def batches_per_epoch(self) -> int:
        """Batches that one pass over every shard gives."""
        return sum(len(batch_sizes(rows, self.batch_size, self.last_batch)) for rows in self.shard_rows)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; an accumulation that is open at the epoch's end is closed there."""
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole trial: what a scheduler calls `total_steps`."""
        return self.steps_per_epoch * self.epochs


class Batches(Protocol):
    """A sized, re-iterable source of batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class UnitWork:
    """What a trainable is given for one unit.

    `position` is the number of units the trial has done in this epoch; `last` is true for the epoch's last one.
    `validation` is None when this unit is not validated; otherwise iterate it inside `with work.validating():`, which
    seeds the generators and takes the time.
    """

    epoch: int
    shard: int
    position: int
    last: bool
    train: Batches
    validation: Batches | None
    validating: Callable[[], AbstractContextManager[None]]


class Trainable(ABC):
    """One trial in one worker. Made by `Recipe.create`, then `start` once, then units, each after a `load_state_dict`.

    The first unit of a trial runs on what `start` built.
    """

    @abstractmethod
    def start(self, config: Config, plan: Plan) -> None:
        """Build model, optimizer and the rest on `plan.device`; the generators are seeded by (seed, trial index)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything the next unit needs, as a tree for `cerebro_tune.state`; tensors are not copied."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. CPU tensors in it are to be adopted, not copied: they live in the trial's buffer."""

    @abstractmethod
    def run_unit(self, work: UnitWork) -> dict[str, float]:
        """Train on every batch of `work.train`, validate if asked, and return the metrics, `train_loss` among them."""

    def change_config(self, old: Config, new: Config) -> None:
        """Make `new`, on which the trainable was built, effective in a state that was trained under `old`."""
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if changed:
            raise NotTrainableError(f"{type(self).__name__} cannot change {', '.join(changed)} in mid-training.")

    def close(self) -> None:  # noqa: B027  # most trainables hold nothing but memory
        """Let go of what outlives garbage collection."""


class Recipe(ABC):
    """What the user wants trained, made uniform; pickled by value and sent to every worker once per run."""

    name: str
    suffix: str
    """Of the checkpoint files that `export` writes, with the dot."""

    accumulate: int = 1

    batch_size: int | None = None
    """The trainable's own default, where it has one; it wins over the executor's."""

    @abstractmethod
    def create(self) -> Trainable:
        """Make the trainable of one trial, in the worker, not yet started."""

    @abstractmethod
    def export(self, state: dict[str, Any], path: Path) -> None:
        """Write `state` as a checkpoint that the host's own tools open."""

    def takes(self, key: str) -> bool:
        """Whether the model itself takes this key of the config (`batch_size` and `epochs` are ours only if not)."""
        return False

    def model_config(self, config: Config) -> dict[str, Any]:
        """The part of a trial's config that the model gets: all but the keys of ours that it does not take."""
        return {key: value for key, value in config.items() if key not in ("batch_size", "epochs") or self.takes(key)}

    def check_config(self, config: Config) -> None:  # noqa: B027  # a recipe that takes any config has nothing to check
        """Raise ConfigurationError for a config that the model would refuse, before anything is started."""


def as_recipe(trainable: Any) -> Recipe:
    """The recipe of whatever may be trained; NotTrainableError lists what that is."""
    from cerebro_tune.torch_trainable import TorchRecipe, TorchTrainable

    if isinstance(trainable, Recipe):
        return trainable
    if isinstance(trainable, type) and issubclass(trainable, TorchTrainable):
        return TorchRecipe(trainable)
    for entry in entry_points(group="cerebro_tune.trainables"):
        recipe: Recipe | None = entry.load()(trainable)
        if recipe is not None:
            return recipe
    hint = ""
    if isinstance(trainable, TorchTrainable):
        hint = f" Give the class, {type(trainable).__name__}, without calling it."
    elif callable(trainable):
        hint = (
            " A function that makes a LightningModule from a config is wrapped: "
            "from cerebro_tune_lightning import LightningTrainable; LightningTrainable(function)."
        )
    raise NotTrainableError(
        f"{trainable!r} cannot be trained. Valid are a TorchTrainable subclass, a LightningModule class and a "
        f'LightningTrainable (the last two need: pip install "cerebro-tune[lightning]").{hint}'
    )


def change_optimizers(optimizers: Sequence[Any], schedulers: Sequence[Any], old: Config, new: Config) -> set[str]:
    """Give optimizer group values that equalled `old[key]` the value `new[key]`; return the keys that took effect.

    A key of the same name as a group's value means that value; any other key is matched by value, among the group's
    values that no key of the config names. Where the learning rate is changed, the rate as scheduled now and the base
    rates of the schedulers scale by new / old, so that a schedule goes on in its shape.
    """
    applied: set[str] = set()
    for key in sorted({*old} & {*new}):
        if old[key] == new[key] or not _is_number(old[key]) or not _is_number(new[key]):
            continue
        for optimizer in optimizers:
            for index, group in enumerate(optimizer.param_groups):
                for name in [key] if key in group else [name for name in group if name not in old]:
                    if name == "lr":
                        changed = _change_rate(group, old[key], new[key])
                        if changed:
                            _change_base_rate(schedulers, optimizer, index)
                    else:
                        changed = name not in _RATES and _is_number(group[name]) and group[name] == old[key]
                        if changed:
                            group[name] = new[key]
                    if changed:
                        applied.add(key)
    return applied


_RATES = ("initial_lr", "max_lr", "min_lr")
"""What schedulers note in a group beside its learning rate."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _change_rate(group: dict[str, Any], before: float, after: float) -> bool:
    """Scale a group's rates if the rate it began with, or the highest a cyclic schedule may take, is `before`."""
    began = [group[name] for name in ("initial_lr", "max_lr") if name in group] or [group["lr"]]
    if before not in began:
        return False
    for name in ("lr", *_RATES):
        if name in group:
            group[name] = after if group[name] == before else group[name] * (after / before)
    return True


def _change_base_rate(schedulers: Sequence[Any], optimizer: Any, index: int) -> None:
    for scheduler in schedulers:
        if scheduler.optimizer is optimizer and hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs[index] = optimizer.param_groups[index]["initial_lr"]
