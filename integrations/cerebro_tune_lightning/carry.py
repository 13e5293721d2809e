"""A module's tensors and flags, out of it and into it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cerebro_tune.adopt import adopt


def take_up(module: nn.Module, weights: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
    """Move the module's tensors into the given ones, before any hook can write into them.

    A kept module's tensors lie in the buffer of its last unit, which may be another trial's by now. What does not fit
    gets memory of its own: a hook may give it another shape, and `load_weights` refuses what still does not fit then.
    """
    _untie(module, weights)
    targets, values = _matched(module, weights, others)
    for name, target in targets.items():
        value = values.get(name)
        if value is not None and _fits(target, value):
            adopt({name: target}, {name: value})
        else:
            target.data = torch.zeros_like(target)


def load_weights(
    module: nn.Module, weights: Mapping[str, Any], others: Mapping[str, Tensor], mended: Mapping[str, Any]
) -> None:
    """Make the module's parameters and buffers *be* the given tensors; anything else of the state dict is loaded.

    Args:
        module: What was given to `take_up` before.
        weights: The state dict as it was saved.
        others: The tensors that `unlisted` gave.
        mended: The state dict as `on_load_checkpoint` left it; what that has put into it is loaded.
    """
    targets, values = _matched(module, weights, others)
    missing = object()
    put = {name for name, value in mended.items() if value is not weights.get(name, missing)}
    adopt({name: target for name, target in targets.items() if name not in put or name in values}, values)
    listed = module.state_dict(keep_vars=True).keys() | put
    # Extra states, persistent torchmetrics, and what a module with a `state_dict` of its own keeps elsewhere.
    rest = {name: value for name, value in mended.items() if name in listed and (name in put or name not in values)}
    if rest:
        module.load_state_dict(rest, strict=False)


def unlisted(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters and buffers that are not in the saved state dict themselves, such as non-persistent buffers."""
    held = {_place(value) for value in saved.values() if isinstance(value, Tensor)}
    return {name: tensor for name, tensor in _named(module).items() if _place(tensor) not in held}


def _matched(
    module: nn.Module, weights: Mapping[str, Any], others: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The module's own tensors, and what of the saved ones they are to become, by name."""
    own = _named(module)
    ids = {id(tensor) for tensor in own.values()}
    listed = {name: value for name, value in module.state_dict(keep_vars=True).items() if id(value) in ids}
    found = {name: value for name, value in weights.items() if name in listed and name not in others}
    covered = {id(listed[name]) for name in found}
    targets = {name: listed[name] for name in found}
    targets |= {name: tensor for name, tensor in own.items() if id(tensor) not in covered}
    return targets, found | dict(others)


def _untie(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Make two buffers of what a fresh build registers under two names, where training has put another in one place."""
    places: dict[int, Any] = {}
    for prefix, part in module.named_modules():
        for leaf, buffer in part._buffers.items():
            value = weights.get(f"{prefix}.{leaf}" if prefix else leaf)
            if buffer is None or not isinstance(value, Tensor):
                continue
            if places.setdefault(id(buffer), _place(value)) != _place(value):
                part._buffers[leaf] = torch.zeros_like(buffer)


def _named(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _place(tensor: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _fits(target: Tensor, value: Tensor) -> bool:
    return target.shape == value.shape


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
