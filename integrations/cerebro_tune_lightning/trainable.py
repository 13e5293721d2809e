"""A LightningModule as something that trains by hops. Importing this module imports no Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cerebro_tune.errors import ConfigurationError, NotTrainableError
from cerebro_tune.trainable import Config, Recipe, Trainable
from cerebro_tune_lightning import checkpoint, construct

_VALID_KWARGS = (
    "accumulate_grad_batches",
    "benchmark",
    "callbacks",
    "detect_anomaly",
    "deterministic",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "log_every_n_steps",
    "precision",
)
_OFF_ANYWAY = (
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "logger",
    "num_sanity_val_steps",
)
"""Arguments of the Trainer that are accepted when they turn something off."""


def namespace(cls: type) -> str | None:
    """The package whose LightningModule the class derives from: pytorch_lightning, lightning.pytorch, or none."""
    for base in cls.__mro__:
        for package in ("pytorch_lightning", "lightning.pytorch"):
            if base.__name__ == "LightningModule" and base.__module__.startswith(f"{package}."):
                return package
    return None


class LightningTrainable(Recipe):
    """Any LightningModule with automatic optimization and one optimizer, as something that trains by hops.

    Args:
        make_module: A LightningModule class, called with the config as keywords (or as one mapping, where that is what
            it takes), or a function of the config that returns a module.
        batch_size: Rows per batch; a `batch_size` in a config that the module does not take itself wins.
        trainer_kwargs: Arguments of the Trainer, such as precision, gradient_clip_val, accumulate_grad_batches.
    """

    suffix = ".ckpt"

    def __init__(
        self,
        make_module: Callable[..., Any],
        batch_size: int | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.make_module, self.batch_size, self.trainer_kwargs = make_module, batch_size, dict(trainer_kwargs or {})
        self.name = getattr(make_module, "__name__", type(make_module).__name__).replace("<lambda>", "module")
        self._class = make_module if isinstance(make_module, type) else None
        refused = [
            name
            for name, value in self.trainer_kwargs.items()
            if name not in _VALID_KWARGS and not (name in _OFF_ANYWAY and not value)
        ]
        if refused:
            raise ConfigurationError(
                f"trainer_kwargs has {', '.join(sorted(refused))}, which the executor decides. "
                f"Valid are {', '.join(_VALID_KWARGS)}."
            )
        self.accumulate = int(self.trainer_kwargs.get("accumulate_grad_batches", 1))
        if self.accumulate < 1:
            raise ConfigurationError(f"accumulate_grad_batches is {self.accumulate}; it must be at least 1.")

    def create(self) -> Trainable:  # noqa: D102
        from cerebro_tune_lightning.trial import LightningTrial

        return LightningTrial(self)

    def export(self, state: dict[str, Any], path: Path) -> None:
        """Write a `.ckpt` that `load_from_checkpoint` and `torch.load(weights_only=True)` open."""
        checkpoint.export(state, path)

    def takes(self, key: str) -> bool:  # noqa: D102
        return self._class is not None and construct.takes(self._class, key)

    def model_config(self, config: Config) -> dict[str, Any]:  # noqa: D102
        whole = self._class is None or construct.mapping_parameter(self._class, config)
        return dict(config) if whole else super().model_config(config)

    def check_config(self, config: Config) -> None:  # noqa: D102
        if self._class is not None:
            construct.check_config(self._class, config)

    def reads(self, key: str, config: Config) -> bool:
        """Whether the key can make a difference when a module is built; a function may read any."""
        return self._class is None or construct.reads(self._class, key, config)

    def hyper_parameters(self, config: Config) -> tuple[str | None, Config]:
        """What `load_from_checkpoint` needs to call the class as it was called: the mapping parameter, the values."""
        return (None, {}) if self._class is None else (construct.mapping_parameter(self._class, config), config)

    def build(self, config: Config) -> Any:
        """Make the module of a config."""
        module = self.make_module(config) if self._class is None else construct.construct(self._class, config)
        if namespace(type(module)) is None:
            raise NotTrainableError(f"{self.name} made a {type(module).__name__}; it must make a LightningModule.")
        return module
