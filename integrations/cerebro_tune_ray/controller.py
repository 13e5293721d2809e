"""Ray Tune's controller, of which only what runs a trial is replaced. Private to Ray, see `versions`.

The searcher, the scheduler, callbacks, loggers, stoppers, the experiment's state and what becomes of a result are
Ray's, unchanged; the methods below are those that would send for an actor. Where Ray waits for its actors, the run goes
on.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray.exceptions import RayTaskError
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint, ResumeConfig
from ray.tune.execution.experiment_state import _find_newest_experiment_checkpoint
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, ResourceChangingScheduler, TrialScheduler

from cerebro_tune.errors import ConfigurationError, MissingHostError, TrialFailedError, UnknownMetricError
from cerebro_tune.warn import warn_user
from cerebro_tune_ray.horizons import horizon_warning
from cerebro_tune_ray.record import Record
from cerebro_tune_ray.recorded import Recorded
from cerebro_tune_ray.restoring import check_resume, latest, mark, marked, rehearse, reports_since, tell_searcher
from cerebro_tune_ray.rider import Result
from cerebro_tune_ray.riders import Riders
from cerebro_tune_ray.rows import Standing
from cerebro_tune_ray.schedulers import check_lengths, compares, lacking
from cerebro_tune_ray.score import Judged
from cerebro_tune_ray.snapshot import Snapshot
from cerebro_tune_ray.versions import TESTED

_TICK_S = 0.2
"""How often Ray gets to look at its clock, for time budgets, interrupts and progress."""

_STORAGE_LOG = "ray.train._internal.storage"
Board = Callable[["HopController"], Riders]
"""Makes the trials of a controller."""


class HopController(TuneController):
    """Ray's controller with trials that hop."""

    _snapshots = False
    """Whether Ray has written the experiment's state."""
    _record: Record | None = None

    def __init__(self, board: Board, **kwargs: Any) -> None:
        scheduler = kwargs.get("scheduler") or FIFOScheduler()
        _check_scheduler(scheduler)
        self.compares = compares(scheduler)
        self._told = Recorded(Judged(scheduler))
        self._riders = board(self)
        self._told.file = self._riders.file
        self._resuming: list[Trial] = []
        self._broken: Exception | None = None
        resuming = kwargs.get("resume_config") if _has_state(kwargs["storage"]) else None  # with none Ray begins anew
        self._record = self._open_record(kwargs["storage"], anew=resuming is None)
        super().__init__(**{**kwargs, "scheduler": self._told, "resume_config": resuming})
        if self._broken is not None:  # which Ray logs, and begins anew
            raise self._broken
        self._told.record = self._riders.record = self._record
        self._actor_manager = _NoActors(self._riders)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for name in ("_riders", "_told", "_resuming", "_broken", "_record", "compares"):
            del state[name]
        return state

    # What outlives this process.

    def _open_record(self, storage: Any, anew: bool) -> Record | None:
        """The record in the experiment's folder, if that is on this machine."""
        if not isinstance(storage.storage_filesystem, LocalFileSystem):
            return None
        executor = self._riders.executor
        about = {"trainable": self._riders.name, "report_every": executor.report_every, "seed": executor.seed}
        if executor.has_data:
            about["shards"] = executor.train.num_shards
        return Record(Path(storage.experiment_fs_path), about, anew)

    def save_to_dir(self) -> None:
        """Ray's own, once the disk has the record, with a mark in the searcher's state: up to which call it goes."""
        if self._record is None:
            super().save_to_dir()
            return
        self._record.secure()
        mark(self._search_alg, self._record.count)
        super().save_to_dir()
        self._record.keep(Path(self._storage.experiment_driver_staging_path).glob(f"*{self._session_str}.*"))

    def resume(self, resume_config: Any) -> None:
        """Take up an experiment whose driver has died, with the scheduler as it was, and every trial where it was."""
        try:
            if self._record is None or not self._record.count:
                raise ConfigurationError(
                    f"The experiment in {self.experiment_path} has no record of its scheduler and trials, which lies "
                    "in its folder where that is on this machine: it can go on in stock Ray, from its checkpoints."
                )
            check_resume(resume_config)
            self._record.give_back()
            self._scheduler_alg = FIFOScheduler()  # Ray adds the trials as if they were new
            super().resume(ResumeConfig())
            self._scheduler_alg = self._told
            self._take_up(self._record)
            self._told.record = self._record
            self._try_again(resume_config.errored)
        except Exception as error:
            self._broken = error
            raise

    def snapshot_of(self, standing: Standing) -> Snapshot:
        """What a scheduler that is told again what it was told may keep of a trial."""
        return self._riders.snapshot_of(standing)

    def _take_up(self, record: Record) -> None:
        ended = {trial for trial in self._trials if trial.is_finished()}
        known = {trial.trial_id: trial for trial in self._trials}
        record.mend()
        calls, told = record.calls(), marked(self._search_alg, record)
        started = list(dict.fromkeys(call.trial for call in calls if call.kind == "start"))
        self._riders.started = len(started)
        rehearsal = rehearse(self, self._told, record, known)
        tell_searcher(self._search_alg, calls[told:], {call.trial for call in calls[:told]})
        for trial in ended:
            if not trial.is_finished():  # stopped by no scheduler: by a time budget, say
                trial.status = Trial.TERMINATED
        sets = {
            Trial.PENDING: self._pending_trials, Trial.RUNNING: self._pending_trials, Trial.PAUSED: self._paused_trials,
            Trial.TERMINATED: self._stopped_trials, Trial.ERROR: self._failed_trials,
        }  # fmt: skip
        for each in (*sets.values(), self._running_trials, self._live_trials):
            each.clear()
        self._trials[:] = rehearsal.trials
        for trial in self._trials:
            sets[trial.status].add(trial)
            if not trial.is_finished():
                self._live_trials.add(trial)
            if trial.status != Trial.TERMINATED and trial.trial_id in started:
                standing = latest(record, trial)
                heard = reports_since(standing, trial, calls)
                self._riders.put_back(trial, started.index(trial.trial_id), standing, heard)
            self._mark_trial_to_checkpoint(trial)  # Ray's state may not know it
        self._riders.record = record
        self._riders.clear_out(record.standings())
        running = [trial for trial in self._trials if trial.status == Trial.RUNNING]
        self._resuming = sorted(running, key=lambda trial: rehearsal.last[trial.trial_id])
        for trial in running:
            trial.status = Trial.PENDING
        self._pending_trials_list = [trial for trial in self._trials if trial in self._pending_trials]

    def _try_again(self, how: str) -> None:
        """Have trials that failed go on from where they stood, or begin anew as new ones, if that is asked for."""
        for trial in list(self._failed_trials) if how != ResumeConfig.ResumeType.SKIP else ():
            if how == ResumeConfig.ResumeType.RESUME:
                trial.run_metadata.error_filename = trial.run_metadata.pickled_error_filename = None
                again = trial
            else:
                again = trial.reset()
                self._told.dropped(trial)
            self._trials.remove(trial)
            self._live_trials.discard(trial)
            self._failed_trials.remove(trial)
            again.set_status(Trial.PENDING)
            self.add_trial(again)

    # What sends for actors in Ray's own.

    def _maybe_add_actors(self) -> None:
        """Start trials for as long as there is room among the live ones; first those that ran when the driver died."""
        while self._resuming:
            self._start(self._resuming.pop(0))
        while len(self._running_trials) < self._riders.executor.live_trials:
            self._maybe_update_trial_queue()  # before a scheduler is asked, which may think that nobody is left
            trial = self._next_to_run()
            if trial is None:
                break
            self._start(trial)
        if not self._running_trials and not self._pending_trials and self._search_alg.is_finished():
            # A scheduler that waits for a trial which an error or a stop condition has ended would wait for ever.
            for trial in list(self._paused_trials):
                self.stop_trial(trial)
        if self._search_alg.is_finished() and not self._pending_trials:
            self._riders.end_search()
        if not self._snapshots and self._running_trials:
            self._snapshots = True
            self.checkpoint(force=True, wait=True)  # whoever dies from here on can be restored

    def add_trial(self, trial: Trial) -> None:
        """Ray's own, with the trial's folder, which progress reporters look into and an actor would make."""
        _check_trial(trial)
        trial.init_local_path()
        super().add_trial(trial)

    def _next_to_run(self) -> Trial | None:
        chosen = self._scheduler_alg.choose_trial_to_run(self._wrapped())
        if chosen is not None and chosen.status in (Trial.PENDING, Trial.PAUSED):
            return chosen
        # As in Ray's own: what is pending runs, whether a scheduler asks for it or not.
        while self._pending_trials_list and self._pending_trials_list[0] not in self._pending_trials:
            self._pending_trials_list.pop(0)
        return next(iter(self._pending_trials_list), None)

    def _start(self, trial: Trial) -> None:
        self._set_trial_status(trial, Trial.PENDING)
        self._callbacks.on_trial_start(iteration=self._iteration, trials=self._trials, trial=trial)
        self._set_trial_status(trial, Trial.RUNNING)
        self._live_trials.add(trial)
        self._mark_trial_to_checkpoint(trial)
        checkpoints = trial.run_metadata.checkpoint_manager
        latest, snapshot = checkpoints.latest_checkpoint_result, None
        if latest is not None and isinstance(latest.checkpoint, Snapshot):
            checkpoints._latest_checkpoint_result = checkpoints.best_checkpoint_result
            snapshot = latest.checkpoint
        try:
            self._riders.start(trial, snapshot)
        except ConfigurationError as error:  # of this trial's config
            self._told.started(trial)
            self._trial_task_failure(trial, error)
            return
        self._told.started(trial)  # after it was, so that one row has this and where it starts from
        self._riders.hear(trial)

    def _schedule_trial_train(self, trial: Trial) -> None:
        self._riders.go_on(trial)

    def _schedule_trial_pause(self, trial: Trial, should_checkpoint: bool = True) -> None:
        snapshot = self._riders.pause(trial)
        self._set_trial_status(trial, Trial.PAUSED)
        if snapshot is not None and should_checkpoint:
            result = _TrainingResult(checkpoint=snapshot, metrics=trial.last_result)
            trial.run_metadata.checkpoint_manager._latest_checkpoint_result = result

    def _schedule_trial_stop(self, trial: Trial, exception: Exception | None = None) -> None:
        if exception is None and trial.status == Trial.PAUSED and _at_end(trial) and self._riders.has_state(trial):
            self._write_checkpoint(trial)  # it has had its last report
        super()._schedule_trial_stop(trial, exception)
        self._riders.stop(trial)
        checkpoints = trial.run_metadata.checkpoint_manager
        if checkpoints.latest_checkpoint_result and isinstance(trial.checkpoint, Snapshot):
            checkpoints._latest_checkpoint_result = checkpoints.best_checkpoint_result
        self._mark_trial_to_checkpoint(trial)

    def _schedule_trial_save(self, trial: Trial, result: Mapping[str, Any] | None = None) -> Snapshot | None:
        """The state that a scheduler wants to keep, which costs nothing; files are written by `_write_checkpoint`."""
        return self._riders.snapshot(trial)

    def _checkpoint_trial_if_needed(self, trial: Trial, force: bool = False) -> None:
        due = force or trial.should_checkpoint() or (trial.last_result.get("done") and _at_end(trial))
        if due and self._riders.has_state(trial):
            self._write_checkpoint(trial)

    def _schedule_trial_export(self, trial: Trial) -> None:
        if trial.export_formats:
            self._riders.export_model(trial)

    def _cleanup_trials(self) -> None:
        failed = {trial.trial_id for trial in self._trials if trial.status == Trial.ERROR}
        self._close_record(self.is_finished(), failed)
        for trial in list(self._running_trials):
            self._schedule_trial_stop(trial)
        self._riders.close()

    def let_go(self) -> None:
        """End the run, however Ray's loop was left: by a second Ctrl-C as it was."""
        self._close_record(over=False)
        self._riders.close()

    def _close_record(self, over: bool, kept: Collection[str] = ()) -> None:
        self._told.record = self._riders.record = None  # what is stopped from here on may go on another time
        if self._record is not None:
            self._record.close(over, kept)

    # What the trials tell.

    def begun(self, shards: int, report_every: str) -> None:
        """The run has begun: what counts units and looks as if epochs were meant is told."""
        stop = self._trials[0].stopping_criterion or self._stopper
        told = horizon_warning(self._told.scheduler.scheduler, stop, shards=shards, report_every=report_every)
        if told is not None:
            warn_user(told)

    def reported(self, trial: Trial, result: Result) -> None:
        """A trial reports: Ray decides, and may start others at once."""
        self._on_training_result(trial, result)
        self._maybe_add_actors()

    def _validate_result_metrics(self, result: Result) -> None:
        try:
            super()._validate_result_metrics(result)
        except ValueError as error:
            raise UnknownMetricError(
                f"{error}\nIf it is there only when an epoch ends, report once an epoch: Cerebro(report_every='epoch')."
            ) from error

    def failed(self, trial: Trial, error: str) -> None:
        """A trial cannot go on: Ray notes it, and may want it tried again."""
        cause = TrialFailedError(error.strip().rpartition("\n")[2])
        self._trial_task_failure(trial, RayTaskError("train", error, cause))

    def diverged(self, trial: Trial, result: Result) -> None:
        """A trial's loss is no number any more: to Ray it is done, with no score, and no error that ends the search."""
        measured = [self._metric, self._told.metric, self._search_alg.metric]  # the last may be a list
        names = {name for each in measured if each for name in ([each] if isinstance(each, str) else each)}
        lost = dict.fromkeys((*names, "train_loss"), math.nan)
        self._on_training_result(trial, result | lost | {"done": True})

    def ended(self, trial: Trial) -> None:
        """A trial has ended by itself: for Ray its last report was that of a trial that is done."""
        trial.last_result["done"] = True
        self._checkpoint_trial_if_needed(trial)
        self.stop_trial(trial)

    def _write_checkpoint(self, trial: Trial) -> None:
        """Write the trial's state as Ray writes what an actor saves, and tell whoever wants to know."""
        with tempfile.TemporaryDirectory() as folder, _hushed(_STORAGE_LOG):
            self._riders.export(trial, Path(folder))
            trial.storage._update_checkpoint_index(trial.last_result)
            kept = trial.storage.persist_current_checkpoint(Checkpoint.from_directory(folder))
            trial.storage.current_checkpoint_index -= 1  # Trial.on_checkpoint counts it
        self._process_trial_save(trial, _TrainingResult(checkpoint=kept, metrics=dict(trial.last_result)))
        self._callbacks.on_trial_save(iteration=self._iteration, trials=self._trials, trial=trial)


