"""Give a model or an optimizer the state that was read from a buffer, in place: no copy and no cast.

Everything that is adopted is adopted before anything is loaded in place: a tensor that a unit left behind views the
buffer it was in, and that buffer may belong to another trial by now.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cerebro_tune.errors import ConfigurationError, StateError


def adopt(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Make each target tensor *be* the value of its name where device and dtype allow it; copy where they do not."""
    if targets.keys() != values.keys():
        raise StateError(
            f"The state has tensors {sorted(values.keys() - targets.keys())} that the model lacks, and lacks its "
            f"{sorted(targets.keys() - values.keys())}: was the model built from another config?"
        )
    for name, target in targets.items():
        value = values[name]
        if target.shape != value.shape:
            raise StateError(
                f"{name} has shape {tuple(value.shape)} in the state and {tuple(target.shape)} in the model: "
                "was the model built from another config?"
            )
        if target.device == value.device and target.dtype == value.dtype:
            target.data = value
        elif target.is_cpu:
            target.data = value.to(target.device, target.dtype)  # its memory may be another trial's by now
        else:
            target.data.copy_(value)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, under every name it has."""
    return dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))


def unlisted(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that `state_dict` leaves out or copies, such as non-persistent buffers."""
    listed = {id(value) for value in model.state_dict(keep_vars=True).values()}
    return {name: tensor for name, tensor in own_tensors(model).items() if id(tensor) not in listed}


def load_model(model: nn.Module, listed: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
    """Make parameters and buffers *be* those of `listed`, a `state_dict`, and of `others`, what `unlisted` gave.

    Then what is left of `listed`, such as extra states and copies, is loaded by `load_state_dict`.
    """
    present = model.state_dict(keep_vars=True)
    own = own_tensors(model)
    known = {id(tensor) for tensor in own.values()}
    missing = {name: tensor for name, tensor in own.items() if name in others}
    rest: OrderedDict[str, Any] = OrderedDict()
    targets, values = dict(missing), dict(others)
    for name, value in listed.items():
        if name in present and id(present[name]) not in known:
            rest[name] = value
        else:
            values[name] = value
    targets |= {name: tensor for name, tensor in present.items() if id(tensor) in known}
    _part(model, own, targets, values)
    adopt(targets, values)
    if rest:
        if hasattr(present, "_metadata"):
            rest._metadata = present._metadata  # type: ignore[attr-defined]  # torch's own place for versions
        model.load_state_dict(rest, strict=False)


def _part(
    model: nn.Module, own: Mapping[str, Tensor], targets: dict[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Give a tensor of its own to each buffer that is one with another in the model, but not in the state."""
    first: dict[int, str] = {}
    for name, target in list(targets.items()):
        other = first.setdefault(id(target), name)
        if other == name or name not in values or other not in values or isinstance(target, nn.Parameter):
            continue
        one, two = values[name], values[other]
        if own.get(name) is target and one.numel() and (one.data_ptr(), one.stride()) != (two.data_ptr(), two.stride()):
            path, _, attribute = name.rpartition(".")
            targets[name] = target.detach().clone()
            setattr(model.get_submodule(path), attribute, targets[name])


def refuse_outsiders(owner: object, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigurationError for what `owner` trains or keeps beside its model, which would not hop."""
    kind = type(owner).__name__
    inside = {id(part) for part in chain(model.modules(), model.parameters())}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if outside := [str(tuple(parameter.shape)) for parameter in trained if id(parameter) not in inside]:
        raise ConfigurationError(
            f"The optimizer of {kind} trains parameters of shapes {', '.join(outside)} that are not the model's, and "
            'so would not hop: make them part of it, as in nn.ModuleDict({"net": net, "loss": loss}), and return that '
            "as the model."
        )
    for name, value in vars(owner).items():
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        for part in items:
            if isinstance(part, nn.Module) and id(part) not in inside and _has_state(part):
                raise ConfigurationError(
                    f"{kind}.{name} is a {type(part).__name__} that is not part of the model, and so would not hop: "
                    f'make it part of it, as in nn.ModuleDict({{"net": net, "{name}": {name}}}), and return that as '
                    "the model."
                )


def _has_state(part: nn.Module) -> bool:
    """Whether a module has tensors; those that torch's losses have are weights of the classes, which are constant."""
    own = chain(part.parameters(), part.buffers())
    return not isinstance(part, nn.modules.loss._Loss) and next(own, None) is not None


def adopt_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Like `optimizer.load_state_dict(saved)`, but the optimizer takes the tensors and dicts of `saved` for its own.

    `load_state_dict` costs as much as the rest of a small hop, copies tensors in parameter groups, and casts state to
    the dtype of its parameter: a float32 moment of a bfloat16 parameter would come back rounded. It is called where
    something else depends on it: an optimizer that overrides it, hooks, parameters on a device, groups that differ.
    What it cast is put back as it was.
    """
    groups, new_groups = optimizer.param_groups, saved["param_groups"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    numbers = [number for group in new_groups for number in group["params"]]
    if (
        sizes != [len(group["params"]) for group in new_groups]
        or not _loads_plainly(optimizer)
        or not all(parameter.is_cpu for parameter in parameters)
    ):
        optimizer.load_state_dict(saved)
        if len(numbers) == len(parameters) and _saves_plainly(optimizer):
            for number, parameter in zip(numbers, parameters, strict=True):
                if number in saved["state"] and parameter in optimizer.state:
                    optimizer.state[parameter] = _uncast(optimizer.state[parameter], saved["state"][number])
        return
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


def _saves_plainly(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a saved tensor has the dtype that it had in the optimizer; one with a format of its own casts itself."""
    return (
        type(optimizer).state_dict is torch.optim.Optimizer.state_dict
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_state_dict_post_hooks
    )


def _uncast(loaded: Any, saved: Any) -> Any:
    """What was loaded, with the saved dtypes."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype or loaded.shape != saved.shape else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        for key in loaded.keys() & saved.keys():
            loaded[key] = _uncast(loaded[key], saved[key])
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        loaded[:] = map(_uncast, loaded, saved)
    return loaded
