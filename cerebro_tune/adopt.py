"""Give an optimizer the state that was read from a buffer, in place: no copy and no cast."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch


def adopt_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Like `optimizer.load_state_dict(saved)`, but the optimizer takes the tensors and dicts of `saved` for its own.

    `load_state_dict` costs as much as the rest of a small hop, copies tensors in parameter groups, and casts state to
    the dtype of its parameter: a float32 moment of a bfloat16 parameter would come back rounded. It is called where
    something else depends on it: an optimizer that overrides it, hooks, parameters on a device, groups that differ.
    """
    groups, new_groups = optimizer.param_groups, saved["param_groups"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    if (
        sizes != [len(group["params"]) for group in new_groups]
        or not _loads_plainly(optimizer)
        or not all(parameter.is_cpu for parameter in parameters)
    ):
        optimizer.load_state_dict(saved)
        return
    numbers = [number for group in new_groups for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    state: defaultdict[Any, Any] = defaultdict(dict)
    state.update((owners.get(number, number), value) for number, value in saved["state"].items())
    optimizer.state = state
    for group, new in zip(groups, new_groups, strict=True):
        kept = {"params": group["params"]}
        if "param_names" in group and "param_names" not in new:
            kept["param_names"] = group["param_names"]
        group.clear()
        group.update(new | kept)


def _loads_plainly(optimizer: torch.optim.Optimizer) -> bool:
    kind = type(optimizer)
    return (
        kind.load_state_dict is torch.optim.Optimizer.load_state_dict
        # The stock ones only mend states of older versions of torch there.
        and kind.__setstate__.__module__.startswith("torch.optim.")
        and not optimizer._optimizer_load_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_post_hooks
    )
