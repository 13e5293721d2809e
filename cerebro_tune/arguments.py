"""What users pass to `Cerebro` and to `fit`, checked and resolved."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.settings import whole_number
from cerebro_tune.trainable import Config

_LOADER_KEYS = ("columns", "as_dict", "transform", "collate_fn", "last_batch")


def dataset(name: str, given: Any) -> ShardedDataset:
    """The data set that a user gave, or gave the path of."""
    if isinstance(given, ShardedDataset):
        return given
    if isinstance(given, str | os.PathLike):
        return ShardedDataset.open(given)
    raise ConfigurationError(
        f"{name} is a {type(given).__name__}; valid: a ShardedDataset, or the path of one. "
        "Write one with ShardedDataset.write(source, path, num_shards=8)."
    )


def batch_form(loader: Mapping[str, Any], train: ShardedDataset) -> tuple[BatchForm, str]:
    """The form of batches, and what becomes of the last one."""
    unknown = sorted(loader.keys() - set(_LOADER_KEYS))
    if unknown:
        raise ConfigurationError(f"loader has {', '.join(unknown)}; valid: {', '.join(_LOADER_KEYS)}.")
    options = dict(loader)
    last_batch = one_of(last_batch=options.pop("last_batch", "spread"), valid=("spread", "keep", "drop"))
    if isinstance(options.get("columns"), str):
        raise ConfigurationError(f"loader's columns is {options['columns']!r}; it must be a list of names.")
    options["columns"] = tuple(options.get("columns") or train.columns)
    return BatchForm(**options), last_batch


def check_alike(train: ShardedDataset, validation: ShardedDataset, form: BatchForm) -> None:
    """The validation set must have the columns of a batch, in the types of the training set."""
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


def listed(configs: Iterable[Config]) -> list[Config]:
    """The configs, each of which must be a mapping."""
    given = [configs] if isinstance(configs, Mapping) else list(configs)
    for config in given:
        if not isinstance(config, Mapping) or isinstance(configs, Mapping):
            raise ConfigurationError(
                f"configs has {config!r}; it must be a list of dicts, one for each trial, such as [{{'lr': 0.1}}]."
            )
    return given


def edited_since(moment_s: float) -> bool:
    """Whether the source of a module of the user's has changed since: workers would go on with the old one."""
    ours = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parent)})
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    users = [file for file in files if not file.startswith(ours) and os.path.exists(file)]
    return any(os.path.getmtime(file) > moment_s for file in users)


def devices_of(workers: int | None, devices: str | Sequence[str], per_device: int) -> tuple[str, ...]:
    """The device of each worker."""
    if isinstance(devices, str):
        kinds = [devices]
        if devices in ("auto", "cuda"):
            import torch

            kinds = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
            if not kinds and devices == "cuda":
                raise ConfigurationError('devices is "cuda", but torch sees no CUDA device; use "auto" or "cpu".')
    else:
        kinds = list(devices)
    for kind in kinds:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", kind):
            raise ConfigurationError(f'devices has {kind!r}; valid: "auto", "cpu", "mps", "cuda", "cuda:0", ...')
    if not kinds or kinds == ["cpu"]:
        return ("cpu",) * (len(cores()) if workers is None else at_least(1, workers=workers))
    seats = kinds * per_device
    if workers is None:
        return tuple(seats)
    return tuple(seats[number % len(seats)] for number in range(at_least(1, workers=workers)))


def cores() -> list[int]:
    """The cores this process may use; hyperthreads beyond the physical cores do not count."""
    allowed = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    usable = allowed or list(range(os.cpu_count() or 1))
    return usable[: psutil.cpu_count(logical=False) or len(usable)]


def new_folder(base: Path | None, name: str) -> Path:
    """A new folder for a run: under `base` numbered, otherwise `runs/<time>-<name>`."""
    stem = "run" if base is None else None
    parent = Path("runs") if base is None else base
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}" if stem else "run"
    number = 0
    while True:
        folder = parent / (stamp if stem and not number else f"{stamp}-{number:04d}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder.absolute()


def at_least(least: int, **named: Any) -> int:
    """The one value given by name, as a whole number of at least `least`."""
    ((name, value),) = named.items()
    return whole_number(name, value, least)


def one_of(valid: Sequence[str], **named: Any) -> str:
    """The one value given by name, which must be among the valid ones."""
    ((name, value),) = named.items()
    if value not in valid:
        raise ConfigurationError(f"{name} is {value!r}; valid: {', '.join(map(repr, valid))}.")
    return str(value)
