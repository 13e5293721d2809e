"""One `Trainer.fit` by hops: what the Trainer was told becomes a trial, and what becomes of that goes back into it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from cerebro_tune.errors import ConfigurationError, TrialFailedError
from cerebro_tune.executor import Cerebro
from cerebro_tune.results import TrialResult
from cerebro_tune.seat import as_seat, current
from cerebro_tune.settings import TrainAll
from cerebro_tune.sharedrun import Caller
from cerebro_tune_lightning import callbacks, told
from cerebro_tune_lightning.fitrecipe import Fit, FitRecipe, pickled
from cerebro_tune_lightning.handback import HandBack
from cerebro_tune_lightning.loggers import Log

_WORKERS_ALONE = 2


class HopFit:
    """A fit that a Trainer with a `HopStrategy` was asked for; `given` are the arguments of `Trainer._fit_impl`."""

    result: TrialResult | None = None

    def __init__(
        self,
        trainer: Any,
        host: str,
        given: Mapping[str, Any],
        executor: Cerebro | None,
        trial: Any,
        metric: str | None,
    ) -> None:
        self.trainer, self._host, self._given = trainer, host, _sorted_out(given)
        self.module = given["model"]
        told.refuse(trainer, given)
        self._seat = current() if trial is None else as_seat(trial, executor, metric or self._monitor())
        self._executor = executor if self._seat is None or executor is not None else self._seat.executor
        if self._seat is not None:
            trainer.callbacks[:] = [each for each in trainer.callbacks if not self._seat.takes_over(each)]
        self._back = HandBack(trainer, host, self._given)
        self._metric, self._mode = self._measure(metric)

    def run(self) -> None:
        """Train by hops, and leave module and Trainer as a fit does."""
        trained = self.trainer.fit_loop.epoch_progress.current.processed
        if trained >= told.epochs_of(self.trainer):
            import_module(f"{self._host}.utilities.rank_zero").rank_zero_info(
                f"`Trainer.fit` stopped: `max_epochs={trained}` reached."  # in Lightning's words
            )
            self._back.close(stopped=False)
            return
        data = self._data()
        if self._executor is not None:
            self._train(self._executor, data)
            return
        with Cerebro(
            workers=_WORKERS_ALONE,
            placement="pinned",  # so that it trains by hops
            report_every="epoch",
            keep="best" if self._metric else "last",
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),  # what `seed_everything` was called with
            run_dir=Path(self.trainer.default_root_dir) / "runs",
            progress=None if self.trainer.progress_bar_callback else False,
        ) as executor:
            self._train(executor, data)

    def _train(self, executor: Cerebro, data: dict[str, Any]) -> None:
        if executor.keep == "none":
            raise ConfigurationError(
                "The executor has keep='none', but a fit gives its weights back: use 'last' or 'best'."
            )
        batch_size = executor.use_data(**data) if data else executor.batch_size
        epochs, seat = told.epochs_of(self.trainer), self._seat
        log = Log(self.trainer.loggers, f"this fit of {type(self.module).__name__}")
        fit = self._fit(log)
        config = {"fit": fit, "epochs": epochs, "batch_size": batch_size}
        states: list[dict[str, Any]] = []
        measured: dict[str, Any] = {"metric": self._metric, "mode": self._mode}
        if seat is None:
            caller = Caller(TrainAll().on_report, states.append)
            result = executor.train_one(FitRecipe(), config, caller=caller, **measured)
        else:
            result = seat.train(FitRecipe(), config, states.append, **measured)
        fit.release()
        self.result = result = replace(result, config={**result.config, "fit": fit.name})
        if result.error is not None:
            name = type(self.module).__name__
            raise TrialFailedError(f"{result.trial_id}, a {name}, failed:\n{result.error}")
        self._back.set_up(executor.seed)
        for state in states:  # none of a trial that was stopped before its first unit
            if logged := self._back.take_up(state, executor.plan(epochs, batch_size), result):
                log.hear(logged)
        self._back.close(stopped=result.status == "stopped")
        self._back.show_data()
        if seat is not None:
            seat.conclude(result)
        log.end("success", callbacks.savers(self.trainer.callbacks))  # one that fails is Lightning's to finalize

    def _fit(self, log: Log) -> Fit:
        name = type(self.module).__name__
        kwargs = told.trainer_kwargs(self.trainer, told.working_callbacks(self.trainer))
        return Fit(pickled((self.module, kwargs), f"The module {name}, or a callback of its Trainer,"), name, log.hear)

    def _monitor(self) -> str | None:
        """What the first ModelCheckpoint monitors, if one does."""
        savers = callbacks.savers(self.trainer.callbacks)
        return next((str(saver.monitor) for saver in savers if saver.monitor is not None), None)

    def _measure(self, metric: str | None) -> tuple[str | None, str]:
        """What trials are compared by, and whether less of it is better."""
        monitored = [saver for saver in callbacks.savers(self.trainer.callbacks) if saver.monitor is not None]
        seat = self._seat
        chosen = metric or (None if seat is None else seat.metric) or self._monitor()
        mode = next((str(saver.mode) for saver in monitored if saver.monitor == chosen), "min")
        for other in {saver.monitor for saver in monitored} - {chosen}:
            warnings.warn(
                f"A ModelCheckpoint monitors {other!r}, but the trial's best is found by {chosen!r}, and that is what "
                "its best_model_path will be.",
                stacklevel=2,
            )
        return chosen, mode if seat is None or seat.metric is None else seat.mode

    def _data(self) -> dict[str, Any]:
        """What the fit is to read, as arguments of an executor; nothing where the executor has it."""
        if (datamodule := self._given.get("datamodule")) is not None:
            unattached = copy.copy(datamodule)
            unattached.trainer = None  # an earlier fit's, which cannot travel
            return {"datamodule": unattached}
        self.module.trainer = self.trainer  # which a module's own loaders may look at
        if any(map(self._is_modules_own, ("train_dataloader", "val_dataloader"))):
            self.module.prepare_data()  # as Lightning does before it asks for them
            self.module.setup("fit")
        train, validation = self._loader("train_dataloader"), self._loader("val_dataloader")
        if isinstance(validation, list | tuple):
            if len(validation) > 1:
                raise ConfigurationError(
                    f"fit is given {len(validation)} validation loaders; one can be read: concatenate the Datasets "
                    "(torch.utils.data.ConcatDataset)."
                )
            validation = validation[0] if validation else None
        if train is None and self._executor is not None and self._executor.has_data:
            return {}
        if train is None:
            raise ConfigurationError("fit has nothing to train on: give it a loader or a DataModule.")
        return {"train": train, "validation": validation}

    def _loader(self, name: str) -> Any:
        """The loader that `fit` was given, or the module's own."""
        return getattr(self.module, name)() if self._is_modules_own(name) else self._given.get(f"{name}s")

    def _is_modules_own(self, name: str) -> bool:
        overridden = import_module(f"{self._host}.utilities.model_helpers").is_overridden
        return self._given.get(f"{name}s") is None and bool(overridden(name, self.module))


def _sorted_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a fit, with a DataModule that was given in the place of a loader put where it belongs."""
    train = given.get("train_dataloaders")
    module = {"train_dataloaders": None, "datamodule": train} if hasattr(train, "train_dataloader") else {}
    return {**given, **module}
