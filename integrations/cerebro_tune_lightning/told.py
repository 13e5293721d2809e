"""What a user's Trainer was told: what of it holds in the workers too, and what cannot hold by hops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cerebro_tune.errors import ConfigurationError
from cerebro_tune_lightning import callbacks, loggers

_NO_LIMIT = (1.0, None)
_SUBSET = "give a torch.utils.data.Subset of the data"


def epochs_of(trainer: Any) -> int:
    """How many epochs the Trainer is to train."""
    return 1000 if trainer.max_epochs is None else int(trainer.max_epochs)  # as Lightning has it


def trainer_kwargs(trainer: Any, working: list[Any]) -> dict[str, Any]:
    """What the Trainer was made with, as far as it is to hold in a worker; `working` are its callbacks there."""
    return {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "benchmark": torch.backends.cudnn.benchmark,
        "callbacks": list(working),
        "default_root_dir": trainer.default_root_dir,
        "detect_anomaly": trainer._detect_anomaly,
        "deterministic": _deterministic(),
        "enable_autolog_hparams": trainer.enable_autolog_hparams,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "gradient_clip_val": trainer.gradient_clip_val,
        "log_every_n_steps": trainer.log_every_n_steps,
        "logger": loggers.Elsewhere(tuple(map(loggers.Facts.of, trainer.loggers))),
        "min_epochs": trainer.min_epochs,
        "min_steps": trainer.min_steps,
        "precision": trainer.precision,
    }


def working_callbacks(trainer: Any) -> list[Any]:
    """The Trainer's callbacks that have something to do in a worker."""
    return callbacks.working(trainer.callbacks, type(trainer.lightning_module).__name__)


def refuse(trainer: Any, given: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for what the Trainer was told that cannot hold by hops, before anything is trained."""
    for name, (value, valid, instead) in _limits(trainer, given).items():
        if value not in valid:
            raise ConfigurationError(f"The Trainer has {name}={value!r}, which cannot hold by hops: {instead}.")
    if epochs_of(trainer) < 0:
        raise ConfigurationError("The Trainer has max_epochs=-1, and a trial has an end: give the number of epochs.")
    if getattr(given["model"], "_compiler_ctx", None) is not None:
        raise ConfigurationError(
            f"The module {type(given['model']).__name__} is compiled, and compiled code cannot travel: compile "
            "its parts in configure_model(), which every worker calls."
        )
    _refuse_plugins(trainer)
    loggers.refuse_graphs(trainer.loggers)
    working_callbacks(trainer)
    callbacks.check_savers(trainer.callbacks, type(given["model"]).__name__)
    progress = trainer.fit_loop.epoch_progress.current
    if progress.ready > 0 and progress.processed < epochs_of(trainer):
        raise ConfigurationError(
            f"This Trainer has trained {progress.processed} of {epochs_of(trainer)} epochs in an earlier fit, and "
            "would go on from there; by hops every fit is a trial of its own: make a new Trainer, or go on from a "
            "checkpoint in one without HopStrategy."
        )


def _limits(trainer: Any, given: Mapping[str, Any]) -> dict[str, tuple[Any, tuple[Any, ...], str]]:
    """By name: the value that the Trainer has, those that can hold by hops, and what to do instead of another."""
    return {
        "fast_dev_run": (trainer.fast_dev_run, (False, 0), "use Cerebro(..., backend='inline') to try a model out"),
        "ckpt_path": (given.get("ckpt_path"), (None,), "go on in a Trainer without HopStrategy, or clone the trial"),
        "max_steps": (trainer.max_steps, (-1,), "give max_epochs: a trial visits every shard in every epoch"),
        "num_nodes": (trainer._accelerator_connector._num_nodes_flag, (1,), "leave it out: workers are the executor's"),
        "devices": (_devices(trainer), (1,), "leave it out: workers are the executor's"),
        "overfit_batches": (trainer.overfit_batches, (0, 0.0), _SUBSET),
        "limit_train_batches": (trainer.limit_train_batches, _NO_LIMIT, _SUBSET),
        "limit_val_batches": (
            trainer.limit_val_batches, _NO_LIMIT, "give Cerebro validation_rows, or no validation data at all",
        ),
        "val_check_interval": (trainer.val_check_interval, _NO_LIMIT, "give Cerebro report_every='unit'"),
        "check_val_every_n_epoch": (trainer.check_val_every_n_epoch, (1,), "give Cerebro report_every='epoch'"),
        "reload_dataloaders_every_n_epochs": (
            trainer.reload_dataloaders_every_n_epochs, (0,),
            "leave it out: shards stay where they are; what changes from epoch to epoch belongs into the Dataset",
        ),
        "profiler": (
            type(trainer.profiler).__name__, ("PassThroughProfiler",),
            "profile a fit without HopStrategy; Cerebro(trace=True) shows which worker spent its time on what",
        ),
    }  # fmt: skip


def _devices(trainer: Any) -> int:
    """How many devices the user asked for; 1 for all that there are, which is what Lightning takes unasked."""
    count = len(trainer._accelerator_connector._parallel_devices)
    return 1 if count == trainer.accelerator.auto_device_count() else count


def _refuse_plugins(trainer: Any) -> None:
    """Plugins of precision made by hand, and layers synchronised between processes."""
    connector = trainer._accelerator_connector
    if connector._layer_sync is not None:
        raise ConfigurationError("The Trainer has sync_batchnorm=True, but a trial has one device: leave it out.")
    plugin = connector._precision_plugin_flag
    if plugin is not None:
        raise ConfigurationError(
            f"The Trainer has the plugin {type(plugin).__name__}, which the workers cannot be given: "
            "say it with precision=..., such as 'bf16-mixed'."
        )


def _deterministic() -> bool | str | None:
    """What `Trainer(deterministic=...)` has set in this process; the Trainer itself keeps it nowhere."""
    if not torch.are_deterministic_algorithms_enabled():
        return None
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else True
