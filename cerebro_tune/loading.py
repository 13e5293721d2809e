"""`loader={...}`: what users say about loading, in the words of torch's DataLoader, checked and resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cerebro_tune.data import BatchForm, ShardedDataset
from cerebro_tune.data.base import RowSet
from cerebro_tune.data.batching import Batching
from cerebro_tune.data.loader import LoaderOptions
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.settings import whole_number

_FORM = ("columns", "as_dict", "transform", "collate_fn")
OF_TRAINING = ("last_batch", "weights", "replacement", "batch_sampler")
"""Settings that a validation set has no use for."""
_OPTIONS = ("num_workers", "pin_memory", "prefetch_factor", "timeout", "worker_init_fn")
_VALID = (*_FORM, *OF_TRAINING, *_OPTIONS, "on_row_error")
_CALLED = {
    "transform": "(batch)",
    "collate_fn": "(samples)",
    "batch_sampler": "(rows, batch_size, drop_last)",
    "worker_init_fn": "(number)",
}


@dataclass(frozen=True, slots=True)
class Loading:
    """How a data set is loaded."""

    form: BatchForm
    batching: Batching
    options: LoaderOptions
    on_row_error: str = "raise"


def loading(loader: Mapping[str, Any], data: RowSet) -> Loading:
    """How `data` is loaded by these settings; ConfigurationError or DataError when it cannot be."""
    check_keys(loader)
    parts = [{key: loader[key] for key in keys if key in loader} for keys in (_FORM, OF_TRAINING, _OPTIONS)]
    form, batching = _form(parts[0], data), Batching(**parts[1]).resolved(data)
    batching.check(data)
    return Loading(form, batching, LoaderOptions(**parts[2]), loader.get("on_row_error", "raise"))


def check_keys(loader: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings; ConfigurationError for one that there is not, or that has a value which works nowhere."""
    if not isinstance(loader, Mapping):
        raise ConfigurationError(
            f"loader is a {type(loader).__name__}; it must be a dict with keys of: {', '.join(_VALID)}."
        )
    unknown = sorted(map(str, loader.keys() - set(_VALID)))
    if unknown:
        raise ConfigurationError(f"loader has {', '.join(unknown)}; valid: {', '.join(_VALID)}.")
    for key, valid in (("last_batch", ("spread", "keep", "drop")), ("on_row_error", ("raise", "skip"))):
        if loader.get(key, valid[0]) not in valid:
            raise ConfigurationError(f"loader's {key} is {loader[key]!r}; valid: {', '.join(map(repr, valid))}.")
    for key, called in _CALLED.items():
        if loader.get(key) is not None and not callable(loader[key]):
            raise ConfigurationError(
                f"loader's {key} is a {type(loader[key]).__name__}; it must be a function, called as {called}."
            )
    whole_number("loader's num_workers", loader.get("num_workers", 0), 0)
    if loader.get("prefetch_factor") is not None:
        whole_number("loader's prefetch_factor", loader["prefetch_factor"], 1)
    if loader.get("weights") is not None and loader.get("batch_sampler") is not None:
        raise ConfigurationError(
            "loader has weights and batch_sampler; a batch sampler chooses the rows itself: give one."
        )
    if isinstance(loader.get("columns"), str):
        raise ConfigurationError(f"loader's columns is {loader['columns']!r}; it must be a list of names.")
    return loader


def _form(given: dict[str, Any], data: RowSet) -> BatchForm:
    if isinstance(data, ShardedDataset):
        form = BatchForm(**given | {"columns": tuple(given.get("columns") or data.columns)})
        form.validate(data.schema)
        return form
    if tabular := [key for key in ("columns", "as_dict") if given.get(key)]:
        raise ConfigurationError(
            f"loader has {', '.join(tabular)}, which belongs to tables; what a sample is, the Dataset decides, "
            "and what a batch is, collate_fn."
        )
    return BatchForm(**{key: value for key, value in given.items() if key not in ("columns", "as_dict")})
