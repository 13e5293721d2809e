"""The optimizers of a trial: whose parameters they hold, by name, and what they have learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cerebro_tune.adopt import adopt_optimizer, saves_whole
from cerebro_tune.errors import NotTrainableError

Names = list[list[list[str]]]
"""By optimizer and parameter group: the names of its parameters."""


def names_of(module: nn.Module, optimizers: Sequence[Any]) -> Names:
    """Which parameters are in which group; NotTrainableError for parameters that are not the module's."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    outside = [tuple(parameter.shape) for group in groups for parameter in group if id(parameter) not in names]
    if outside:
        raise NotTrainableError(
            f"An optimizer of {type(module).__name__} has parameters that are not in the module, of shape "
            f"{', '.join(map(str, outside))}; only the module's own hop: make them attributes of it "
            "(of an nn.ParameterList, an nn.ModuleList or the module itself)."
        )
    return [[[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]


def load(module: nn.Module, optimizers: Sequence[Any], names: Names, states: Sequence[dict[str, Any]]) -> None:
    """Give the optimizers the groups that training has made, and their states, in place.

    One that says itself how it is loaded, such as one that wraps another, hops as attributes do: others may hold its
    groups and state, and go on holding them.
    """
    parameters = dict(module.named_parameters())
    present = names_of(module, optimizers)
    for optimizer, mine, wanted, state in zip(optimizers, present, names, states, strict=True):
        if not saves_whole(optimizer):
            continue
        if mine != wanted:
            optimizer.param_groups[:] = [{"params": [parameters[name] for name in group]} for group in wanted]
        adopt_optimizer(optimizer, state)
