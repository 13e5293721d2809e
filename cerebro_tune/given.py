"""What users have already, a Dataset, a DataLoader or a DataModule, read as a set of rows and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.data.base import RowSet
from cerebro_tune.data.datamodule import ModuleCollate, ModuleRows, SharedModule
from cerebro_tune.data.fingerprint import digest_of
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.feed import RunData
from cerebro_tune.loading import OF_TRAINING, check_keys, loading

_COPIED = ("num_workers", "pin_memory", "prefetch_factor", "timeout", "worker_init_fn")


@dataclass(frozen=True)
class Given:
    """A set of rows, and what its loader says of loading: keys of `loader={...}`, and a batch size."""

    data: RowSet
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None


@dataclass
class GivenData:
    """The data of an executor: what the user gave, and what the user said about loading it."""

    train: Given
    validation: Given | None
    module: SharedModule | None
    loader: Mapping[str, Any]

    @property
    def batch_size(self) -> int:
        """Rows per batch of the given loader, or the default."""
        return self.train.batch_size or 32

    def for_run(self, own: Mapping[str, Any]) -> RunData:
        """What workers read; `own` are the settings for loading of what is trained, which win."""
        check_keys(own)
        train, validation, chosen = self.train, self.validation, {**self.loader, **own}
        how = loading({**train.settings, **chosen}, train.data)
        if validation is None:
            return RunData(train.data, how, module=self.module)
        # A set without a loader of its own is loaded as the training set is.
        settings = {**(validation.settings if validation.batch_size else train.settings), **chosen}
        measured = {key: value for key, value in settings.items() if key not in OF_TRAINING}
        _check_alike(train.data, validation.data, how.form)
        how_measured = loading(measured, validation.data)
        return RunData(train.data, how, validation.data, how_measured, validation.batch_size, self.module)

    @property
    def fingerprint(self) -> tuple[str, str | None]:
        """Identity of the training set, and of the validation set."""
        return self.train.data.fingerprint, None if self.validation is None else self.validation.data.fingerprint

    @property
    def making(self) -> dict[str, str]:
        """What makes batches of the rows, beside their number: the DataModule's class, and settings of the loader."""
        of_loader = {key: _named(value) for key, value in self.train.settings.items() if key not in _COPIED}
        return of_loader if self.module is None else {"datamodule": type(self.module.module).__name__, **of_loader}

    def check_same(self, other: GivenData) -> None:
        """Raise ConfigurationError for data that an executor with this one cannot take."""
        if self.fingerprint != other.fingerprint:
            raise ConfigurationError(
                f"This executor's data is {self.train.data!r}, and now it is given other data, {other.train.data!r}: "
                "shards stay with their workers. Make another executor for it."
            )
        before, now = self.making, other.making
        if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise ConfigurationError(
                f"This executor has its data, and is now given the same rows with another {', '.join(changed)}: "
                "other batches would be made of them. Make another executor for it."
            )

    def is_of(self, datamodule: Any) -> bool:
        """Whether this is the data of such a DataModule, as far as can be told without setting it up."""
        return datamodule is not None and self.module is not None and self.module.is_like(datamodule)

    def close(self) -> None:
        """Let go of what the DataModule holds in this process."""
        if self.module is not None:
            self.module.close()


def take(
    train: Any,
    validation: Any,
    datamodule: Any,
    num_shards: int | None,
    workers: int,
    seed: int,
    loader: Mapping[str, Any],
) -> GivenData:
    """The data that a user gave in one of its forms; ConfigurationError or DataError when it cannot be trained on."""
    if datamodule is not None:
        if train is not None or validation is not None:
            raise ConfigurationError("train or validation is given beside datamodule, which has both: leave them out.")
        shared = SharedModule.prepare(datamodule, seed)
        found = GivenData(*module_sets(shared, num_shards, workers), shared, loader)
    else:
        measured = None if validation is None else validation_set(validation, seed)
        found = GivenData(training_set(train, num_shards, seed, workers), measured, None, loader)
    found.for_run({})  # what is wrong is better said now
    return found


