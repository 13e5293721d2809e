"""What became of a fit, back in the user's own module, callbacks and Trainer, as a fit leaves them.

Private to Lightning, see `versions`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cerebro_tune.results import TrialResult
from cerebro_tune.seeding import kept_streams, seed_data
from cerebro_tune.trainable import Plan
from cerebro_tune_lightning import callbacks, told
from cerebro_tune_lightning.checkpoint import EXTRAS, write
from cerebro_tune_lightning.fitrecipe import OneFit
from cerebro_tune_lightning.quiet import quiet
from cerebro_tune_lightning.trial import LightningTrial

_BESIDE_WEIGHTS = ("callbacks", "optimizer_states", "lr_schedulers", "MixedPrecision", EXTRAS)
"""What of a checkpoint is not in one of weights only."""
_ONE_AT_A_TIME = Lock()
"""Fits end in several threads; warning filters, the DataModule that is set up, and file names are everybody's."""


class HandBack:
    """Fills in a Trainer that was asked for a fit; `given` are the arguments of its `_fit_impl`."""

    def __init__(self, trainer: Any, host: str, given: Mapping[str, Any]) -> None:
        self.trainer, self._host, self._given = trainer, host, given
        self._working = told.working_callbacks(trainer)

    def set_up(self, seed: int) -> None:
        """Set the user's own DataModule up, seeded as in the workers: a random split is the same."""
        if (datamodule := self._given.get("datamodule")) is not None:
            with kept_streams(), _ONE_AT_A_TIME:
                seed_data(seed)
                datamodule.setup(stage="fit")

    def take_up(self, state: dict[str, Any], plan: Plan, result: TrialResult) -> bytes | None:
        """Load the trial's last state into the user's own module, callbacks and Trainer.

        One that a tuner has stopped ends here, as after `trainer.should_stop`; returns what is logged then.
        """
        trainer, module = self.trainer, self._given["model"]
        kwargs = told.trainer_kwargs(trainer, self._working)
        with _ONE_AT_A_TIME:
            trial = LightningTrial(OneFit(module, kwargs))
            trial.start({}, replace(plan, accumulate=int(kwargs["accumulate_grad_batches"])))
            trial.load_state_dict(_on_its_own(state))
            if result.status == "stopped":
                trial.conclude()
            if (datamodule := self._given.get("datamodule")) is not None:
                datamodule.load_state_dict(trial.trainer.datamodule.state_dict())
            trial.close()
            trainer.strategy.connect(module)
            trainer._callback_connector._attach_model_callbacks()
            self._tell_callbacks(trial)
            self._copy_progress(trial.trainer)
            self._note_checkpoints(result)
            return trial.take_log()

    def close(self, stopped: bool) -> None:
        """Leave the Trainer as one that has fitted, with the data of the fit attached to it."""
        trainer = self.trainer
        trainer._data_connector.attach_data(
            self._given["model"],
            **{name: self._given.get(name) for name in ("train_dataloaders", "val_dataloaders", "datamodule")},
        )
        trainer.should_stop = trainer.should_stop or stopped
        trainer.training = False
        trainer.state.status = import_module(f"{self._host}.trainer.states").TrainerStatus.FINISHED
        trainer.state.stage = None

    def show_data(self) -> None:
        """Let the Trainer know the loaders of the fit, as one that has read them, and end the DataModule's part."""
        fit = self.trainer.fit_loop
        validation, datamodule = fit.epoch_loop.val_loop, self._given.get("datamodule")
        with kept_streams(), _ONE_AT_A_TIME, quiet():
            self._show(fit, "training_step", "max_size_cycle")
            self._show(validation, "validation_step", "sequential")
            if validation._combined_loader is not None:
                validation._max_batches = [len(loader) for loader in validation._combined_loader.flattened]
            if datamodule is not None:
                datamodule.teardown(stage="fit")

    def _show(self, loop: Any, step: str, mode: str) -> None:
        """Give a loop the loaders that it would have read, if it would."""
        source, overridden = loop._data_source, import_module(f"{self._host}.utilities.model_helpers").is_overridden
        if source.instance is not None and source.is_defined() and overridden(step, self._given["model"]):
            combined = import_module(f"{self._host}.utilities.combined_loader").CombinedLoader
            loop._combined_loader = combined(source.dataloader(), mode)

    def _tell_callbacks(self, trial: LightningTrial) -> None:
        """Make the callbacks hold the user's Trainer where they have met that of the trial.

        Those that the module brings are the trial's, which have been told what became of them.
        """
        own = zip(told.working_callbacks(self.trainer), trial.callbacks, strict=True)
        brought = {id(mine): theirs for mine, theirs in own if mine is not theirs}
        self.trainer.callbacks[:] = [brought.get(id(callback), callback) for callback in self.trainer.callbacks]
        for callback in trial.callbacks:
            held = vars(callback)
            held.update({name: self.trainer for name, value in held.items() if value is trial.trainer})
            if "_restarting" in held:  # with which Lightning's own note that a checkpoint was loaded into them
                held["_restarting"] = False

    def _copy_progress(self, kept: Any) -> None:
        trainer, fit = self.trainer, self.trainer.fit_loop
        trainer.strategy.optimizers = kept.optimizers
        trainer.strategy.lr_scheduler_configs = kept.lr_scheduler_configs
        fit.min_epochs, fit.max_epochs, fit.max_batches = (
            kept.fit_loop.min_epochs, kept.fit_loop.max_epochs, kept.fit_loop.max_batches
        )  # fmt: skip
        fit.load_state_dict(kept.fit_loop.state_dict())
        fit.epoch_loop._batches_that_stepped = kept.fit_loop.epoch_loop._batches_that_stepped
        for loop in (fit, fit.epoch_loop, fit.epoch_loop.val_loop):
            loop.on_iteration_done()  # this is no restart
        for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
            setattr(trainer._logger_connector, f"_{name}", dict(getattr(kept, name)))
        for name in ("gradient_clip_val", "gradient_clip_algorithm"):
            setattr(trainer, name, getattr(kept, name))
        trainer.accumulate_grad_batches, trainer.should_stop = kept.accumulate_grad_batches, kept.should_stop

    def _note_checkpoints(self, result: TrialResult) -> None:
        """Fill in every ModelCheckpoint; where it has a folder of its own, its files are copied there."""
        if result.checkpoint is None or result.last_checkpoint is None:
            return
        last = result.last_checkpoint, result.last_metrics
        # Of an executor with keep="last" the checkpoint is that of the last state; metrics that go with it are, too.
        best = (result.checkpoint, result.metrics) if result.checkpoint != result.last_checkpoint else last
        for saver in callbacks.savers(self.trainer.callbacks):
            path, metrics = last if saver.monitor is None else best
            if saver.save_top_k:
                score = metrics.get(saver.monitor)
                saver.best_model_path = _placed(saver, path, metrics)
                if score is not None:
                    saver.current_score = saver.best_model_score = saver.kth_value = torch.tensor(score)
                    saver.best_k_models = {saver.best_model_path: saver.best_model_score}
                    saver.kth_best_model_path = saver.best_model_path
            if saver.save_last:  # which is of what was saved last: of one that keeps the best only, that
                kept = (path, metrics) if saver.save_top_k == 1 else last
                saver.last_model_path = _placed(saver, *kept, saver.CHECKPOINT_NAME_LAST)


