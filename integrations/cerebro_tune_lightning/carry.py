"""A module's tensors and flags, out of it and into it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from cerebro_tune.torch_trainable import adopt


def load_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Make the module's parameters and buffers *be* the given tensors; anything else of the state dict is loaded."""
    listed = module.state_dict(keep_vars=True)
    own = {id(tensor) for tensor in chain(module.parameters(), module.buffers())}
    tensors = {name: value for name, value in listed.items() if id(value) in own}
    rest = {name for name in weights if name in listed and name not in tensors}
    adopt(tensors, {name: value for name, value in weights.items() if name not in rest})
    if rest:  # extra states, persistent torchmetrics, and the tensors of a module with a `state_dict` of its own
        module.load_state_dict({name: weights[name] for name in rest}, strict=False)


def unlisted(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that the module's `state_dict` leaves out, such as non-persistent buffers."""
    listed = {id(value) for value in module.state_dict(keep_vars=True).values()}
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: tensor for name, tensor in named if id(tensor) not in listed}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients that there are, by parameter."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def load_gradients(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Make these the module's gradients, and its only ones."""
    for name, parameter in module.named_parameters():
        parameter.grad = values[name].to(parameter.device) if name in values else None


def flags(module: nn.Module) -> dict[str, list[str]]:
    """Which parameters are frozen, and which modules are in evaluation mode."""
    return {
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "evaluating": [name for name, part in module.named_modules() if not part.training],
    }


def load_flags(module: nn.Module, state: Mapping[str, list[str]]) -> None:
    """Take up the flags that `flags` gave."""
    frozen, evaluating = set(state["frozen"]), set(state["evaluating"])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for name, part in module.named_modules():
        part.training = name not in evaluating
