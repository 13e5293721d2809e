"""A user's DataModule, made once per process and read by both data sets of a run.

By its methods only, so that the core imports no Lightning: `prepare_data`, `setup`, `train_dataloader`,
`val_dataloader`, `teardown`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle

from cerebro_tune.errors import ConfigurationError, NotPicklableError
from cerebro_tune.seeding import kept_streams, seed_data

HOSTS = ("pytorch_lightning.", "lightning.")


@dataclass(frozen=True, eq=False, slots=True)
class StandIn:
    """A module's `trainer` where it has none: what a Trainer on one device says of a fit, on which code may depend.

    A trial that has a Trainer attaches that instead.
    """

    datamodule: Any
    world_size: int = 1
    num_nodes: int = 1
    num_devices: int = 1
    node_rank: int = 0
    global_rank: int = 0
    local_rank: int = 0
    is_global_zero: bool = True
    testing: bool = False
    predicting: bool = False
    sanity_checking: bool = False

    @property
    def training(self) -> bool:
        """Whether it is not validation."""
        return not self.validating

    @property
    def validating(self) -> bool:
        """Whether gradients are off: in a fit they are so just where validation has its batches and steps."""
        import torch

        return not torch.is_grad_enabled()

    @property
    def evaluating(self) -> bool:
        """As of a Trainer, which may test as well."""
        return self.validating

    def __getattr__(self, name: str) -> Any:
        has = sorted(key for key in (*StandIn.__annotations__, *vars(StandIn)) if not key.startswith("_"))
        raise AttributeError(
            f"The trainer of this DataModule has no {name!r}: the module is shared by all trials of a worker, and no "
            f"Trainer is attached now. Here self.trainer has {', '.join(dict.fromkeys(has))}; give the module what "
            "else it needs as an argument."
        )


class SharedModule:
    """A DataModule that travels as it was before `setup`, so that what `setup` loads is loaded where it is needed."""

    def __init__(self, pickled: bytes, seed: int) -> None:
        self._pickled, self.seed = pickled, seed
        self._module: Any = None
        self._loaders: dict[str, Any] = {}

    @classmethod
    def prepare(cls, module: Any, seed: int) -> SharedModule:
        """Call `prepare_data`, here and nowhere else, and make the module ready to travel."""
        if not hasattr(module, "train_dataloader") or isinstance(module, type):
            raise ConfigurationError(
                f"datamodule is {module!r}; it must be a LightningDataModule, an object with train_dataloader()."
            )
        _check_stages(module)
        if hasattr(module, "prepare_data"):
            with _with_trainer(module):
                module.prepare_data()
        return cls(_pickled(module), seed)

    @property
    def module(self) -> Any:
        """The module of this process, set up with the generators seeded: a random split is the same everywhere."""
        if self._module is None:
            module = cloudpickle.loads(self._pickled)
            if _lacks_trainer(module):
                module.trainer = StandIn(module)
            with kept_streams():
                seed_data(self.seed)
                if hasattr(module, "setup"):
                    module.setup(stage="fit")
            self._module = module
        return self._module

    def loader(self, role: str) -> Any:
        """The module's own loader, of `role` "train" or "val", made once; None where it defines none."""
        if role not in self._loaders:
            with kept_streams():
                seed_data(self.seed)
                given = getattr(self.module, f"{role}_dataloader")() if self._defines(f"{role}_dataloader") else None
            self._loaders[role] = _only_one(given, f"{type(self.module).__name__}.{role}_dataloader")
        return self._loaders[role]

    def is_like(self, module: Any) -> bool:
        """Whether the module would travel as the same bytes."""
        return _pickled(module) == self._pickled

    def close(self) -> None:
        """Call `teardown` if this process has set the module up."""
        if self._module is not None and hasattr(self._module, "teardown"):
            self._module.teardown(stage="fit")
        self._module = None
        self._loaders.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedModule, (self._pickled, self.seed)

    def _defines(self, name: str) -> bool:
        """Whether the user's class has this method, rather than Lightning's, which raises."""
        if name in vars(self.module):
            return True
        owner = next((base for base in type(self.module).__mro__ if name in vars(base)), None)
        return owner is not None and not owner.__module__.startswith(HOSTS)


class ModuleRows:
    """Makes the Dataset that a module's loader reads; a function to `ShardedDataset.index`."""

    def __init__(self, shared: SharedModule, role: str) -> None:
        self.shared, self.role = shared, role

    def __call__(self) -> Any:  # noqa: D102
        return self.shared.loader(self.role).dataset


class ModuleCollate:
    """The collate function of a module's loader, which may be a method of the module's."""

    def __init__(self, shared: SharedModule, role: str) -> None:
        self.shared, self.role = shared, role

    def __call__(self, samples: list[Any]) -> Any:  # noqa: D102
        return self.shared.loader(self.role).collate_fn(samples)


def _check_stages(module: Any) -> None:
    """Raise ConfigurationError for a hook that does not take the stage that it is called with."""
    for hook in ("setup", "teardown"):
        if not hasattr(module, hook):
            continue
        try:
            inspect.signature(getattr(module, hook)).bind(stage="fit")
        except TypeError:
            raise ConfigurationError(
                f"{type(module).__name__}.{hook} does not take the stage, which Lightning calls it with: write "
                f"def {hook}(self, stage)."
            ) from None


def _lacks_trainer(module: Any) -> bool:
    """Whether the module has Lightning's attribute for a trainer, and none was attached."""
    return vars(module).get("trainer", module) is None


@contextmanager
def _with_trainer(module: Any) -> Iterator[None]:
    """Let the user's own module have a trainer for a while."""
    if not _lacks_trainer(module):
        yield
        return
    module.trainer = StandIn(module)
    try:
        yield
    finally:
        module.trainer = None


def _pickled(module: Any) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(module)
    except Exception as error:  # pickling runs code of the object's own, which may raise anything
        raise NotPicklableError(
            f"The DataModule cannot be sent to the workers: {type(error).__name__}: {error}. "
            "Open files, locks and connections in setup(), which each worker calls."
        ) from error
    return pickled


def _only_one(given: Any, name: str) -> Any:
    if isinstance(given, list | tuple):
        if len(given) > 1:
            raise ConfigurationError(
                f"{name}() returned {len(given)} loaders; one can be read: concatenate the Datasets "
                "(torch.utils.data.ConcatDataset)."
            )
        return given[0] if given else None
    return given