def _check_scheduler(scheduler: TrialScheduler) -> None:
    if isinstance(scheduler, ResourceChangingScheduler):
        raise ConfigurationError(
            "ResourceChangingScheduler changes what each trial's own processes may use, and by hops trials have no "
            "processes of their own: give its base_scheduler, and set workers= or resources_per_worker= of Cerebro."
        )
    check_lengths(scheduler)
    if unknown := lacking(scheduler):
        raise MissingHostError(
            f"{type(scheduler).__name__} of Ray {ray.__version__} keeps no {', '.join(unknown)}, which is read to find "
            f'its rungs; this package works with {TESTED}: pip install "ray[tune]=={TESTED}.*".'
        )


def _check_trial(trial: Trial) -> None:
    if trial.restore_path:
        raise ConfigurationError(
            f"restore={trial.restore_path!r} is not read by hops: load the weights where the model is built, or take "
            "up a whole experiment with Tuner.restore."
        )
    if any(trial.log_to_file):
        warn_user(
            f"log_to_file={trial.log_to_file!r} has no effect by hops: what trials print is printed here, after "
            "their names."
        )


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    """Without what a logger tells: here, that a checkpoint was created, which an actor would tell of itself alone."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _has_state(storage: Any) -> bool:
    """Whether Ray has written the state of an experiment in this place."""
    found = _find_newest_experiment_checkpoint(storage.experiment_fs_path, fs=storage.storage_filesystem)
    return found is not None


def _at_end(trial: Trial) -> bool:
    """Whether the trial leaves its weights behind: unless it is told not to."""
    return trial.run_metadata.checkpoint_manager.checkpoint_config.checkpoint_at_end is not False


class _NoActors:
    """Stands where Ray's controller has its actors: while it would wait for them, the run goes on."""

    num_live_actors = 1
    num_pending_actors = 0

    def __init__(self, riders: Riders) -> None:
        self._riders = riders

    def next(self, timeout: float | None = None) -> bool:
        self._riders.wait(_TICK_S)
        return True

    def get_live_actors_resources(self) -> dict[str, float]:
        return {}
