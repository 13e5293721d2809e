"""A LightningModule as something that trains by hops. Importing this module imports no Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from cerebro_tune.configtext import config_text
from cerebro_tune.errors import ConfigurationError, NotTrainableError
from cerebro_tune.sources import source_digest
from cerebro_tune.trainable import Config, Recipe, Trainable
from cerebro_tune_lightning import callbacks, checkpoint, construct
from cerebro_tune_lightning.loggers import TrialLoggers

_VALID_KWARGS = (
    "accumulate_grad_batches",
    "benchmark",
    "callbacks",
    "default_root_dir",
    "detect_anomaly",
    "deterministic",
    "enable_autolog_hparams",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "log_every_n_steps",
    "logger",
    "min_epochs",
    "min_steps",
    "precision",
)
_IDLE_KWARGS = ("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "num_sanity_val_steps")
"""Arguments of the Trainer that make no difference in a worker, which shows nothing and saves what it is told to."""
_OFF_ANYWAY = ("fast_dev_run", "max_time", "reload_dataloaders_every_n_epochs")
"""Arguments of the Trainer that are accepted when they turn something off."""
_INSTEAD = {
    "max_epochs": "give epochs to the executor or to the config",
    "max_time": "a trial's time is spread over workers and pauses: limit the epochs, or let the tuner stop trials",
    "reload_dataloaders_every_n_epochs": "shards stay where they are for the whole run: let what changes from epoch to "
    "epoch happen in the Dataset's __getitem__ or in the module",
    "strategy": "a worker has one device: leave it out, and trials train side by side on all of them",
}
"""What to do instead of giving an argument of the Trainer."""


def namespace(cls: type) -> str | None:
    """The package whose LightningModule the class derives from: pytorch_lightning, lightning.pytorch, or none."""
    for base in cls.__mro__:
        for package in ("pytorch_lightning", "lightning.pytorch"):
            if base.__name__ == "LightningModule" and base.__module__.startswith(f"{package}."):
                return package
    return None


class LightningTrainable(Recipe):
    """Any LightningModule as something that trains by hops.

    Args:
        make_module: A LightningModule class, called with the config as keywords (or as one mapping, where that is what
            it takes), or a function of the config that returns a module.
        batch_size: Rows per batch; a `batch_size` in a config that the module does not take itself wins.
        trainer_kwargs: Arguments of the Trainer, such as precision, gradient_clip_val, accumulate_grad_batches,
            callbacks. Plain attributes of callbacks hop as those of the module do. Progress bars, summaries and
            checkpoint callbacks do nothing in a worker; `checkpoint_callback` is the first ModelCheckpoint among them.
            `logger` is a CSVLogger or TensorBoardLogger, of which each trial gets a version named by its id; a
            function that makes the logger of a trial from its id; True for Lightning's default; or a list of these.
            Trials are logged where `fit` is called, a unit at a time when it is committed, and with
            `report_every="unit"` what is validated in mid-epoch, too. What a module calls on `self.logger` and its
            `experiment` travels likewise, and returns None, since the file or run is not in the worker.
        loader: Settings for loading, as `Cerebro` takes them; each wins over the executor's.
        datamodule: A LightningDataModule to train on, for an executor that was made without data.
    """

    suffix = ".ckpt"

    def __init__(
        self,
        make_module: Callable[..., Any],
        batch_size: int | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
        loader: Mapping[str, Any] | None = None,
        datamodule: Any = None,
    ) -> None:
        self.make_module, self.batch_size, self.loader = make_module, batch_size, dict(loader or {})
        self.datamodule = datamodule
        self.trainer_kwargs = {name: v for name, v in (trainer_kwargs or {}).items() if name not in _IDLE_KWARGS}
        self.name = getattr(make_module, "__name__", type(make_module).__name__).replace("<lambda>", "module")
        self.model = make_module if isinstance(make_module, type) else None
        self._check_kwargs()
        self.loggers = TrialLoggers(self.trainer_kwargs.pop("logger", None))
        given = callbacks.as_list(self.trainer_kwargs.get("callbacks"))
        callbacks.working(given, self.name)
        callbacks.check_savers(given, self.name)
        self.checkpoint_callback = callbacks.checkpoint_callback(given)
        self.accumulate = int(self.trainer_kwargs.get("accumulate_grad_batches", 1))
        if self.accumulate < 1:
            raise ConfigurationError(f"accumulate_grad_batches is {self.accumulate}; it must be at least 1.")

    @property
    def identity(self) -> str:  # noqa: D102
        return f"{source_digest(self.make_module)} {config_text(self.trainer_kwargs)}"

    def _check_kwargs(self) -> None:
        refused = sorted(
            name
            for name, value in self.trainer_kwargs.items()
            if name not in _VALID_KWARGS and not (name in _OFF_ANYWAY and not value)
        )
        if refused:
            instead = "".join(f" Instead of {name}: {_INSTEAD[name]}." for name in refused if name in _INSTEAD)
            raise ConfigurationError(
                f"trainer_kwargs has {', '.join(refused)}, which the executor decides. "
                f"Valid are {', '.join(_VALID_KWARGS)}.{instead}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"datamodule": None}  # it travels with the data

    def create(self) -> Trainable:  # noqa: D102
        from cerebro_tune_lightning.trial import LightningTrial

        return LightningTrial(self)

    def kwargs_of_trial(self) -> dict[str, Any]:
        """Arguments for the Trainer of one trial, which has callbacks of its own, since these have state."""
        return deepcopy(self.trainer_kwargs)

    def export(self, state: dict[str, Any], path: Path) -> None:
        """Write a `.ckpt` that `load_from_checkpoint` and `torch.load(weights_only=True)` open."""
        checkpoint.export(state, path)

    def log(self, trial_id: str, config: Config, logged: Any) -> None:  # noqa: D102
        self.loggers.hear(trial_id, logged)

    def end_log(self, trial_id: str, status: str) -> None:  # noqa: D102
        self.loggers.end(trial_id, status)

    def takes(self, key: str) -> bool:  # noqa: D102
        return self.model is not None and construct.takes(self.model, key)

    def model_config(self, config: Config) -> dict[str, Any]:  # noqa: D102
        whole = self.model is None or construct.mapping_parameter(self.model, config)
        return dict(config) if whole else super().model_config(config)

    def check_config(self, config: Config) -> None:  # noqa: D102
        if self.model is not None:
            construct.check_config(self.model, config)

    def reads(self, key: str, config: Config) -> bool:
        """Whether the key can make a difference when a module is built; a function may read any."""
        return self.model is None or construct.reads(self.model, key, config)

    def hyper_parameters(self, config: Config) -> tuple[str | None, Config]:
        """What `load_from_checkpoint` needs to call the class as it was called: the mapping parameter, the values."""
        return (None, {}) if self.model is None else (construct.mapping_parameter(self.model, config), config)

    def build(self, config: Config) -> Any:
        """Make the module of a config."""
        module = self.make_module(config) if self.model is None else construct.construct(self.model, config)
        if namespace(type(module)) is None:
            raise NotTrainableError(f"{self.name} made a {type(module).__name__}; it must make a LightningModule.")
        return module
