"""What a module and its callbacks hold beside weights: flags, and modules that are no part of the one that trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cerebro_tune.adopt import load_model, own_tensors
from cerebro_tune.attributes import Attributes
from cerebro_tune.errors import StateError
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
    """Modules that are held beside the one that trains, by it, its optimizers or callbacks: averages, teachers.

    No state dict lists them, and no optimizer trains them, but what training writes into them must hop.
    """

    def __init__(self, module: nn.Module, attributes: Attributes) -> None:
        self._module, self._attributes = module, attributes

    def _among(self, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Those of the modules found that have something to carry, by key path."""
        inside = {id(part) for part in self._module.modules()} if found else set()
        return {
            path: part
            for path, part in found.items()
            if id(part) not in inside and (results.has_metrics(part) or own_tensors(part))
        }

    def dump(self) -> dict[str, dict[str, Any]]:
        """Their tensors, flags and metrics, as the attributes were dumped."""
        return {
            path: {"tensors": own_tensors(part), "flags": flags(part), "metrics": results.dump_metrics(part)}
            for path, part in self._among(self._attributes.held).items()
        }

    def move_out(self) -> None:
        """Give them memory of their own, with no state that matters: what writes there now is nothing to `load`."""
        for held in self._among(self._attributes.modules()).values():
            for tensor in own_tensors(held).values():
                tensor.data = tensor.data.clone()
            results.restore_metrics(held, {})

    def load(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Take up what `dump` gave."""
        if not state:
            return  # to find what is held takes a walk over all attributes
        held = self._among(self._attributes.modules())
        if lacking := sorted(state.keys() - held.keys()):
            raise StateError(f"The state has {', '.join(lacking)}, which a fresh build has not.")
        for path, saved in state.items():
            load_model(held[path], {}, saved["tensors"])
            load_flags(held[path], saved["flags"])
            results.restore_metrics(held[path], saved["metrics"])
