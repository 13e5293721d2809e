"""A worker's DataModule, set up once for all trials there, lent to their Trainers one at a time."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

from cerebro_tune.errors import NotTrainableError

_FRESH: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""What each DataModule's state was before any trial used it."""


class LentData:
    """The DataModule as one Trainer gets it; all of this does nothing where there is none, or none of Lightning's.

    Its `prepare_data`, `setup` and `teardown` are the worker's to call.
    """

    def __init__(self, data: Any, module: Any, host: str) -> None:
        self._data = data if isinstance(data, import_module(host).LightningDataModule) else None
        bases = (base for base in type(data).__mro__ if base.__name__ == "LightningDataModule")
        other = next((base.__module__.removesuffix(".core.datamodule") for base in bases), None)
        if self._data is None and other:
            raise NotTrainableError(
                f"{type(data).__name__} is a LightningDataModule of {other}, and {type(module).__name__} is a "
                f"LightningModule of {host}: import both from one of them."
            )

    def attach(self, trainer: Any) -> None:
        """Make the trainer know the DataModule, at a time when it would have called its hooks for setting up."""
        if self._data is not None:
            trainer._data_connector._datahook_selector.datamodule = trainer.datamodule = self._data
            self.lend(trainer)
            if self._data not in _FRESH:
                _FRESH[self._data] = deepcopy(self._data.state_dict())

    def lend(self, trainer: Any) -> None:
        """Make the DataModule know the trainer that is about to use it."""
        if self._data is not None:
            self._data.trainer = trainer

    def renew(self) -> None:
        """Give the DataModule the state it had before any trial used it."""
        if self._data is not None and _FRESH[self._data]:
            self._data.load_state_dict(deepcopy(_FRESH[self._data]))
