"""What of the things that may be trained is Lightning's. Importing this module imports no Lightning."""

from __future__ import annotations

from typing import Any

from cerebro_tune.errors import NotTrainableError
from cerebro_tune.trainable import Recipe
from cerebro_tune_lightning.trainable import LightningTrainable, namespace


def adapt(trainable: Any) -> Recipe | None:
    """The recipe of a LightningModule class; None for what is not Lightning's."""
    if isinstance(trainable, type):
        return LightningTrainable(trainable) if namespace(trainable) else None
    if namespace(type(trainable)):
        name = type(trainable).__name__
        raise NotTrainableError(
            f"A {name} instance cannot be trained by hops, because every worker builds its own: "
            f"give the class {name}, or LightningTrainable(lambda config: {name}(...))."
        )
    return None
