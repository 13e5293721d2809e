"""All that is private to Lightning's loops: one Trainer per trial and worker, whose fit loop is entered unit by unit.

Tested with 2.6.0 to 2.6.6, where it gives the same bits as one `Trainer.fit`. The order of calls is
that of `_FitLoop.run` and `_TrainingEpochLoop.run`:

    fit_loop.reset, on_run_start                                      once in this worker, before a state is loaded
    fit_loop.on_advance_start, epoch_loop.reset                       at an epoch's first unit
    epoch_loop.advance, epoch_loop.on_advance_end (which validates)   for every batch
    fit_loop.on_advance_end                                           at an epoch's last unit
    fit_loop.on_run_end, on_fit_end                                   at the trial's last unit

A new Trainer per unit would cost 11 ms, and could not step a ReduceLROnPlateau: Lightning takes every epoch that goes
on from a checkpoint for a restarted one, and leaves that scheduler out at its end.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from typing import Any

import torch

from cerebro_tune.errors import NotTrainableError
from cerebro_tune.trainable import Plan, UnitWork
from cerebro_tune_lightning import results
from cerebro_tune_lightning.quiet import quiet

_VALID = "What can be trained is a module with training_step, automatic optimization and one optimizer."


class KeptTrainer:
    """A Trainer set up for one module. Units run in it one by one, each on the state that was restored before."""

    def __init__(self, module: Any, host: str, plan: Plan, trainer_kwargs: Mapping[str, Any]) -> None:
        self.module, self._host = module, host
        if not module.automatic_optimization:
            raise NotTrainableError(f"{type(module).__name__} uses manual optimization. {_VALID}")
        self._train, self._validation = _Feed(plan.batches_per_epoch), _Feed(1)
        self._watcher = _make_watcher(import_module(host).Callback)
        with quiet():
            self.trainer = self._set_up(plan, trainer_kwargs)
        self._fit = self.trainer.fit_loop
        self._epoch = self._fit.epoch_loop
        self._check()
        self._metrics = _Noted({})
        self._connector._callback_metrics = self._metrics
        self._begun = False

    def run(self, work: UnitWork, rows: Sequence[int]) -> dict[str, float]:
        """Train on the unit's batches, which have these numbers of rows, and return what was logged."""
        trainer, fit, epoch = self.trainer, self._fit, self._epoch
        self._metrics.written.clear()
        trainer.training = True
        with self._watcher.unit(work), torch.autograd.set_detect_anomaly(trainer._detect_anomaly):
            self.begin()
            if work.position == 0:
                fit.on_advance_start()
                epoch.reset()
            fetcher = self._feed(work, len(rows))
            for _ in rows:
                self._advance(fetcher)
            if work.last:
                fit.on_advance_end()
                if work.epoch == trainer.max_epochs - 1:
                    self._end()
        return self._report(work, rows)

    def begin(self) -> None:
        """Call `on_train_start`, once: what it sets up is that of a fresh build, and a state loaded afterwards wins."""
        if self._begun:
            return
        self._begun = self.trainer.training = True
        self._fit.reset()
        self._fit.on_run_start()

    def _end(self) -> None:
        """Call the hooks that follow the last epoch, whose work belongs to the final state."""
        self._fit.on_run_end()
        call = self._get("trainer.call")
        call._call_callback_hooks(self.trainer, "on_fit_end")
        call._call_lightning_module_hook(self.trainer, "on_fit_end")

    def dump(self) -> dict[str, Any]:
        """The checkpoint that Lightning would save now; tensors are the live ones."""
        checkpoint: dict[str, Any] = self.trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        return checkpoint

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint whose weights the module has already."""
        connector = self.trainer._checkpoint_connector
        connector._loaded_checkpoint = checkpoint
        connector.restore_callbacks()
        for callback in self.trainer.callbacks:
            if isinstance(callback, self._get("callbacks").BaseFinetuning):
                callback.on_fit_start(self.trainer, self.module)  # makes the parameter groups that the state has
        connector.restore_training_state()
        connector._loaded_checkpoint = {}
        for loop in (self._fit, self._epoch, self._epoch.automatic_optimization, self._epoch.val_loop):
            loop.on_iteration_done()  # this is no restart: the loops go on where they were

    def call_module(self, hook: str, *args: Any) -> Any:
        """Call one of the module's hooks as Lightning does."""
        return self._get("trainer.call")._call_lightning_module_hook(self.trainer, hook, *args)

    def overrides(self, hook: str) -> bool:
        """Whether the module's class has this hook of its own."""
        return bool(self._get("utilities.model_helpers").is_overridden(hook, self.module))

    def dump_results(self) -> dict[str, Any]:
        """What was logged so far: a checkpoint lacks it."""
        connector = self._connector
        return {
            "epoch": results.dump(self._epoch._results),
            "first_iteration": connector._first_loop_iter,
            "current_hook": connector._current_fx,
            **{name: results.pack(getattr(connector, f"_{name}")) for name in _LOGGED},
        }

    def restore_results(self, state: dict[str, Any]) -> None:
        """Take up what `dump_results` gave."""
        connector, device = self._connector, self.trainer.strategy.root_device
        module = self._get("trainer.connectors.logger_connector.result")
        results.restore(self._epoch._results, state["epoch"], module, self.trainer)
        connector._first_loop_iter, connector._current_fx = state["first_iteration"], state["current_hook"]
        for name in _LOGGED:
            setattr(connector, f"_{name}", results.unpack(state[name], device))
        self._metrics = connector._callback_metrics = _Noted(connector._callback_metrics)

    @property
    def accumulating(self) -> bool:
        """Whether gradients wait for the optimizer's next step."""
        return bool(self._fit._should_accumulate())

    @property
    def in_mid_epoch(self) -> bool:
        """Whether an epoch is begun and not over."""
        progress = self._fit.epoch_progress.current
        return bool(progress.ready > progress.completed)

    def close(self) -> None:
        """Call the module's and the callbacks' `teardown`."""
        self._get("trainer.call")._call_teardown_hook(self.trainer)

    # Setting up.

    def _set_up(self, plan: Plan, trainer_kwargs: Mapping[str, Any]) -> Any:
        kwargs = copy.deepcopy(dict(trainer_kwargs))  # callbacks have state, and each trial needs its own
        callbacks = kwargs.pop("callbacks", None) or []
        trainer = import_module(self._host).Trainer(
            **_DEFAULTS
            | kwargs
            | _placement(plan.device)
            | {
                "max_epochs": plan.epochs,
                "callbacks": [self._watcher, *(callbacks if isinstance(callbacks, list) else [callbacks])],
                # A module's `self.logger.experiment` works and goes nowhere.
                "logger": self._get("loggers.logger").DummyLogger(),
                # A cluster's own environment is the coordinator's affair.
                "plugins": self._get("plugins.environments").LightningEnvironment(),
            }
        )
        states = self._get("trainer.states")
        trainer.strategy._lightning_module = self.module
        trainer.state.fn, trainer.state.status = states.TrainerFn.FITTING, states.TrainerStatus.RUNNING
        trainer.training = True
        trainer._run_stage = _leave
        try:
            with suppress(_Ready):
                trainer._fit_impl(self.module, self._train, self._validation)
            trainer.fit_loop.setup_data()
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        except Exception as error:
            if not _raiser(error).startswith(f"{self._host}."):
                raise  # the module's own
            raise NotTrainableError(f"Lightning refuses {type(self.module).__name__}: {error} {_VALID}") from error
        finally:
            trainer._signal_connector.teardown()  # signals are the worker's
        return trainer

    def _check(self) -> None:
        name = type(self.module).__name__
        mock = self._get("core.optimizer")._MockOptimizer  # stands in for none
        count = sum(not isinstance(optimizer, mock) for optimizer in self.trainer.optimizers)
        if count != 1:
            raise NotTrainableError(f"{name}.configure_optimizers gave {count or 'no'} optimizers. {_VALID}")
        self._check_parameters(name)
        callbacks = self._get("callbacks")
        for callback in self.trainer.callbacks:
            for kind, reason in _REFUSED.items():
                if isinstance(callback, getattr(callbacks, kind)):
                    raise NotTrainableError(f"{name} is trained with the callback {type(callback).__name__}, {reason}")

    def _check_parameters(self, name: str) -> None:
        own = {id(parameter) for parameter in self.module.parameters()}
        groups = [group["params"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        outside = [tuple(parameter.shape) for group in groups for parameter in group if id(parameter) not in own]
        if outside:
            raise NotTrainableError(
                f"{name}.configure_optimizers gives the optimizer parameters that are not in the module, of shape "
                f"{', '.join(map(str, outside))}; only the module's own hop: make them attributes of it "
                "(of an nn.ParameterList, an nn.ModuleList or the module itself)."
            )

    def _get(self, module: str) -> Any:
        return import_module(f"{self._host}.{module}")

    # Running.

    def _feed(self, work: UnitWork, batches: int) -> Any:
        """Make the loops see the unit's batches; return their fetcher."""
        trainer, epoch = self.trainer, self._epoch
        self._train.batches = work.train
        fetcher = self._fit._data_fetcher
        iter(fetcher)
        done = epoch.batch_progress.current.ready
        fetcher.fetched = done
        fetcher._start_profiler, fetcher._stop_profiler = epoch._on_before_fetch, epoch._on_after_fetch
        # Lightning validates after every `val_check_batch`-th batch of an epoch: after the unit's last one, or never.
        trainer.val_check_batch = trainer.num_training_batches + 1
        if work.validation is not None:
            trainer.val_check_batch = done + batches
            self._validation.batches, self._validation.length = work.validation, len(work.validation)
            epoch.val_loop._max_batches = [len(work.validation)]
        return fetcher

    def _advance(self, fetcher: Any) -> None:
        try:
            self._epoch.advance(fetcher)
        except StopIteration:
            raise NotTrainableError(
                f"{type(self.module).__name__}.on_train_batch_start returned -1, which skips the rest of an epoch; "
                "by hops every batch of every shard is trained."
            ) from None
        self._epoch.on_advance_end(fetcher)

    def _report(self, work: UnitWork, rows: Sequence[int]) -> dict[str, float]:
        logged = {name: self._metrics[name] for name in self._metrics.written}
        if not work.last:  # Lightning reduces what is logged per epoch only at its end: take the epoch so far
            logged |= self._epoch._results.metrics(on_step=False)["callback"]
        metrics = {name: float(value) for name, value in logged.items() if value.numel() == 1}
        loss = _weighted_mean(self._watcher.losses, rows) * self.trainer.accumulate_grad_batches
        if "train_loss" not in metrics or not math.isfinite(loss):
            metrics["train_loss"] = loss
        return metrics

    @property
    def _connector(self) -> Any:
        return self.trainer._logger_connector


_LOGGED = ("callback_metrics", "logged_metrics", "progress_bar_metrics")

_REFUSED = {
    "EarlyStopping": "but which trial stops is the tuner's choice: leave it out.",
    "Checkpoint": "but which checkpoints are kept is the tuner's choice: leave it out.",
    "GradientAccumulationScheduler": "whose changes of accumulate_grad_batches do not hop: leave it out, and give "
    'one number for all epochs: trainer_kwargs={"accumulate_grad_batches": ...}.',
    "StochasticWeightAveraging": "whose averages and schedule do not hop: leave it out, and average in the module "
    "itself, with a torch.optim.swa_utils.AveragedModel as part of it that on_train_batch_end updates.",
}
"""Callbacks that cannot hop, and what to do instead."""

_DEFAULTS: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class _Ready(Exception):  # noqa: N818  (no error: how `_fit_impl` is left when all is set up)
    """The Trainer is about to enter its fit loop."""


def _leave() -> None:
    raise _Ready


class _Feed:
    """A loader whose batches change from unit to unit while its length is what Lightning is to see."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.batches: Any = ()

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Noted(dict[str, Any]):
    """A dict that notes which keys `update` wrote, in order."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.written: dict[str, None] = {}

    def update(self, values: Mapping[str, Any]) -> None:  # type: ignore[override]  # the one form that Lightning uses
        self.written |= dict.fromkeys(values)
        super().update(values)


def _make_watcher(base: type) -> Any:
    """The callback that keeps a unit's losses and times its validation; `base` is the Callback of either package."""

    class Watcher(base):  # type: ignore[misc]  # known only when the module's class is
        losses: list[torch.Tensor | None]

        @contextmanager
        def unit(self, work: UnitWork) -> Iterator[None]:
            self._validating, self.losses = work.validating, []
            with ExitStack() as self._open:
                yield

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(outputs.get("loss"))
            if trainer.should_stop:
                raise NotTrainableError(
                    f"{type(pl_module).__name__} or one of its callbacks set trainer.should_stop; "
                    "which trial stops is the tuner's choice."
                )

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self._open.enter_context(self._validating())

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self._open.close()

    return Watcher()


def _raiser(error: BaseException) -> str:
    """The name of the module whose code raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals["__name__"])


def _weighted_mean(losses: Sequence[torch.Tensor | None], rows: Sequence[int]) -> float:
    """The mean over rows; a batch whose `training_step` returned None has no loss and does not count."""
    counted = [(loss, n) for loss, n in zip(losses, rows, strict=True) if loss is not None]
    if not counted:
        return math.nan
    values = torch.stack([loss.reshape(()).float() for loss, _ in counted]).tolist()  # one wait for the device
    return math.fsum(value * n for value, (_, n) in zip(values, counted, strict=True)) / sum(n for _, n in counted)


def _placement(device: str) -> dict[str, Any]:
    kind, _, index = device.partition(":")
    return {"accelerator": "gpu" if kind == "cuda" else kind, "devices": [int(index)] if index else 1}
