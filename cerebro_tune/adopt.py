"""Give a model or an optimizer the state that was read from a buffer, in place: no copy and no cast.

Everything that is adopted is adopted before anything is loaded in place: a tensor that a unit left behind views the
buffer it was in, and that buffer may belong to another trial by now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
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
            f"{sorted(targets.keys() - values.keys())}: was the model built from another config, or has training made "
            "what __init__ should make?"
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


def unlisted(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters and buffers that are not themselves in `saved`, a state dict: not persistent, copied, or taken out."""
    held = {_place(value) for value in saved.values() if isinstance(value, Tensor)}
    own = own_tensors(model).items()
    return {name: tensor for name, tensor in own if not tensor.numel() or _place(tensor) not in held}


def load_model(
    model: nn.Module,
    saved: Mapping[str, Any],
    others: Mapping[str, Tensor],
    hook: Callable[[], Mapping[str, Any]] | None = None,
    strict: bool = True,
) -> None:
    """Make parameters and buffers *be* those of `saved`, a state dict, and of `others`, what `unlisted` gave.

    Then what is left of `saved`, such as extra states and copies, is loaded by `load_state_dict`.

    Args:
        model: What the state is for.
        saved: The state dict as it was saved.
        others: What `saved` lacks.
        hook: Code of the user's that may write into the model; it runs when no tensor of the model is in the buffer of
            an earlier unit any more. It returns the state dict to load, and what it has put into that is loaded.
        strict: Whether a name that the model lacks is an error (StateError) or left out.
    """
    _part(model, saved)
    _make_buffers(model, {**saved, **others})
    mended = saved
    if hook is not None:
        _move_in(model, saved, others)
        mended = hook()
    targets, values = _matched(model, saved, others)
    missing = object()
    put = {name for name, value in mended.items() if value is not saved.get(name, missing)}
    targets = {name: target for name, target in targets.items() if name not in put or name in values}
    present = model.state_dict(keep_vars=True)
    unknown = {name: value for name, value in mended.items() if name not in present}
    adopt(targets, values | unknown if strict else values)
    rest = OrderedDict((name, value) for name, value in mended.items() if name in put or name not in values)
    if rest:
        if hasattr(present, "_metadata"):
            rest._metadata = present._metadata  # type: ignore[attr-defined]  # torch's own place for versions
        model.load_state_dict(rest, strict=False)


def _move_in(model: nn.Module, saved: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
    """Give the model's tensors the given values where these fit, in memory of their own: a hook may write there.

    What was saved is loaded after it. Memory on a device is the model's own already.
    """
    targets, values = _matched(model, saved, others)
    for name, target in targets.items():
        value = values.get(name)
        if value is not None and target.shape == value.shape:
            if target.is_cpu:
                target.data = value.to(target.device, target.dtype, copy=True)
            else:
                target.data.copy_(value)
        else:
            target.data = torch.zeros_like(target)  # a hook may give it another shape yet


def _matched(
    model: nn.Module, saved: Mapping[str, Any], others: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's own tensors, and what of the saved ones they are to become, by name."""
    own = own_tensors(model)
    ids = {id(tensor) for tensor in own.values()}
    listed = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) in ids}
    found = {name: value for name, value in saved.items() if name in listed and name not in others}
    covered = {id(listed[name]) for name in found}
    targets = {name: listed[name] for name in found}
    targets |= {name: tensor for name, tensor in own.items() if id(tensor) not in covered}
    return targets, found | dict(others)


def _part(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Make two buffers of what a fresh build registers under two names, where training has put another in one place."""
    places: dict[int, Any] = {}
    for prefix, part in model.named_modules():
        for leaf, buffer in part._buffers.items():
            value = saved.get(f"{prefix}.{leaf}" if prefix else leaf)
            if buffer is None or not isinstance(value, Tensor) or not value.numel():
                continue
            if places.setdefault(id(buffer), _place(value)) != _place(value):
                part._buffers[leaf] = torch.zeros_like(buffer)


def _make_buffers(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Give room to the buffers that a fresh build has none for, and training has given a value."""
    device = next((parameter.device for parameter in model.parameters()), None)
    for prefix, part in model.named_modules():
        for leaf, buffer in part._buffers.items():
            value = values.get(f"{prefix}.{leaf}" if prefix else leaf)
            if buffer is None and isinstance(value, Tensor):
                part._buffers[leaf] = torch.empty_like(value, device=device)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def gradients(model: nn.Module) -> dict[str, Any]:
    """The gradients that there are, by parameter; a sparse one as (indices, values, size)."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: (g._indices(), g._values(), [*g.shape]) if g.is_sparse else g for name, g in found.items()}


def load_gradients(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Make these the model's gradients, and its only ones."""
    for name, parameter in model.named_parameters():
        gradient = values.get(name)
        if isinstance(gradient, tuple):
            gradient = torch.sparse_coo_tensor(*gradient)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def refuse_outsiders(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigurationError for parameters that an optimizer trains beside those of the model."""
    inside = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if outside := [str(tuple(parameter.shape)) for parameter in trained if id(parameter) not in inside]:
        raise ConfigurationError(
            f"The optimizer of {kind} trains parameters of shapes {', '.join(outside)} that are not the model's, and "
            'so would not hop: make them part of it, as in nn.ModuleDict({"net": net, "loss": loss}), and return that '
            "as the model."
        )


def refuse_modules(kind: str, held: Mapping[str, nn.Module]) -> None:
    """Raise ConfigurationError for one of the modules that a trainable holds beside its model, by key path."""
    for path, part in held.items():
        if _has_state(part):
            name = path.rpartition(".")[2].partition("[")[0]
            raise ConfigurationError(
                f"{kind}.{path} is a {type(part).__name__} that is not part of the model, and so would not hop: "
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
    optimizer.state.clear()  # and not another dict: one that wraps this optimizer may hold it
    optimizer.state.update((owners.get(number, number), value) for number, value in saved["state"].items())
    for group, new in zip(groups, new_groups, strict=True):
        kept = {"params": group["params"]}
        if "param_names" in group and "param_names" not in new:
            kept["param_names"] = group["param_names"]
        group.clear()
        group.update(new | kept)


def saves_whole(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a state dict of torch's own making says what is in an optimizer's groups and state."""
    kind = type(optimizer)
    own = torch.optim.Optimizer
    return kind.load_state_dict is own.load_state_dict and kind.state_dict is own.state_dict


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
