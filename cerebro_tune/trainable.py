"""How one trial trains on one shard: the contract between a worker and what it trains.

A `Recipe` is what a user hands in, made uniform: it is pickled once per run and knows how to make trainables. A
`Trainable` is one trial in one worker; the worker keeps it between units and loads the trial's state into it whenever
the trial hops back. `as_recipe` finds the adapter for what the user gave through the entry point group
`cerebro_tune.trainables`, so the core knows no host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from cerebro_tune.errors import NotTrainableError
from cerebro_tune.sources import source_digest
from cerebro_tune.wholefile import digest_of_file, durable_folder, once_there_is_room, sync_file, sync_folder

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole horizon of one trial, known before its first step."""

    epochs: int
    batch_size: int
    shard_rows: tuple[int, ...]
    device: str = "cpu"
    accumulate: int = 1
    shard_batches: tuple[int, ...] | None = None
    """Batches that each shard gives; None for as many as the rows fill, the last of which may be smaller."""
    datamodule: Any = None
    """The user's DataModule in this worker, set up, where the data comes from one."""
    validates: bool = True
    """Whether there is a validation set."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches that one pass over every shard gives."""
        if self.shard_batches is not None:
            return sum(self.shard_batches)
        return sum(-(-rows // self.batch_size) for rows in self.shard_rows)

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

    @property
    def sizes(self) -> Sequence[int]:
        """Rows of each batch; final when the batches have been iterated."""

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

    @property
    def should_stop(self) -> bool:
        """Whether the trial has found, in the unit just run, that it should end: as if the tuner had said STOP."""
        return False

    def take_log(self) -> Any:
        """What the trial's logger is to hear of the unit just run, once; it travels by pickle to `Recipe.log`."""
        return None

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

    epochs: int | None = None
    """The trainable's own horizon, where it has one; it wins over the executor's."""

    loader: Mapping[str, Any] = {}
    """Settings of the trainable's own for loading; each wins over the executor's."""

    model: type | None = None
    """The user's class, where it is one that is trained."""

    datamodule: Any = None
    """The DataModule that comes with the trainable, for an executor that was made without data."""

    @property
    def identity(self) -> str:
        """What a run that is taken up is known again by, beside the name: the same in every process."""
        return "" if self.model is None else source_digest(self.model)

    @abstractmethod
    def create(self) -> Trainable:
        """Make the trainable of one trial, in the worker, not yet started."""

    @abstractmethod
    def export(self, state: dict[str, Any], path: Path) -> None:
        """Write `state` as a checkpoint that the host's own tools open."""

    def keep(self, state: dict[str, Any], path: Path, stand_still: Callable[[OSError], object], durable: bool) -> str:
        """Export it, with its folder; if `durable` so that it outlives a loss of power, and return the file's digest.

        On a full disk `stand_still` is called until there is room; it may raise to give up.
        """

        def write() -> str:
            if not durable:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.export(state, path)
                return ""
            durable_folder(path.parent)
            self.export(state, path)
            if path.exists():  # a host may have its own names for what it writes there
                sync_file(path)
            sync_folder(path.parent)
            return digest_of_file(path)

        return once_there_is_room(write, stand_still)

    def takes(self, key: str) -> bool:
        """Whether the model itself takes this key of the config (`batch_size` and `epochs` are ours only if not)."""
        return False

    def model_config(self, config: Config) -> dict[str, Any]:
        """The part of a trial's config that the model gets: all but the keys of ours that it does not take."""
        return {key: value for key, value in config.items() if key not in ("batch_size", "epochs") or self.takes(key)}

    def log(self, trial_id: str, config: Config, logged: Any) -> None:  # noqa: B027  # a recipe need not log
        """Log what `Trainable.take_log` gave, in this process, unit by unit as they are committed."""

    def end_log(self, trial_id: str, status: str) -> None:  # noqa: B027
        """The trial has ended, or the run has: close its log."""

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


FreshGroups = list[list[dict[str, Any]]]
"""By optimizer and parameter group: the group's values after a fresh build."""


def note_groups(optimizers: Sequence[Any], schedulers: Sequence[Any] = ()) -> FreshGroups:
    """What a fresh build put into its groups, for `change_optimizers`.

    Every group is made to hold its first rate as `initial_lr`, as schedulers do, since ReduceLROnPlateau does not.
    """
    noted: FreshGroups = []
    for optimizer in optimizers:
        noted.append([])
        for index, group in enumerate(optimizer.param_groups):
            if "lr" in group:
                rate = group["lr"]
                group.setdefault("initial_lr", rate.clone() if hasattr(rate, "clone") else rate)
            values = {name: _number(value) for name, value in group.items() if name != "params"}
            highest = [s.max_lrs[index] for s in _every(schedulers, optimizer) if hasattr(s, "max_lrs")]
            noted[-1].append(values | ({_HIGHEST: _number(highest[0])} if highest else {}))
    return noted


def change_optimizers(
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    old: Config,
    new: Config,
    fresh: FreshGroups | None = None,
) -> set[str]:
    """Give optimizer group values that came from `old[key]` the value `new[key]`; return the keys that took effect.

    `fresh`, by `note_groups`, is what a build under `new` gave: a value changes if it is `old[key]` now and `new[key]`
    there, and a rate also if it differs from the one there by the factor new / old. Without `fresh`, a key of the same
    name as a group's value means that value; any other key is matched by value, among those that no key names.
    Where the learning rate is changed, the rate as scheduled now and the base rates of the schedulers scale by
    new / old, so that a schedule goes on in its shape.
    """
    keys = sorted(key for key in {*old} & {*new} if old[key] != new[key])
    applied: set[str] = set()
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            built = None if fresh is None else fresh[number][index]
            own = _every(schedulers, optimizer)
            # Found for every key before any is applied: two keys may account for one value.
            found = [(key, names) for key in keys if (names := _fed_by(key, old, new, group, built, own, index))]
            before = dict(group)
            for key, names in found:
                for name in names - {"lr", _HIGHEST}:
                    group[name] = _exchanged(before[name], built[name] if built else new[key], old[key], new[key])
            applied.update(key for key, _ in found)
            for rate in ("lr", _HIGHEST):
                if feeding := [key for key, names in found if rate in names]:
                    _scale_rates(group, own, index, old[feeding[0]], new[feeding[0]], everything=rate == "lr")
                    break
    return applied


def names_of_groups(optimizers: Sequence[Any], fresh: FreshGroups) -> set[str]:
    """The group values that differ from a fresh build's: a changed key of such a name should have taken effect."""
    names = set()
    for optimizer, built in zip(optimizers, fresh, strict=True):
        for group, values in zip(optimizer.param_groups, built, strict=True):
            for name in values.keys() & group.keys():
                began = "initial_lr" if name == "lr" else name
                if _number(group[began]) != values[began]:
                    names.add(name)
    return names


_RATES = ("initial_lr", "max_lr", "min_lr")
"""What schedulers note in a group beside its learning rate."""
_BEGAN: tuple[str, ...] = _RATES[:2]
_HIGHEST = "max_lrs"
"""The attribute in which a cyclic schedule keeps its highest rates."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """A tensor of one element as a number; any other value as it is."""
    return float(value) if hasattr(value, "fill_") and value.numel() == 1 else value


def _every(schedulers: Sequence[Any], optimizer: Any) -> list[Any]:
    """The schedulers of an optimizer and, at any depth, those that they consist of."""
    found = []
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is optimizer:
            found += [scheduler, *_every(getattr(scheduler, "_schedulers", ()), optimizer)]
    return found


def _fed_by(
    key: str,
    old: Config,
    new: Config,
    group: dict[str, Any],
    built: dict[str, Any] | None,
    schedulers: Sequence[Any],
    index: int,
) -> set[str]:
    """The names of the group's values that came from this key."""
    before, after = old[key], new[key]
    plain = {name for name in group if name not in ("params", "lr", *_RATES)}
    rates = {name: _number(group[name]) for name in _BEGAN if name in group}
    if not rates and "lr" in group:
        rates = {"lr": _number(group["lr"])}
    highest = [_number(s.max_lrs[index]) for s in schedulers if hasattr(s, _HIGHEST)]
    if built is not None:
        fed = {name for name in plain if _exchanged(group[name], built[name], before, after) is not group[name]}
        if _is_number(before) and _is_number(after):
            if any(_follows(value, built[name], before, after) for name, value in rates.items()):
                fed.add("lr")
            if highest and _follows(highest[0], built[_HIGHEST], before, after):
                fed.add(_HIGHEST)
        return fed
    if not _is_number(before) or not _is_number(after):
        return set()
    candidates = {key} if key in group else {name for name in group if name not in old}
    fed = {name for name in candidates & plain if _is_number(group[name]) and group[name] == before}
    # A group without a note of its first rate may have had it reduced: there the name decides.
    if "lr" in candidates and (before in rates.values() or (key == "lr" and "lr" in rates)):
        fed.add("lr")
    if "lr" in candidates and before in highest:
        fed.add(_HIGHEST)
    return fed


def _exchanged(value: Any, built: Any, before: Any, after: Any) -> Any:
    """`after` where the value is `before` and should be `after`, also within a tuple; else the value itself."""
    if type(value) is type(built) is tuple and len(value) == len(built) and value != before:
        items = tuple(_exchanged(one, other, before, after) for one, other in zip(value, built, strict=True))
        return value if items == value else items
    alike = isinstance(value, bool) == isinstance(before, bool) and isinstance(built, bool) == isinstance(after, bool)
    return after if alike and value == before and _number(built) == after else value


def _follows(value: float, built: float, before: float, after: float) -> bool:
    """Whether a rate comes from a key: it is `before` and shall be `after`, or the same multiple of both."""
    if value == 0 or before == 0:
        return value == before and built == after
    return math.isclose(value * (after / before), built, rel_tol=1e-6)  # rates may be tensors of float32


def _scale_rates(
    group: dict[str, Any], schedulers: Sequence[Any], index: int, before: float, after: float, everything: bool
) -> None:
    """Scale what a group and its schedulers know of the rate; only the highest one of a cycle, if not everything."""
    for name in ("lr", *_RATES) if everything else ():
        if name in group:
            group[name] = _scaled(group[name], before, after)
    for scheduler in schedulers:
        for attribute in ("base_lrs", _HIGHEST) if everything else (_HIGHEST,):
            if rates := getattr(scheduler, attribute, None):
                rates[index] = _scaled(rates[index], before, after)


def _scaled(rate: Any, before: float, after: float) -> Any:
    if hasattr(rate, "fill_"):
        # In place: a compiled or captured step reads the rate from this very tensor.
        return rate.fill_(_scaled(float(rate), before, after))
    if rate == before:
        return after
    return rate * (after / before) if before else rate
