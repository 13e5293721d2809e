"""What of the things that may be trained is Lightning's. Importing this module imports no Lightning."""

from __future__ import annotations

from typing import Any

from cerebro_tune.trainable import Recipe
from cerebro_tune_lightning.fitrecipe import InstanceRecipe
from cerebro_tune_lightning.trainable import LightningTrainable, namespace


def adapt(trainable: Any) -> Recipe | None:
    """The recipe of a LightningModule, class or instance; None for what is not Lightning's."""
    if isinstance(trainable, type):
        return LightningTrainable(trainable) if namespace(trainable) else None
    return InstanceRecipe(trainable) if namespace(type(trainable)) else None
