"""Silence for the Trainers that are ours, while they are set up."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
_NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # torch to Lightning's CombinedLoader
    "The number of training batches .* is smaller than the logging interval",  # the logger here is not the user's
    "(GPU|MPS|TPU) available but not used",  # which device a worker uses is the executor's choice
)
_NO_STEP = "You passed in a `val_dataloader` but have no `validation_step`"


@contextmanager
def quiet(validates: bool = True) -> Iterator[None]:
    """Without what Lightning says about a Trainer that is not the user's.

    `validates` is whether there is anything to validate with: where not, a module need not know how to.
    """
    with warnings.catch_warnings(), hushed():
        for message in _NOISE if validates else (*_NOISE, _NO_STEP):
            warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def hushed() -> Iterator[None]:
    """Without what Lightning's loggers have to tell.

    Warnings are left alone: to change their filters and back makes Python forget which of them it has shown.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
