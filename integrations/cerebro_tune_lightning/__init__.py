"""Lightning by hops: `HopStrategy` for a Trainer, `LightningTrainable` for a search, and what goes with them.

The names are looked up when they are first used, because the core asks `adapt` about whatever it is given, with or
without Lightning installed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cerebro_tune.errors import MissingHostError

if TYPE_CHECKING:
    from cerebro_tune_lightning.checkpointio import HopCheckpointIO as HopCheckpointIO
    from cerebro_tune_lightning.reseed import ReseedCallback as ReseedCallback
    from cerebro_tune_lightning.strategy import HopStrategy as HopStrategy
    from cerebro_tune_lightning.trainable import LightningTrainable as LightningTrainable

_HOMES = {
    "HopCheckpointIO": "checkpointio",
    "HopStrategy": "strategy",
    "LightningTrainable": "trainable",
    "ReseedCallback": "reseed",
}

__all__ = ["HopCheckpointIO", "HopStrategy", "LightningTrainable", "ReseedCallback"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not find_spec("pytorch_lightning") and not find_spec("lightning"):
        raise MissingHostError('cerebro_tune_lightning needs PyTorch Lightning: pip install "cerebro-tune[lightning]"')
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
