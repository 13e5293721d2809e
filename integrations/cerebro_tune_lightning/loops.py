"""All that is private to Lightning's loops: one Trainer per trial and worker, whose fit loop is entered unit by unit.

Tested with 2.6.0 to 2.6.6, where it gives the same bits as one `Trainer.fit`. The order of calls is
that of `_FitLoop.run` and `_TrainingEpochLoop.run`:

    fit_loop.reset, on_run_start                                      once in this worker, before a state is loaded
    fit_loop.on_advance_start, epoch_loop.reset                       at an epoch's first unit
    epoch_loop.advance, epoch_loop.on_advance_end (which validates)   for every batch
    fit_loop.on_advance_end                                           at an epoch's last unit
    fit_loop.on_run_end, on_fit_end                                   at the trial's last unit

The last two lines also follow the batch or the epoch after which `trainer.should_stop` is set, and end the trial.

A new Trainer per unit would cost 11 ms, and could not step a ReduceLROnPlateau: Lightning takes every epoch that goes
on from a checkpoint for a restarted one, and leaves that scheduler out at its end.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Any

import torch

from cerebro_tune.adopt import gradients, load_gradients
from cerebro_tune.errors import NotTrainableError
from cerebro_tune.trainable import Plan, UnitWork
from cerebro_tune_lightning import callbacks, groups, results, versions
from cerebro_tune_lightning.lending import LentData
from cerebro_tune_lightning.loggers import Facts, Recording
from cerebro_tune_lightning.quiet import hushed, quiet
from cerebro_tune_lightning.watcher import make_watcher

_VALID = (
    "What can be trained is a module with training_step and one optimizer, or several with automatic_optimization off."
)


class KeptTrainer:
    """A Trainer set up for one module. Units run in it one by one, each on the state that was restored before."""

    def __init__(
        self,
        module: Any,
        host: str,
        plan: Plan,
        trainer_kwargs: Mapping[str, Any],
        loggers: Sequence[Facts] | None = None,
    ) -> None:
        versions.check(host)
        self.module, self._host = module, host
        self._train, self._validation = _Feed(plan.batches_per_epoch), _Feed(1)
        self._data = LentData(plan.datamodule, module, host)
        self._recording = Recording(self._get("loggers.logger").DummyLogger, loggers)
        self._watcher = make_watcher(import_module(host).Callback, self._data.attach)
        with quiet(plan.validates):
            self.trainer = self._set_up(plan, trainer_kwargs)
        self._fit = self.trainer.fit_loop
        self._epoch = self._fit.epoch_loop
        self._check()
        self.hooked = self.overrides("on_load_checkpoint", "load_state_dict")
        """Whether code of the module or of a callback runs when a state is loaded."""
        self._gradients_seen = self.overrides("on_before_zero_grad", "optimizer_zero_grad")
        self._metrics = _Noted({})
        self._connector._callback_metrics = self._metrics
        self._begun = self._ended = False

    def run(self, work: UnitWork) -> dict[str, float]:
        """Train on the unit's batches and return what was logged; an epoch that is to stop is ended here."""
        trainer, fit, epoch = self.trainer, self._fit, self._epoch
        self._metrics.written.clear()
        self._recording.clear()
        self._data.lend(self.trainer)
        trainer.training = True
        with self._watcher.unit(work), torch.autograd.set_detect_anomaly(trainer._detect_anomaly):
            if work.position == 0:
                fit.on_advance_start()
                epoch.reset()
            fetcher = self._feed(work)
            for left in reversed(range(len(work.train))):
                if self.should_stop:
                    break
                self._advance(fetcher, validates=not left and not work.last)
            ended = work.last or self.should_stop
            if ended:
                fit.on_advance_end()
                if self.should_stop or work.epoch == trainer.max_epochs - 1:
                    self._end()
        return self._report(work, ended)

    def begin(self) -> bool:
        """Call `on_train_start`, once: what it sets up is that of a fresh build, and a state loaded afterwards wins.

        Returns whether that was now.
        """
        if self._begun:
            return False
        self._begun = self.trainer.training = True
        self._data.lend(self.trainer)
        self._data.renew()  # another trial's state may be in it
        self._fit.reset()
        self._fit.on_run_start()
        self._recording.begin()
        return True

    @property
    def should_stop(self) -> bool:
        """Whether a callback or the module has set `trainer.should_stop`, and enough is trained to heed it."""
        return bool(self.trainer.should_stop and self._fit._can_stop_early)

    def conclude(self) -> None:
        """End a trial that was stopped from outside as one that has set `trainer.should_stop`; once."""
        if self._ended:
            return
        self.trainer.should_stop = self.trainer.training = True
        if self.in_mid_epoch:
            self._fit.on_advance_end()
        self._end()

    def _end(self) -> None:
        """Call the hooks that follow the last epoch, whose work belongs to the final state."""
        self._ended = True
        self._fit.on_run_end()
        call = self._get("trainer.call")
        call._call_callback_hooks(self.trainer, "on_fit_end")
        call._call_lightning_module_hook(self.trainer, "on_fit_end")

    def take_log(self) -> bytes | None:
        """What the loggers were told in the unit just run, and before the first."""
        return self._recording.take()

    def dump(self) -> dict[str, Any]:
        """The checkpoint that Lightning would save now; tensors are the live ones."""
        self._data.lend(self.trainer)
        checkpoint: dict[str, Any] = self.trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        return checkpoint

    def restore(self, checkpoint: dict[str, Any], names: groups.Names) -> None:
        """Go on from a checkpoint whose weights the module has already, with these parameters in the optimizers."""
        self._data.lend(self.trainer)
        connector = self.trainer._checkpoint_connector
        connector._loaded_checkpoint = checkpoint
        with hushed() if self.hooked else nullcontext():  # which takes longer than all that it hushes
            connector.restore_datamodule()
            connector.restore_callbacks()
            connector.restore_precision_plugin_state()
            connector.restore_loops()
            groups.load(self.module, self.trainer.optimizers, names, checkpoint["optimizer_states"])
            connector.restore_lr_schedulers()
        connector._loaded_checkpoint = {}
        epoch = self._epoch
        for loop in (self._fit, epoch, epoch.automatic_optimization, epoch.manual_optimization, epoch.val_loop):
            loop.on_iteration_done()  # this is no restart: the loops go on where they were

    def call_module(self, hook: str, *args: Any) -> Any:
        """Call one of the module's hooks as Lightning does."""
        return self._get("trainer.call")._call_lightning_module_hook(self.trainer, hook, *args)

    def overrides(self, *hooks: str) -> bool:
        """Whether the module or a callback has one of these hooks of its own."""
        return any(self._overrides(owner, hook) for owner in [self.module, *self.callbacks] for hook in hooks)

    def module_overrides(self, hook: str) -> bool:
        """Whether the module has this hook of its own."""
        return self._overrides(self.module, hook)

    def _overrides(self, owner: Any, hook: str) -> bool:
        return hasattr(owner, hook) and bool(self._get("utilities.model_helpers").is_overridden(hook, owner))

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks that came with the trainable and the module."""
        return [callback for callback in self.trainer.callbacks if callback is not self._watcher]

    def dump_progress(self) -> dict[str, Any]:
        """What was logged so far, and what else a checkpoint lacks."""
        connector = self._connector
        return {
            "should_stop": self.trainer.should_stop and not self._fit._can_stop_early,  # and so is to stop later
            "ended": self._ended,
            "accumulate": self.trainer.accumulate_grad_batches,
            "clipping": (self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm),
            "epoch": results.dump(self._epoch._results),
            "measured": dict(self._epoch.val_loop._seen_batches_per_dataloader),
            "first_iteration": connector._first_loop_iter,
            "current_hook": connector._current_fx,
            **{name: results.pack(getattr(connector, f"_{name}")) for name in _LOGGED},
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Take up what `dump_progress` gave."""
        connector, device = self._connector, self.trainer.strategy.root_device
        self.trainer.should_stop, self.trainer.accumulate_grad_batches = state["should_stop"], state["accumulate"]
        self._ended = state["ended"]
        self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm = state["clipping"]
        module = self._get("trainer.connectors.logger_connector.result")
        results.restore(self._epoch._results, state["epoch"], module, self.trainer)
        self._epoch.val_loop._seen_batches_per_dataloader.update(state["measured"])
        connector._first_loop_iter, connector._current_fx = state["first_iteration"], state["current_hook"]
        for name in _LOGGED:
            setattr(connector, f"_{name}", results.unpack(state[name], device))
        self._metrics = connector._callback_metrics = _Noted(connector._callback_metrics)

    @property
    def gradients_count(self) -> bool:
        """Whether the gradients that there are make a difference to the next batch."""
        return bool(self._fit._should_accumulate()) or not self.module.automatic_optimization or self._gradients_seen

    @property
    def in_mid_epoch(self) -> bool:
        """Whether an epoch is begun and not over."""
        progress = self._fit.epoch_progress.current
        return bool(progress.ready > progress.completed)

    def close(self) -> None:
        """Call the module's and the callbacks' `teardown`; the DataModule's is the worker's to call."""
        self.trainer.datamodule = None
        self._get("trainer.call")._call_teardown_hook(self.trainer)

    # Setting up.

    def _set_up(self, plan: Plan, trainer_kwargs: Mapping[str, Any]) -> Any:
        kwargs = dict(trainer_kwargs)
        given = callbacks.working(callbacks.as_list(kwargs.pop("callbacks", None)), type(self.module).__name__)
        trainer = import_module(self._host).Trainer(
            **_DEFAULTS
            | kwargs
            | _placement(plan.device)
            | {
                "max_epochs": plan.epochs,
                "callbacks": [self._watcher, *given],
                "logger": self._recording.loggers,
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
        name, trainer = type(self.module).__name__, self.trainer
        mock = self._get("core.optimizer")._MockOptimizer  # stands in for none
        if not any(not isinstance(optimizer, mock) for optimizer in trainer.optimizers):
            raise NotTrainableError(f"{name}.configure_optimizers gave no optimizers. {_VALID}")
        groups.names_of(self.module, trainer.optimizers)
        self._check_schedules()
        callbacks.check_savers(trainer.callbacks, name)
        trainer.callbacks[:] = callbacks.working(trainer.callbacks, name)  # with those that the module brings

    def _check_schedules(self) -> None:
        """Raise NotTrainableError for a schedule that would run out of steps, and then fail the trial at its end."""
        for config in self.trainer.lr_scheduler_configs if self.module.automatic_optimization else ():
            laid_out = getattr(config.scheduler, "total_steps", None)
            if laid_out is None or config.interval != "step":
                continue
            steps = self.trainer.estimated_stepping_batches // config.frequency
            if laid_out < steps:
                raise NotTrainableError(
                    f"The {type(config.scheduler).__name__} of {type(self.module).__name__} is laid out for "
                    f"{laid_out} steps, and there will be {steps}: each shard ends with a batch of its own, so that an "
                    f"epoch has {self.trainer.num_training_batches} batches, more than a loader over all rows. Give it "
                    "total_steps=self.trainer.estimated_stepping_batches."
                )

    def _get(self, module: str) -> Any:
        return import_module(f"{self._host}.{module}")

    # Running.

    def _feed(self, work: UnitWork) -> Any:
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
        epoch.val_loop._max_batches = [0]  # also where it would because training is to stop
        if work.validation is not None:
            trainer.val_check_batch = done + len(work.train)
            self._validation.batches, self._validation.length = work.validation, len(work.validation)
            epoch.val_loop._max_batches = [len(work.validation)]
        return fetcher

    def _advance(self, fetcher: Any, validates: bool) -> None:
        try:
            self._epoch.advance(fetcher)
        except StopIteration:
            raise NotTrainableError(
                f"{type(self.module).__name__}.on_train_batch_start returned -1, which skips the rest of an epoch; "
                "by hops every batch of every shard is trained."
            ) from None
        kept = gradients(self.module) if validates and self.gradients_count else {}
        self._epoch.on_advance_end(fetcher)
        if kept:  # a validation in mid-epoch, which a plain fit has not, may have let go of them
            load_gradients(self.module, kept)

    def _report(self, work: UnitWork, ended: bool) -> dict[str, float]:
        logged = {name: self._metrics[name] for name in self._metrics.written}
        if not ended:  # Lightning reduces what is logged per epoch only at its end: take the epoch so far
            logged |= self._epoch._results.metrics(on_step=False)["callback"]
        metrics = {name: float(value) for name, value in logged.items() if value.numel() == 1}
        loss = _weighted_mean(self._watcher.losses, work.train.sizes)
        if loss is not None:
            loss *= self.trainer.accumulate_grad_batches
            if "train_loss" not in metrics or not math.isfinite(loss):
                metrics["train_loss"] = loss
        return metrics

    @property
    def _connector(self) -> Any:
        return self.trainer._logger_connector


_LOGGED = ("callback_metrics", "logged_metrics", "progress_bar_metrics")

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


def _raiser(error: BaseException) -> str:
    """The name of the module whose code raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals["__name__"])


def _weighted_mean(losses: Sequence[torch.Tensor | None], rows: Sequence[int]) -> float | None:
    """The mean over rows; a batch whose `training_step` gave no loss does not count, and None if no batch has one."""
    counted = [(loss, n) for loss, n in zip(losses, rows, strict=False) if loss is not None]
    if not counted:
        return None
    values = torch.stack([loss.float().mean() for loss, _ in counted]).tolist()  # one wait for the device
    return math.fsum(value * n for value, (_, n) in zip(values, counted, strict=True)) / sum(n for _, n in counted)


def _placement(device: str) -> dict[str, Any]:
    kind, _, index = device.partition(":")
    return {"accelerator": "gpu" if kind == "cuda" else kind, "devices": [int(index)] if index else 1}
