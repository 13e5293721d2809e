"""`Cerebro`: the executor that a user makes once, and runs many searches on.

(Above 400 lines: a hundred of them are its arguments and what each means.)
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import time
from types import TracebackType
from typing import Any

from cerebro_tune.arguments import (
    DATA_FILE,
    at_least,
    check_rows,
    edited_since,
    listed,
    one_of,
    remove_untouched,
    run_folder,
)
from cerebro_tune.budget import state_budget
from cerebro_tune.crew import Grower
from cerebro_tune.data.base import RowSet
from cerebro_tune.data.index import IndexedDataset
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.feed import Feed
from cerebro_tune.given import GivenData, take
from cerebro_tune.journal import NAME as JOURNAL
from cerebro_tune.journal import Journal, read_journal, remote_kind
from cerebro_tune.loading import check_keys
from cerebro_tune.manifest import about_run, as_before, check_same, environment, manifest_of, open_run, refusal
from cerebro_tune.policy import Policy
from cerebro_tune.progress import Progress, make_progress
from cerebro_tune.recovery import Given, Replayed
from cerebro_tune.results import Results, TrialResult
from cerebro_tune.run import Run
from cerebro_tune.settings import RunSettings, TrainAll, Tuner
from cerebro_tune.sharedrun import Caller, SharedRun
from cerebro_tune.signals import interruptible
from cerebro_tune.store import StateStore
from cerebro_tune.trainable import Config, Plan, Recipe, as_recipe
from cerebro_tune.units import Units
from cerebro_tune.workers.base import Workers, backend_of, ship
from cerebro_tune.workers.messages import RunSpec


class Cerebro:
    """Trains many trials side by side on few workers by model hopper parallelism.

    Args:
        train: The training set: a `ShardedDataset` or the path of one, what `ShardedDataset.index` made, a map-style
            torch Dataset, or a DataLoader of one.
        validation: The validation set, likewise; without one no metrics of validation are reported.
        datamodule: Instead of both: a LightningDataModule, whose loaders tell what to read and how. `prepare_data` is
            called here, once, and `setup("fit")` here and in every worker.
        num_shards: Of a training set that is not sharded yet; None for 8, or for one per worker if those are more.
        epochs: Passes over the training set. A config's own `epochs` wins, unless the model itself takes that key.
        batch_size: Rows per batch; None for the given loader's, or 32. A config's own `batch_size` wins, unless the
            model itself takes that key.
        loader: How batches are made; each setting wins over a given loader's. As torch's DataLoader has them:
            `num_workers`, `pin_memory`, `prefetch_factor`, `timeout`, `worker_init_fn`, `collate_fn`. `weights` (one
            per row, or the name of a column or attribute) draws rows of a shard in proportion, with `replacement`
            unless that is False. `batch_sampler` is called as torch's BatchSampler, (rows, batch_size, drop_last), for
            each shard. `last_batch`: "spread" (near-equal batches), "keep" (a short last one) or "drop". `transform` is
            called with each batch. `on_row_error`: "raise" or "skip". Of tables: `columns`, `as_dict`.
        workers: None for one per GPU and `workers_per_device`, or one per core where there is no GPU; on a Ray that
            runs, as many as fit.
        devices: "auto", or torch devices: "cpu", "cuda", ["cuda:0", "cuda:1"].
        backend: "local" (a process per worker), "inline" (this process: for debugging) or "ray" (on a Ray cluster).
        resources_per_worker: Of backend "ray"; None for {"CPU": 1}. With a share of a GPU a worker computes there.
        placement: "shared": every worker holds every shard; "pinned": shard i belongs to worker i mod n, so that every
            unit hops; "auto": shared on one machine, since all its workers map the same files, and pinned on several.
        live_trials: How many trials train side by side; None is twice the workers.
        policy: "auto", "random" (the paper's), "fixed" (the run repeats exactly), or a `cerebro_tune.policy.Policy`.
        report_every: "unit" or "epoch".
        validation_rows: Rows measured after a unit in mid-epoch: "auto", "all" or a number; an epoch's end has all.
        keep: "best" (each trial's best and last checkpoint), "last" or "none".
        state_memory: Memory for the states of trials: "50%" of what there is, "8GB", or bytes.
        max_failures: How many workers may die in a trial's own units before it counts as failed.
        unit_deadline_s: Seconds after which a unit hangs, and its worker is replaced; None for five times the slowest
            unit of its trial so far, and at least 30.
        run_dir: Where runs write, each into its own folder; None for `runs/<time>-<name>`, which nobody takes up.
        resume: What `fit` does with the folder that an earlier run of this `run_dir` has left: "auto" goes on where
            that ended, or returns its results, and is refused where that run was of something else; "never" begins a
            new one beside it; "must" does not begin one.
        durable_every: Units of a trial between two states on disk, from which a run goes on; None for one epoch.
        seed: Of everything random in a run.
        progress: None for what suits the terminal, notebook or pipe; False for silence.
        trace: Write `trace.json`, in the Chrome trace event format, into the run's folder.

    Use it as a context manager, or let `fit` start the workers and `close` end them. One run at a time.
    """

    def __init__(
        self,
        train: Any = None,
        validation: Any = None,
        *,
        datamodule: Any = None,
        num_shards: int | None = None,
        epochs: int = 1,
        batch_size: int | None = None,
        loader: Mapping[str, Any] | None = None,
        workers: int | None = None,
        devices: str | Sequence[str] = "auto",
        workers_per_device: int = 1,
        backend: str = "local",
        resources_per_worker: Mapping[str, float] | None = None,
        placement: str = "auto",
        live_trials: int | None = None,
        policy: str | Policy = "auto",
        report_every: str = "unit",
        validation_rows: int | str = "auto",
        keep: str = "best",
        state_memory: str | int = "50%",
        max_failures: int = 2,
        unit_deadline_s: float | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: str = "auto",
        durable_every: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        trace: bool = False,
    ) -> None:
        per_device = at_least(1, workers_per_device=workers_per_device)
        self.devices, self._make_workers = backend_of(backend).plan(workers, devices, per_device, resources_per_worker)
        self.backend = backend
        self.seed, self.trace = at_least(0, seed=seed), trace
        self._num_shards = None if num_shards is None else at_least(1, num_shards=num_shards)
        self._loader = check_keys(loader or {})
        self.epochs = at_least(1, epochs=epochs)
        self._batch_size = None if batch_size is None else at_least(1, batch_size=batch_size)
        self.placement = one_of(placement=placement, valid=("auto", "shared", "pinned"))
        self.live_trials = 2 * len(self.devices) if live_trials is None else at_least(1, live_trials=live_trials)
        named = isinstance(policy, str)
        self.policy = one_of(policy=policy, valid=("auto", "random", "fixed")) if named else policy
        self.report_every = one_of(report_every=report_every, valid=("unit", "epoch"))
        self._validation_rows = check_rows(validation_rows)
        self.keep = one_of(keep=keep, valid=("best", "last", "none"))
        self.state_memory_bytes = state_budget(state_memory)
        self.max_failures = at_least(0, max_failures=max_failures)
        if unit_deadline_s is not None and not unit_deadline_s > 0:
            raise ConfigurationError(f"unit_deadline_s is {unit_deadline_s!r}; it must be a number of seconds above 0.")
        self._unit_deadline_s = unit_deadline_s
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.resume = one_of(resume=resume, valid=("auto", "never", "must"))
        self._durable_every = None if durable_every is None else at_least(1, durable_every=durable_every)
        self._runs = 0
        self._progress = progress
        self._workers: Workers | None = None
        self._current: Run | None = None
        self._grower = Grower()
        self._shared = SharedRun()
        self._taking = threading.Lock()
        self._data: GivenData | None = None
        if not train is validation is datamodule is None:
            self.use_data(train, validation, datamodule)

    def use_data(self, train: Any = None, validation: Any = None, datamodule: Any = None) -> int:
        """Give an executor that was made without data its data; one that has some takes no other.

        Returns the rows per batch that the loaders given ask for, unless the executor's own arguments do.
        """
        with self._taking:  # fits in several threads bring the same data
            if self._data is None or not self._data.is_of(datamodule):
                found = take(
                    train, validation, datamodule, self._num_shards, len(self.devices), self.seed, self._loader
                )
                if self._data is not None:
                    self._data.check_same(found)
                    found.close()
                    return self._batch_size or found.batch_size
                self._check_placement(found.train.data.num_shards)
                self._data = found
            return self.batch_size

    def _check_placement(self, shards: int) -> None:
        workers = len(self.devices)
        if self.placement == "pinned" and workers > shards:
            raise ConfigurationError(
                f"{shards} shards cannot be pinned to {workers} workers: each needs one. "
                f"Make the set with num_shards >= {workers}, or use placement='shared'."
            )

    def plan(self, epochs: int, batch_size: int) -> Plan:
        """The horizon of a trial as this process sees it: for a model that is built here."""
        rows = tuple(self.train.rows(shard) for shard in range(self.train.num_shards))
        batches = Feed(self._given.for_run({}), self.seed, "cpu").batch_counts(batch_size)
        module = self._given.module
        return Plan(
            epochs, batch_size, rows, shard_batches=batches, datamodule=None if module is None else module.module
        )

    @property
    def current(self) -> Run | None:
        """The run that is on, of which trials can be paused, resumed, stopped and decided; None between runs."""
        return self._current

    @property
    def has_data(self) -> bool:
        """Whether the data is known: given to the executor, or to a fit."""
        return self._data is not None

    @property
    def train(self) -> RowSet:
        """The training set."""
        return self._given.train.data

    @property
    def validation(self) -> RowSet | None:
        """The validation set."""
        return None if self._given.validation is None else self._given.validation.data

    @property
    def loader(self) -> dict[str, Any]:
        """How batches are made: the settings of a given loader, and those of `loader=`, which win."""
        return {**self._given.train.settings, **self._loader}

    @property
    def batch_size(self) -> int:
        """Rows per batch, where neither trainable nor config say otherwise."""
        return self._batch_size or self._given.batch_size

    @property
    def validation_rows(self) -> int | None:
        """Rows measured after a unit in mid-epoch; None where there is no validation set."""
        if self.validation is None:
            return None
        everything = self.validation.num_rows
        if self._validation_rows == "auto":
            return min(everything, max(256, self.train.rows(0) // 8))
        return everything if isinstance(self._validation_rows, str) else min(everything, self._validation_rows)

    @property
    def _given(self) -> GivenData:
        if self._data is None:
            raise ConfigurationError(
                "There is nothing to train on: give Cerebro train (the path of a set, a ShardedDataset, a Dataset or a "
                "DataLoader) or datamodule."
            )
        return self._data

    def units(self, epochs: float) -> Units:
        """Epochs in units: what a tuner calls `max_t` or `grace_period` when every unit is reported."""
        return Units(round(epochs * self.train.num_shards))

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
        run = self.run(trainable, TrainAll(), metric=metric, mode=mode, given=chosen)
        try:
            for config in chosen[run.taken_up :]:
                run.add(config)
            run.end_search()
        except BaseException:
            self.give_up(run)
            raise
        return self.search(run)

    def search(self, run: Run) -> Results:
        """Drive a run to its end, or to Ctrl-C, and say in one line where the time went."""
        with interruptible(run):
            results = self.drive(run)
        if self._progress is not False:
            # Workers of the inline backend take turns: that they idle is no news.
            print(results.closing_line(hint=self.backend != "inline"))
        return results

    def train_one(
        self,
        trainable: Any,
        config: Config | None = None,
        *,
        caller: Caller | None = None,
        metric: str | None = None,
        mode: str = "min",
    ) -> TrialResult:
        """Train one trial to its end, from any thread, next to those that other threads train by this method.

        The first call begins a run, calls that come while it lasts join it, the last to leave ends it. `caller`
        says who answers the trial's reports; None lets it go on to its end. They may train different things.
        """
        recipe = self.recipe(trainable)
        return self._shared.train(
            self, recipe, dict(config or {}), caller or Caller(TrainAll().on_report), metric, mode
        )

    def run(
        self,
        trainable: Any,
        tuner: Tuner,
        *,
        metric: str | None = None,
        mode: str = "min",
        keep: str | None = None,
        policy: str | Policy | None = None,
        hosted: bool = False,
        given: Given | None = None,
        folder: Path | None = None,
    ) -> Run:
        """Prepare a run that `tuner` decides in; the integrations' way in. Add trials, then `drive` it.

        `keep` and `policy` win over the executor's. In a run that is `hosted` the tuner has a loop of its own: it
        decides how many trials are live, shows progress, calls `Run.begin` and `Run.turn`, and `give_up` at the end.
        With `given` it is one that a later call takes up, if this one died: it has the trials then that it had, of
        which `given` says what they are, see `recovery.retell`. `folder` is where it is then, if not in its turn.
        """
        if self._current is not None:
            raise ConfigurationError("This executor has a run in progress; a second one needs an executor of its own.")
        one_of(mode=mode, valid=("min", "max"))
        if metric is not None and not isinstance(metric, str):
            raise ConfigurationError(f"metric is {metric!r}; it must be the name of one metric.")
        recipe = self.recipe(trainable)
        if self._workers is not None and edited_since(self._started_s):
            self.close()
        self.start()
        assert self._workers is not None, "started"
        if folder is None:
            in_turn = isinstance(given, Sequence)  # others are looked for by their tuner
            folder = run_folder(self.run_dir, recipe.name, self._runs, self.resume if in_turn else "never")
        journal = None
        try:
            settings = replace(
                self._settings(self._workers, recipe, metric, mode, folder),
                keep=keep or self.keep,
                policy=policy or self.policy,
                live_trials=None if hosted else self.live_trials,
            )
            taken_up = self.run_dir is not None  # one without a name is not, and may lie anywhere
            if not hosted and (taken_up or not remote_kind(folder)):
                journal = Journal(folder, self._workers.clock)
            run = self._run_of(
                settings, recipe, tuner, journal, given, make_progress(False if hosted else self._progress)
            )
        except BaseException:
            if journal is not None:
                journal.close()
            if not (journal.rows if journal is not None else (folder / JOURNAL).exists()):
                remove_untouched(folder)
            raise
        self._runs += 1
        self._current = self._grower.run = run
        return run

    def _run_of(
        self,
        settings: RunSettings,
        recipe: Recipe,
        tuner: Tuner,
        journal: Journal | None,
        given: Given | None,
        progress: Progress,
    ) -> Run:
        """The run, brought to where its journal ends if it has one already."""
        assert self._workers is not None, "started"
        if journal is not None:
            number = len(given) if isinstance(given, Sequence) else None
            about = about_run(settings, recipe, self._fingerprints, self.loader, number)
            but = ("trainable", "source") if isinstance(given, Mapping) else ()  # its trials may bring their own
            settings = open_run(journal, about, environment(self._workers.threads), settings, but)
            if given is not None and self.run_dir is not None:
                settings = replace(settings, durable_every=self._durable_every or settings.shards)
        if isinstance(self.train, IndexedDataset) and not (journal and journal.rows):
            self.train.manifest.write(settings.run_dir / DATA_FILE)
        store = StateStore(self.state_memory_bytes, settings.run_dir / "spill")
        run = Run(self._workers, store, recipe, settings, tuner, progress, journal)
        if journal is not None and given is not None and journal.rows:
            try:
                run.take_up(given)
            except ConfigurationError as error:
                raise refusal(settings.run_dir, [str(error)]) from error
        return run

    @property
    def _fingerprints(self) -> dict[str, str]:
        found = {"train": self.train.fingerprint}
        return found if self.validation is None else found | {"validation": self.validation.fingerprint}

    def replay(self, run_dir: str | os.PathLike[str], trainable: Any, trial: str) -> Replayed:
        """Train one trial of a run again, alone, in its recorded order of visits, and compare the state of every unit.

        The executor needs the sets, seed and settings of that run; ConfigurationError lists what differs. Nothing is
        written, and nothing of the folder is executed.
        """
        if self._current is not None:
            raise ConfigurationError("This executor has a run in progress; a replay needs an executor of its own.")
        folder = Path(run_dir)
        rows = read_journal(folder)
        recipe = self.recipe(trainable)
        self.start()
        assert self._workers is not None, "started"
        manifest = manifest_of(rows, folder)
        before = manifest["about"]
        with tempfile.TemporaryDirectory() as scratch:
            settings = self._settings(self._workers, recipe, before["metric"], before["mode"], Path(scratch))
            settings = replace(settings, keep=before["keep"])
            about = about_run(settings, recipe, self._fingerprints, self.loader, None)
            check_same(before, about, folder, but=("configs",))
            settings = as_before(settings, manifest)
            store = StateStore(self.state_memory_bytes, settings.run_dir / "spill")
            run = Run(self._workers, store, recipe, settings, TrainAll(), make_progress(False))
            self._current = self._grower.run = run
            try:
                return run.replay(rows, trial)
            finally:
                run.close()
                self._current = self._grower.run = None

    def drive(self, run: Run) -> Results:
        """Run to the end, on this thread."""
        try:
            results = run.drive()
        except BaseException:
            self.give_up(run)
            raise
        self._current = self._grower.run = None
        return results

    def recipe(self, trainable: Any) -> Recipe:
        """What is to be trained, made uniform; a DataModule that comes with it is this executor's data."""
        recipe = as_recipe(trainable)
        if recipe.datamodule is not None:
            self.use_data(datamodule=recipe.datamodule)
        return recipe

    def start(self) -> None:
        """Start the workers, unless they are up."""
        if self._workers is None:
            self._workers = self._make_workers()
            self._started_s = time()
            # Not a bound method of this object: an executor that nobody has any more ends its workers.
            self._end_workers = weakref.finalize(self, self._workers.close)
            try:
                self._workers.start(self._grower.grow)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the workers and leave no process, thread, descriptor or shared memory behind.

        Calls of `train_one` that are waiting in other threads raise.
        """
        self._shared.interrupt()
        if self._workers is not None:
            self._workers = None
            self._end_workers()
        if self._data is not None:
            self._data.close()

    def __enter__(self) -> Cerebro:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def give_up(self, run: Run) -> None:
        """End a run where it is; its folder goes, if there is nothing in it."""
        try:
            run.close()
        finally:
            self._current = self._grower.run = None
        if not run.units and not run.taken_up:
            remove_untouched(run.settings.run_dir)

    def _settings(self, workers: Workers, recipe: Recipe, metric: str | None, mode: str, folder: Path) -> RunSettings:
        spec = RunSpec(
            recipe=ship(recipe, f"{recipe.name}"),
            data=ship(self._given.for_run(recipe.loader), "The data set, or the loader's transform or collate_fn,"),
            validation_rows=self.validation_rows,
            report_every=self.report_every,
            seed=self.seed,
            shard_rows=tuple(self.train.rows(shard) for shard in range(self.train.num_shards)),
        )
        return RunSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            policy=self.policy,
            live_trials=self.live_trials,
            max_failures=self.max_failures,
            unit_deadline_s=self._unit_deadline_s,
            pinned=workers.pinned(self.placement, self.train.num_shards),
            keep=self.keep,
            metric=metric,
            mode=mode,
            trace=self.trace,
            spec=spec,
            run_dir=folder,
        )
