"""`Cerebro`: the executor that a user makes once, and runs many searches on."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import time
from types import TracebackType
from typing import Any

from cerebro_tune.arguments import (
    at_least,
    batch_form,
    check_alike,
    cores,
    dataset,
    devices_of,
    edited_since,
    listed,
    new_folder,
    one_of,
)
from cerebro_tune.budget import state_budget
from cerebro_tune.data import ShardedDataset
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.policy import Policy
from cerebro_tune.progress import make_progress
from cerebro_tune.results import Results, TrialResult
from cerebro_tune.run import Run
from cerebro_tune.settings import Report, RunSettings, Tuner
from cerebro_tune.store import BufferRef, StateStore
from cerebro_tune.trainable import Config, Recipe, as_recipe
from cerebro_tune.units import Decision
from cerebro_tune.workers.base import Workers, make_workers, ship
from cerebro_tune.workers.messages import RunSpec


class Cerebro:
    """Trains many trials side by side on few workers by model hopper parallelism.

    Args:
        train: The training set: a `ShardedDataset` or the path of one.
        validation: The validation set, likewise; without one no metrics of validation are reported.
        epochs: Passes over the training set. A config's own `epochs` wins, unless the model itself takes that key.
        batch_size: Rows per batch. A config's own `batch_size` wins, unless the model itself takes that key.
        loader: How batches are made: `columns`, `as_dict`, `transform`, `collate_fn`, and
            `last_batch` ("spread": near-equal batches; "keep": a short last one; "drop").
        workers: None for one per GPU and `workers_per_device`, or one per core where there is no GPU.
        devices: "auto", or torch devices: "cpu", "cuda", ["cuda:0", "cuda:1"].
        backend: "local" (a process per worker) or "inline" (this process: for debugging).
        placement: "shared": every worker holds every shard; "pinned": shard i belongs to worker i mod n, so that every
            unit hops; "auto": shared, since all workers of a machine map the same files.
        live_trials: How many trials train side by side; None is twice the workers.
        policy: "auto", "random" (the paper's), "fixed" (the run repeats exactly), or a `cerebro_tune.policy.Policy`.
        report_every: "unit" or "epoch".
        validation_rows: Rows measured after a unit in mid-epoch: "auto", "all" or a number; an epoch's end has all.
        keep: "best" (each trial's best and last checkpoint), "last" or "none".
        state_memory: Memory for the states of trials: "50%" of what there is, "8GB", or bytes.
        max_failures: How many workers may die in a trial's own units before it counts as failed.
        run_dir: Where runs write, each into its own folder; None for `runs/`.
        seed: Of everything random in a run.
        progress: None for what suits the terminal, notebook or pipe; False for silence.
        trace: Write `trace.json`, in the Chrome trace event format, into the run's folder.

    Use it as a context manager, or let `fit` start the workers and `close` end them. One run at a time.
    """

    def __init__(
        self,
        train: str | os.PathLike[str] | ShardedDataset,
        validation: str | os.PathLike[str] | ShardedDataset | None = None,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        loader: Mapping[str, Any] | None = None,
        workers: int | None = None,
        devices: str | Sequence[str] = "auto",
        workers_per_device: int = 1,
        backend: str = "local",
        placement: str = "auto",
        live_trials: int | None = None,
        policy: str | Policy = "auto",
        report_every: str = "unit",
        validation_rows: int | str = "auto",
        keep: str = "best",
        state_memory: str | int = "50%",
        max_failures: int = 2,
        run_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        progress: bool | None = None,
        trace: bool = False,
    ) -> None:
        self.train = dataset("train", train)
        self.validation = None if validation is None else dataset("validation", validation)
        self.form, self.last_batch = batch_form(loader or {}, self.train)
        self.form.validate(self.train.schema)
        if self.validation is not None:
            check_alike(self.train, self.validation, self.form)
        self.epochs, self.batch_size = at_least(1, epochs=epochs), at_least(1, batch_size=batch_size)
        self.devices = devices_of(workers, devices, at_least(1, workers_per_device=workers_per_device))
        self.backend = backend
        one_of(placement=placement, valid=("auto", "shared", "pinned"))
        self.placement = "shared" if placement == "auto" else placement
        if self.placement == "pinned" and len(self.devices) > self.train.num_shards:
            raise ConfigurationError(
                f"{self.train.num_shards} shards cannot be pinned to {len(self.devices)} workers: each needs one. "
                f"Write the set with num_shards >= {len(self.devices)}, or use placement='shared'."
            )
        self.live_trials = 2 * len(self.devices) if live_trials is None else at_least(1, live_trials=live_trials)
        self.policy = (
            policy if not isinstance(policy, str) else one_of(policy=policy, valid=("auto", "random", "fixed"))
        )
        self.report_every = one_of(report_every=report_every, valid=("unit", "epoch"))
        self.validation_rows = self._subset_rows(validation_rows)
        self.keep = one_of(keep=keep, valid=("best", "last", "none"))
        self.state_memory_bytes = state_budget(state_memory)
        self.max_failures = at_least(0, max_failures=max_failures)
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.seed, self.trace = at_least(0, seed=seed), trace
        self._progress = progress
        self._threads = max(1, len(cores()) // len(self.devices))
        self._workers: Workers | None = None
        self._current: Run | None = None
        self._grower = _Grower()

    def units(self, epochs: float) -> int:
        """Epochs in units: what a tuner calls `max_t` or `grace_period` when every unit is reported."""
        return round(epochs * self.train.num_shards)

    def fit(
        self, trainable: Any, configs: Iterable[Config] | None = None, *, metric: str | None = None, mode: str = "min"
    ) -> Results:
        """Train every config to its end; Ctrl-C returns the results so far.

        A unit that raises fails its trial, with the traceback in `TrialResult.error`; the others go on.
        """
        chosen = [{}] if configs is None else listed(configs)
        if not chosen:
            raise ConfigurationError(
                "configs is empty: there is nothing to train. Without hyperparameters leave it out."
            )
        run = self.run(trainable, _TrainAll(), metric=metric, mode=mode)
        try:
            for config in chosen:
                run.add(config)
            run.end_search()
        except BaseException:
            self._end(run)
            raise
        with _interruptible(run):
            results = self.drive(run)
        if self._progress is not False:
            # Workers of the inline backend take turns: that they idle is no news.
            hint = results.shares.hint if self.backend != "inline" else None
            begin = "Interrupted; the results so far. " if results.interrupted else ""
            print(f"{begin}{results.shares}" + (f" ({hint})" if hint else ""))
        return results

    def run(self, trainable: Any, tuner: Tuner, *, metric: str | None = None, mode: str = "min") -> Run:
        """Prepare a run that `tuner` decides in; the integrations' way in. Add trials, then `drive` it."""
        if self._current is not None:
            raise ConfigurationError("This executor has a run in progress; a second one needs an executor of its own.")
        one_of(mode=mode, valid=("min", "max"))
        if metric is not None and not isinstance(metric, str):
            raise ConfigurationError(f"metric is {metric!r}; it must be the name of one metric.")
        recipe = as_recipe(trainable)
        if self._workers is not None and edited_since(self._started_s):
            self.close()
        self.start()
        assert self._workers is not None, "started"
        settings = self._settings(recipe, metric, mode)
        store = StateStore(self.state_memory_bytes, settings.run_dir / "spill")
        run = Run(self._workers, store, recipe, settings, tuner, make_progress(self._progress))
        self._current = self._grower.run = run
        return run

    def drive(self, run: Run) -> Results:
        """Run to the end, on this thread."""
        try:
            results = run.drive()
        except BaseException:
            self._end(run)
            raise
        self._current = self._grower.run = None
        return results

    def start(self) -> None:
        """Start the workers, unless they are up."""
        if self._workers is None:
            self._workers = make_workers(self.backend, self.devices, self._threads)
            self._started_s = time()
            self._workers.start(self._grower.grow)
            # Not a bound method of this object: an executor that nobody has any more ends its workers.
            self._end_workers = weakref.finalize(self, self._workers.close)

    def close(self) -> None:
        """End the workers and leave no process, thread, descriptor or shared memory behind."""
        if self._workers is not None:
            self._workers = None
            self._end_workers()

    def __enter__(self) -> Cerebro:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self, run: Run) -> None:
        """Give a run up."""
        run.close()
        self._current = self._grower.run = None
        if not run.units:
            with suppress(OSError):  # it has something in it after all
                run.settings.run_dir.rmdir()

    def _settings(self, recipe: Recipe, metric: str | None, mode: str) -> RunSettings:
        spec = RunSpec(
            recipe=ship(recipe, f"{recipe.name}"),
            form=ship(self.form, "The loader's transform or collate_fn"),
            train=str(self.train.path.absolute()),
            validation=None if self.validation is None else str(self.validation.path.absolute()),
            validation_rows=self.validation_rows,
            report_every=self.report_every,
            last_batch=self.last_batch,
            seed=self.seed,
            shard_rows=tuple(self.train.rows(shard) for shard in range(self.train.num_shards)),
        )
        return RunSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            policy=self.policy,
            live_trials=self.live_trials,
            max_failures=self.max_failures,
            pinned=self.placement == "pinned",
            keep=self.keep,
            metric=metric,
            mode=mode,
            trace=self.trace,
            spec=spec,
            run_dir=new_folder(self.run_dir, recipe.name),
        )

    def _subset_rows(self, wanted: int | str) -> int | None:
        if self.validation is None:
            return None
        everything = self.validation.num_rows
        if wanted == "auto":
            return min(everything, max(256, self.train.rows(0) // 8))
        if wanted == "all":
            return everything
        if isinstance(wanted, str):
            raise ConfigurationError(f'validation_rows is {wanted!r}; valid: "auto", "all" or a number of rows.')
        return min(everything, at_least(1, validation_rows=wanted))


class _Grower:
    """Answers workers that need a buffer, from the run in progress; it outlives runs, and keeps no executor alive."""

    run: Run | None = None

    def grow(self, trial: str, nbytes: int) -> BufferRef:
        assert self.run is not None, "a worker runs a unit, and there is no run"
        return self.run.grow(trial, nbytes)


class _TrainAll:
    """The tuner of `fit`: everything goes on to its end."""

    def on_report(self, trial_id: str, report: Report) -> Decision:
        return Decision.CONTINUE

    def on_end(self, result: TrialResult) -> None:
        return


@contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """Let the first Ctrl-C end the run with its results, and a second one interrupt as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        run.interrupt()

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