def training_set(given: Any, num_shards: int | None, seed: int, workers: int) -> Given:
    """The training set that a user gave; unless `num_shards` says otherwise, of 8 shards, or one for each worker."""
    if _is_loader(given):
        return _from_loader("train", given, given.dataset, _shards(given.dataset, num_shards, workers), seed)
    return Given(_rows("train", given, _shards(given, num_shards, workers), seed))


def validation_set(given: Any, seed: int) -> Given:
    """The validation set that a user gave; it has one shard, since it is read in order."""
    if _is_loader(given):
        return _from_loader("validation", given, given.dataset, 1, seed)
    return Given(_rows("validation", given, 1, seed))


def module_sets(shared: SharedModule, num_shards: int | None, workers: int) -> tuple[Given, Given | None]:
    """The training set and the validation set, if there is one, of a DataModule."""
    found: list[Given | None] = []
    for role, name in (("train", "train"), ("val", "validation")):
        loader = shared.loader(role)
        where = f"{type(shared.module).__name__}.{role}_dataloader()"
        if loader is None:
            if role == "train":
                raise ConfigurationError(f"{where} gives no loader, and there is nothing to train on.")
            found.append(None)
            continue
        if not _is_loader(loader):
            raise ConfigurationError(f"{where} returned a {type(loader).__name__}; it must be a torch DataLoader.")
        shards = _shards(loader.dataset, num_shards, workers) if role == "train" else 1
        given = _from_loader(name, loader, ModuleRows(shared, role), shards, shared.seed)
        if "collate_fn" in given.settings:
            given.settings["collate_fn"] = ModuleCollate(shared, role)
        found.append(given)
    train, validation = found
    assert train is not None, "refused above"
    return train, validation


def _named(value: Any) -> str:
    """What tells one setting from another: a function's name, the content of anything else."""
    return str(getattr(value, "__qualname__", None) or digest_of(value))


def _check_alike(train: RowSet, validation: RowSet, form: BatchForm) -> None:
    """Of two tables, that for validation must have the columns of a batch, in the types of the training set."""
    if not isinstance(train, ShardedDataset) or not isinstance(validation, ShardedDataset):
        return
    for name in form.names(train.columns):
        wanted = train.schema.field(name).type
        found = validation.schema.field(name).type if name in validation.schema.names else None
        if found != wanted:
            has = "does not have it" if found is None else f"has it as {found}"
            raise ConfigurationError(
                f"A batch has the column {name!r}, in the training set of type {wanted}, but the validation set {has}. "
                "Write both from tables of one schema, or choose columns that both have: loader={'columns': [...]}."
            )
    form.validate(validation.schema)


def _rows(name: str, given: Any, num_shards: int, seed: int) -> RowSet:
    if isinstance(given, RowSet):
        return given
    if isinstance(given, str | os.PathLike):
        return ShardedDataset.open(given)
    if hasattr(type(given), "__getitem__") or hasattr(type(given), "__iter__"):
        return ShardedDataset.index(given, num_shards, seed)
    raise ConfigurationError(
        f"{name} is a {type(given).__name__}; valid: the path of a set that ShardedDataset.write has written, "
        "ShardedDataset.index(make_dataset, num_shards=8), a map-style Dataset, or a DataLoader of one."
    )


def _is_loader(given: Any) -> bool:
    if isinstance(given, str | os.PathLike | RowSet):
        return False  # without importing torch
    from torch.utils.data import DataLoader

    return isinstance(given, DataLoader)