def _placed(saver: Any, path: Path, metrics: Mapping[str, Any], name: str | None = None) -> str:
    """Where the ModelCheckpoint has the file: in its own folder, if it was given one on this machine."""
    if saver.dirpath is None or "://" in str(saver.dirpath):
        return str(path)
    values = {key: torch.tensor(value) for key, value in metrics.items() if isinstance(value, int | float)}
    # Lightning counts the epoch that a checkpoint is saved in as not over yet.
    values["epoch"] = torch.tensor(math.ceil(metrics["epoch"]) - 1)
    values["step"] = torch.tensor(torch.load(path, weights_only=True, mmap=True)["global_step"])
    target, version = Path(saver.format_checkpoint_name(values, name)), 0
    while target.exists() and saver._enable_version_counter:
        version += 1
        target = Path(saver.format_checkpoint_name(values, name, ver=version))
    target.parent.mkdir(parents=True, exist_ok=True)
    if saver.save_weights_only:
        whole = torch.load(path, weights_only=True)
        write({key: value for key, value in whole.items() if key not in _BESIDE_WEIGHTS}, target)
        return str(target)
    return str(shutil.copy(path, target))


def _on_its_own(state: dict[str, Any]) -> dict[str, Any]:
    """The state with memory for each tensor, so that a part of it can be kept, or saved, without the rest."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        return copies.setdefault(place, tensor.clone())

    copied: dict[str, Any] = tree_map_only(Tensor, own, state)
    return copied
