"""What a module and its callbacks hold beside weights: flags, and modules that are no part of the one that trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from cerebro_tune.adopt import load_model, own_tensors
from cerebro_tune.attributes import OF_TORCH, of_torch
from cerebro_tune.errors import StateError, UnsupportedLeafError
from cerebro_tune_lightning import results


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


class Asides:
    """Modules held in attributes by callbacks, or by the module in a list or dict of Python's: averages, teachers.

    No state dict lists them, and no optimizer trains them, but what training writes into them must hop.
    """

    def __init__(self, module: nn.Module, owners: Iterable[tuple[str, Any]]) -> None:
        self._module = module
        self._owners = [(name, owner) for name, owner in owners if not of_torch(owner)]
        self._built: set[str] = set()

    def settle(self) -> None:
        """What is held by now is made in every worker."""
        self._built = {name for name, _ in self.held()}

    def held(self) -> Iterator[tuple[str, nn.Module]]:
        """Each by its key path."""
        seen = {id(part) for part in self._module.modules()}
        for path, owner in self._owners:
            private = OF_TORCH if isinstance(owner, nn.Module) else ()
            for name, value in list(vars(owner).items()):
                for key, part in () if name in private else _parts(value):
                    if id(part) not in seen and (results.has_metrics(part) or own_tensors(part)):
                        seen.update(map(id, part.modules()))
                        yield f"{path}.{name}{key}", part

    def dump(self) -> dict[str, dict[str, Any]]:
        """Their tensors, flags and metrics; UnsupportedLeafError for one that only this worker has made."""
        state = {}
        for name, part in self.held():
            if name not in self._built:
                raise UnsupportedLeafError(
                    f"{name}, a {type(part).__name__}, was made while training, so that other workers have none to "
                    "take up its state: make it in __init__, setup or on_train_start."
                )
            state[name] = {
                "tensors": own_tensors(part), "flags": flags(part), "metrics": results.dump_metrics(part)
            }  # fmt: skip
        return state

    def load(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Take up what `dump` gave."""
        held = dict(self.held())
        if lacking := sorted(state.keys() - held.keys()):
            raise StateError(f"The state has {', '.join(lacking)}, which a fresh build has not.")
        for name, saved in state.items():
            load_model(held[name], {}, saved["tensors"])
            load_flags(held[name], saved["flags"])
            results.restore_metrics(held[name], saved["metrics"])


def _parts(value: Any) -> list[tuple[str, nn.Module]]:
    """A module, or those in a container of them."""
    if isinstance(value, nn.Module):
        return [("", value)]
    if type(value) in (list, tuple):
        return [(f"[{index}]", item) for index, item in enumerate(value) if isinstance(item, nn.Module)]
    if type(value) is dict:
        return [(f"[{key!r}]", item) for key, item in value.items() if isinstance(item, nn.Module)]
    return []
