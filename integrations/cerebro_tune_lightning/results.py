"""Metrics in the making: what was logged in an epoch that is not over, and the states of torchmetrics.

The first half is private to Lightning, tested with 2.6.0 to 2.6.6. None of this is in a Lightning checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)
_REDUCTIONS = {"mean": torch.mean, "sum": torch.sum, "min": torch.min, "max": torch.max}
_BUILTIN_REDUCTIONS = {"sum": sum, "min": min, "max": max}


def pack(values: Mapping[str, Any]) -> dict[str, Any]:
    """Scalar tensors as [dtype, number], so that they take no place among the tensors of a state."""
    return {
        name: [str(value.dtype).removeprefix("torch."), value.tolist()] if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def unpack(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `pack` was given."""
    return {
        name: torch.tensor(packed[1], dtype=getattr(torch, packed[0]), device=device)
        if isinstance(packed, list)
        else packed
        for name, packed in values.items()
    }


def dump(collection: Any) -> list[dict[str, Any]]:
    """The metrics of a result collection that hold something."""
    return [_dump_metric(key, metric) for key, metric in collection.items() if not metric.has_reset]


def restore(collection: Any, dumped: list[dict[str, Any]], private: Any, trainer: Any) -> None:
    """Make a result collection hold what was dumped; `private` is the module that defines it.

    To make a metric takes a third of a millisecond: those that the unit before left behind are taken where they fit.
    """
    left = dict(collection)
    collection.clear()
    for entry in dumped:
        metric, is_tensor = left.get(entry["key"]), entry["values"] is not None
        if (
            metric is None
            or metric.is_tensor is not is_tensor
            or any(entry[name] != value for name, value in _kind(metric).items())
        ):
            meta = private._Metadata(**entry["meta"], reduce_fx=_reduction(*entry["reduce"]))
            meta.sync = private._Sync(fn=trainer.strategy.reduce, rank_zero_only=entry["rank_zero_only"])
            metric = private._ResultMetric(meta, is_tensor)
        if is_tensor:
            for name, value in unpack(entry["values"], trainer.strategy.root_device).items():
                setattr(metric, name, value)
        else:
            metric.value = trainer.lightning_module.get_submodule(metric.meta.metric_attribute)
        metric._update_count = entry["updates"]
        metric.has_reset, metric._computed, metric._forward_cache = False, None, None
        collection[entry["key"]] = metric


def _dump_metric(key: str, metric: Any) -> dict[str, Any]:
    values = pack({name: getattr(metric, name) for name in metric._defaults}) if metric.is_tensor else None
    return {"key": key, **_kind(metric), "values": values, "updates": metric._update_count}


def _kind(metric: Any) -> dict[str, Any]:
    """What the user has told of a metric when it was first logged."""
    meta = metric.meta
    reduce_fx = meta.reduce_fx
    return {
        "meta": {name: getattr(meta, name) for name in _META},
        "reduce": [reduce_fx.__name__, reduce_fx is _BUILTIN_REDUCTIONS.get(reduce_fx.__name__)],
        "rank_zero_only": meta.sync.rank_zero_only,
    }


def _reduction(name: str, builtin: bool) -> Any:
    return _BUILTIN_REDUCTIONS[name] if builtin else _REDUCTIONS[name]


def dump_metrics(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The states of all torchmetrics of a module that were updated since their last reset."""
    for part in module.modules():
        if isinstance(part, MetricCollection):
            part.values(copy_state=False)  # members of a compute group catch up with the one that is updated
    return {
        name: {"updates": metric._update_count, "states": {state: getattr(metric, state) for state in metric._defaults}}
        for name, metric in _metrics(module)
        if metric._update_count
    }


def restore_metrics(module: nn.Module, dumped: dict[str, dict[str, Any]]) -> None:
    """Take up the states that `dump_metrics` gave; metrics that it left out are reset.

    No two get the same memory: a collection that does not know yet which of its members may share theirs updates each.
    """
    taken: set[int] = set()

    def own(part: Tensor, device: torch.device) -> Tensor:
        part = part.to(device, copy=part.data_ptr() in taken)
        taken.add(part.data_ptr())
        return part

    metrics = list(_metrics(module))
    for _, metric in metrics:
        metric.reset()  # of all of them first, since one that is made of others resets these
    for name, metric in metrics:
        if entry := dumped.get(name):
            for state, value in entry["states"].items():
                several = isinstance(value, list)
                held = [own(part, metric.device) for part in value] if several else own(value, metric.device)
                setattr(metric, state, held)
            metric._update_count = entry["updates"]


def is_metric(part: nn.Module) -> bool:
    """Whether a part of a module is of torchmetrics, which keeps its state in attributes."""
    return isinstance(part, Metric | MetricCollection)


def has_metrics(part: nn.Module) -> bool:
    """Whether a module is of torchmetrics or has such parts."""
    return any(is_metric(inner) for inner in part.modules())


def _metrics(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Metric))
