"""Which Lightning this package knows from the inside: what is used of it beyond its public face, and the tested range.

`strategy` takes a fit over, `handback` writes into the Trainer, `loops` and `results` enter the loops. All of it is
looked up here once per process, by name and parameters, so that a Lightning that is built otherwise is refused in a
sentence and not found out in the middle of a fit.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module

from cerebro_tune.errors import MissingHostError
from cerebro_tune.hosts import lacking

TESTED = "2.6.0 to 2.6.6"
_NEWEST = (2, 6)

_USED: dict[str, tuple[str, ...]] = {
    "callbacks.ModelCheckpoint.format_checkpoint_name": ("metrics",),
    "callbacks.ModelCheckpoint._get_metric_interpolated_filepath_name": ("monitor_candidates", "trainer"),
    "core.optimizer._MockOptimizer": (),
    "loops.fit_loop._FitLoop.on_advance_end": (),
    "loops.fit_loop._FitLoop.on_advance_start": (),
    "loops.fit_loop._FitLoop.on_run_end": (),
    "loops.fit_loop._FitLoop.on_run_start": (),
    "loops.fit_loop._FitLoop.reset": (),
    "loops.loop._Loop.load_state_dict": ("state_dict",),
    "loops.loop._Loop.on_iteration_done": (),
    "loops.training_epoch_loop._TrainingEpochLoop.advance": ("data_fetcher",),
    "loops.training_epoch_loop._TrainingEpochLoop.on_advance_end": ("data_fetcher",),
    "loops.training_epoch_loop._TrainingEpochLoop.reset": (),
    "strategies.launchers.launcher._Launcher.launch": ("function",),
    "strategies.strategy.Strategy._configure_launcher": (),
    "trainer.call._call_callback_hooks": ("trainer", "hook_name"),
    "trainer.call._call_lightning_module_hook": ("trainer", "hook_name"),
    "trainer.call._call_teardown_hook": ("trainer",),
    "trainer.connectors.callback_connector._CallbackConnector._attach_model_callbacks": (),
    "trainer.connectors.checkpoint_connector._CheckpointConnector.dump_checkpoint": ("weights_only",),
    "trainer.connectors.checkpoint_connector._CheckpointConnector.restore_callbacks": (),
    "trainer.connectors.checkpoint_connector._CheckpointConnector.restore_loops": (),
    "trainer.connectors.checkpoint_connector._CheckpointConnector.restore_lr_schedulers": (),
    "trainer.connectors.data_connector._DataConnector.attach_data": (
        "model", "train_dataloaders", "val_dataloaders", "datamodule",
    ),
    "trainer.connectors.data_connector._DataLoaderSource.dataloader": (),
    "trainer.connectors.data_connector._DataLoaderSource.is_defined": (),
    "trainer.connectors.logger_connector.result._Metadata": ("fx", "name"),
    "trainer.connectors.logger_connector.result._ResultMetric": ("metadata", "is_tensor"),
    "trainer.connectors.logger_connector.result._Sync": (),
    "trainer.trainer.Trainer._fit_impl": (
        "model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path",
    ),
    "trainer.trainer.Trainer._run_stage": (),
    "utilities.combined_loader.CombinedLoader": ("iterables", "mode"),
    "utilities.model_helpers.is_overridden": ("method_name", "instance"),
}  # fmt: skip
"""Where each lies below the host's package, and parameters that it must have."""


@cache
def check(host: str) -> None:
    """Look at `pytorch_lightning` or `lightning.pytorch` once: MissingHostError for one that cannot work.

    One that is newer than the tested ones, and has all that is used, is warned about.
    """
    version = str(import_module(host).__version__)
    if absent := lacking(host, _USED):
        raise MissingHostError(
            f"{host} {version} lacks {', '.join(absent)}, as this package uses it; it works with {TESTED}: "
            f'pip install "{host.partition(".")[0].replace("_", "-")}>=2.6,<2.7".'
        )
    if tuple(int(part) for part in version.split(".")[:2]) > _NEWEST:
        warnings.warn(
            f"{host} {version} is newer than what cerebro_tune_lightning is tested with, {TESTED}: "
            "compare a trial with a plain Trainer.fit before you rely on it (cerebro_tune.verify_hop).",
            stacklevel=2,
        )