def _from_loader(name: str, loader: Any, make_dataset: Any, num_shards: int, seed: int) -> Given:
    """What a DataLoader reads and how; its order of rows becomes ours, or is refused."""
    from torch.utils.data import default_collate

    _refuse_ways_of_its_own(name, loader)
    _refuse_unbatched(name, loader)
    settings = {key: getattr(loader, key) for key in _COPIED if getattr(loader, key)}
    if not settings.get("num_workers"):
        settings.pop("prefetch_factor", None)
    if loader.collate_fn is not default_collate:
        settings["collate_fn"] = loader.collate_fn
    if loader.batch_sampler.drop_last and name == "train":
        settings["last_batch"] = "drop"
    data = ShardedDataset.index(make_dataset, num_shards, seed)
    return Given(
        data, settings | _order(name, loader.batch_sampler.sampler, data.num_rows), loader.batch_sampler.batch_size
    )


def _refuse_ways_of_its_own(name: str, loader: Any) -> None:
    """Raise for what a loader does beside its settings, which would silently be left out."""
    from torch.utils.data import DataLoader

    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigurationError(
            f"The {name} loader is a {type(loader).__name__} with an __iter__ of its own, which is not called: batches "
            "are read by shards. Put what it does to them into the Dataset, a collate_fn, or "
            'loader={"transform": f}, called with each batch; or, if it only reads ahead, give a torch DataLoader.'
        )
    context = loader.multiprocessing_context
    method = None if context is None else context.get_start_method()
    if method not in (None, "fork"):
        raise ConfigurationError(
            f"The {name} loader has multiprocessing_context={method!r}; loader processes are forked from the worker. "
            "Leave multiprocessing_context out, let the Dataset and collate_fn stay on the CPU, and open files, locks "
            "and connections when the first row is read."
        )


def _refuse_unbatched(name: str, loader: Any) -> None:
    from torch.utils.data import BatchSampler

    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        raise ConfigurationError(
            f"The {name} loader has a batch sampler of its own, {type(loader.batch_sampler).__name__}, which deals out "
            "the rows of the whole set; a unit has those of one shard. Give what makes one as "
            'loader={"batch_sampler": f}, called f(rows, batch_size, drop_last) as torch\'s BatchSampler is.'
        )
    if loader.batch_sampler is None:
        raise ConfigurationError(
            f"The {name} loader has batch_size=None: its Dataset gives whole batches. Let it give rows, and the loader "
            "put batches together, so that they can be shuffled."
        )


def _order(name: str, sampler: Any, rows: int) -> dict[str, Any]:
    """How a loader's sampler goes on in the shards."""
    from torch.utils.data import RandomSampler, SequentialSampler, WeightedRandomSampler

    kind = type(sampler)
    if kind is SequentialSampler and name == "validation":
        return {}
    whole = getattr(sampler, "num_samples", rows) == rows
    if kind is RandomSampler and whole and not sampler.replacement:
        return {}
    if kind is RandomSampler and whole and name == "train":
        return {"weights": [1.0] * rows}
    if kind is WeightedRandomSampler and whole and name == "train":
        return {"weights": sampler.weights, "replacement": sampler.replacement}
    if name == "validation":
        hint = "the whole set is measured, in order: leave the sampler out, or give a torch.utils.data.Subset"
    elif kind in (RandomSampler, WeightedRandomSampler):
        hint = f"it draws {sampler.num_samples} of {rows} rows an epoch: leave num_samples as many as there are rows"
    elif kind is SequentialSampler:
        hint = "rows are visited in a random order, another one in every epoch: say so with shuffle=True"
    else:
        hint = (
            "each unit draws its order from a seed: give shuffle=True, a WeightedRandomSampler, or, where it selects "
            "rows, a torch.utils.data.Subset of the Dataset"
        )
    raise ConfigurationError(f"The {name} loader has a {kind.__name__}, which cannot be kept by hops: {hint}.")


def _shards(dataset: Any, num_shards: int | None, workers: int) -> int:
    if num_shards is not None:
        return num_shards
    try:
        return max(1, min(max(8, workers), len(dataset)))  # of one without rows `index` will say so
    except (TypeError, NotImplementedError):
        return 1  # likewise
