"""Model hopper parallelism as a plug-in executor for the tuners people already use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cerebro_tune.data import ShardedDataset as ShardedDataset
    from cerebro_tune.errors import CerebroError as CerebroError
    from cerebro_tune.executor import Cerebro as Cerebro
    from cerebro_tune.results import Results as Results
    from cerebro_tune.results import TrialResult as TrialResult
    from cerebro_tune.torch_trainable import TorchTrainable as TorchTrainable
    from cerebro_tune.trainable import Plan as Plan
    from cerebro_tune.units import Decision as Decision
    from cerebro_tune.verify import verify_hop as verify_hop
    from cerebro_tune.visiting import current_shard as current_shard
    from cerebro_tune.visits import VisitLoader as VisitLoader

_HOMES = {
    "Cerebro": "executor",
    "CerebroError": "errors",
    "Decision": "units",
    "Plan": "trainable",
    "Results": "results",
    "ShardedDataset": "data",
    "TorchTrainable": "torch_trainable",
    "TrialResult": "results",
    "VisitLoader": "visits",
    "current_shard": "visiting",
    "verify_hop": "verify",
}
__all__ = list(_HOMES)  # each is imported when it is first used: torch takes seconds


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
