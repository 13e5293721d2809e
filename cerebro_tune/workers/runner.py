"""How a worker runs a unit, whatever kind of worker it is.

A unit is copy, load, train, validate, write: the committed buffer is copied into the working one, the trainable adopts
the tensors there and trains them in place, and what it holds at the end is the new state. The committed buffer is only
read, so a worker that dies in the middle costs nothing but this unit.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from typing import Any, TypeVar

import cloudpickle

from cerebro_tune import state
from cerebro_tune.data.order import Rows
from cerebro_tune.errors import CerebroError, LoaderError, NonFiniteLossError, RowError, WorkerError
from cerebro_tune.feed import Feed, RunData, UnitBatches
from cerebro_tune.seeding import seed_build, seed_unit, seed_validation
from cerebro_tune.store import BufferCache, BufferRef, copy
from cerebro_tune.trainable import Plan, Recipe, Trainable, UnitWork
from cerebro_tune.units import WorkerId
from cerebro_tune.workers.messages import Finished, Forget, Message, Raised, Setup, Spans, Task, kinds_of

T = TypeVar("T")


class UnitRunner:
    """The trainables, data and buffers of one worker.

    `grow(trial, nbytes)` asks the coordinator for a buffer, `stand_still` is called while the disk is full.
    """

    def __init__(
        self,
        worker: WorkerId,
        device: str,
        grow: Callable[[str, int], BufferRef],
        stand_still: Callable[[OSError], object],
    ) -> None:
        self.worker, self.device, self._grow, self._stand_still = worker, device, grow, stand_still
        self._buffers = BufferCache(pinned=device.startswith("cuda"))
        self._seats: dict[str, Trainable] = {}
        self._configs: dict[str, bytes] = {}
        self._brought: dict[str, Recipe] = {}
        """The recipes of trials that bring their own."""
        self._feed: Feed | None = None

    def setup(self, setup: Setup) -> None:
        """Open and check the data of a run. Raises DataError; forgets everything of the run before."""
        self.close()
        spec = setup.spec
        self._spec = spec
        self._recipe: Recipe = cloudpickle.loads(spec.recipe)
        data: RunData = cloudpickle.loads(spec.data)
        data.train.check(setup.check)
        self._subset: Rows | None = None
        if data.validation is not None:
            if setup.check_validation:
                data.validation.check()
            if spec.validation_rows is not None:
                self._subset = data.validation.subset(spec.validation_rows, spec.seed)
        self._feed = Feed(data, spec.seed, self.device)
        self._surviving(self._feed.start, "started")

    def run(self, task: Task) -> Finished:
        """Run one unit; whatever the user's code raises passes through.

        A trial's config, and its recipe if it is not the run's, come with the first of its units here.
        """
        if task.config is not None:
            self._configs[task.unit.trial] = task.config
        if task.recipe is not None:
            self._brought[task.unit.trial] = cloudpickle.loads(task.recipe)
        unit = task.unit
        return self._surviving(lambda: self._run(task), f"{unit.trial} ran epoch {unit.epoch}, shard {unit.shard}")

    def _surviving(self, act: Callable[[], T], what: str) -> T:
        """Do this, and once more from its start if a loader process has died.

        A unit is a pure function, and what killed the process (the system being short of memory, say) may have nothing
        to do with it.
        """
        try:
            return act()
        except Exception:
            if not self._end_dead_loaders():
                raise
        try:
            return act()
        except Exception as error:
            if died := self._end_dead_loaders():
                raise LoaderError(
                    f"A loader process of {self.worker} died, and again when {what} once more: {died}. Look for a row "
                    "that crashes the Dataset, for too little memory, or load in the worker itself: "
                    'loader={"num_workers": 0}.'
                ) from error
            raise

    def _end_dead_loaders(self) -> str | None:
        """How loader processes died, if any did; their loader is then taken down, to be started anew."""
        died = self._data.died
        if died:
            self._data.close()
        return died

    @property
    def _data(self) -> Feed:
        assert self._feed is not None, "a unit before the setup"
        return self._feed

    def _run(self, task: Task) -> Finished:
        began = monotonic()
        if self._spec.threads is not None:
            import torch

            torch.set_num_threads(self._spec.threads)
        trainable, working = self._load(task)
        timer = _ValidationTimer(lambda: seed_validation(self._spec.seed, task.trial_index, *_place(task)))
        loaded = monotonic()
        seed_unit(self._spec.seed, task.trial_index, *_place(task))
        work = self._work(task, timer)
        metrics = self._train(trainable, task, work)
        self._synchronize()
        trained = monotonic()
        loss = metrics.get("train_loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"The training loss of {task.unit.trial} is {loss} in epoch {task.unit.epoch}, "
                f"shard {task.unit.shard}: lower the learning rate, clip gradients, or look for bad rows in that shard."
            )
        tree = trainable.state_dict()
        # Before the state is written: where it has grown, that moves others into the memory of the tree's own tensors.
        best_written, exported = self._export(task, tree, metrics)
        used, digest = self._write(task.unit.trial, working, tree)
        return Finished(
            worker=self.worker,
            job=task.job,
            unit=task.unit,
            metrics=metrics,
            used=used,
            digest=digest,
            spans=Spans(began, loaded, trained, monotonic(), timer.elapsed_s, self._build_s),
            best_written=best_written,
            exported=exported,
            logged=trainable.take_log(),
            should_stop=trainable.should_stop,
        )

    def _train(self, trainable: Trainable, task: Task, work: UnitWork) -> dict[str, float]:
        """Run the unit on the trainable; what a bad row raised is told with the unit that it was read for."""
        try:
            metrics = trainable.run_unit(work)
        except RowError as error:
            unit = task.unit
            raise RowError(f"{unit.trial}, epoch {unit.epoch}, shard {unit.shard}: {error}") from error
        if self._data.data.loading.on_row_error == "skip":
            read = [batches for batches in (work.train, work.validation) if isinstance(batches, UnitBatches)]
            metrics = {**metrics, "rows_skipped": float(sum(batches.rows_skipped for batches in read))}
        return metrics

    def forget(self, forget: Forget) -> None:
        """Let go of ended trials and freed buffers."""
        for trial in forget.trials:
            self._configs.pop(trial, None)
            self._brought.pop(trial, None)
            if seat := self._seats.pop(trial, None):
                seat.close()
        self._buffers.forget(forget.buffers)

    def close(self) -> None:
        """Let go of everything."""
        for seat in self._seats.values():
            seat.close()
        self._seats.clear()
        self._configs.clear()
        self._brought.clear()
        if self._feed is not None:
            self._feed.release()
            self._feed = None
        self._buffers.close()

    def _recipe_of(self, trial: str) -> Recipe:
        return self._brought.get(trial, self._recipe)

    def _load(self, task: Task) -> tuple[Trainable, BufferRef | None]:
        """The task's trainable with the predecessor's state in it, and the working buffer that it lives in."""
        trial = task.unit.trial
        if task.committed is None and (stale := self._seats.pop(trial, None)):
            stale.close()  # its first unit was begun here before, and its state is not that of a fresh build any more
        trainable = self._seats.get(trial)
        began = monotonic()
        if trainable is None:
            seed_build(self._spec.seed, task.trial_index)
            trainable = self._recipe_of(trial).create()
            trainable.start(cloudpickle.loads(self._configs[trial]), self._plan(task))
            self._seats[trial] = trainable
        self._build_s = monotonic() - began
        working = task.working
        if task.committed is not None:
            working = working or self._grow(trial, task.committed_bytes)
            source, target = self._buffers.open(task.committed), self._buffers.open(working)
            copy(source, target, task.committed_bytes)
            trainable.load_state_dict(state.read(target))
            if task.trained_under is not None:
                trainable.change_config(cloudpickle.loads(task.trained_under), cloudpickle.loads(self._configs[trial]))
        return trainable, working

    def _plan(self, task: Task) -> Plan:
        spec = self._spec
        return Plan(
            epochs=task.epochs,
            batch_size=task.batch_size,
            shard_rows=spec.shard_rows,
            device=self.device,
            accumulate=self._recipe_of(task.unit.trial).accumulate,
            shard_batches=self._data.batch_counts(task.batch_size),
            datamodule=None if self._data.data.module is None else self._data.data.module.module,
            validates=self._data.data.validation is not None,
        )

    def _work(self, task: Task, timer: _ValidationTimer) -> UnitWork:
        validation = None
        if task.last or (self._spec.report_every == "unit" and self._subset is not None):
            validation = self._data.validation(task.batch_size, None if task.last else self._subset)
        epoch, shard = _place(task)
        return UnitWork(
            epoch=epoch,
            shard=shard,
            position=task.position,
            last=task.last,
            train=self._data.train(
                epoch, shard, task.batch_size, lambda: seed_unit(self._spec.seed, task.trial_index, epoch, shard)
            ),
            validation=validation,
            validating=timer.measure,
        )

    def _write(self, trial: str, working: BufferRef | None, tree: Any) -> tuple[int, str]:
        """Write the state into the trial's working buffer, or into a larger one where it has grown."""
        layout = state.plan(tree, None if working is None else self._buffers.open(working))
        if working is None or working.nbytes < layout.nbytes:
            working = self._grow(trial, layout.nbytes)
        buffer = self._buffers.open(working)
        used = state.write(layout, buffer)
        return used, state.digest(buffer, used)

    def _export(self, task: Task, tree: Any, metrics: dict[str, float]) -> tuple[bool, str]:
        """Write the one checkpoint that is due, if one is; return whether it is the best, and its digest."""
        if task.export is None:
            return False, ""
        path, best = task.export.place(metrics)
        if path is None:
            return best, ""
        return best, self._recipe_of(task.unit.trial).keep(tree, path, self._stand_still, task.export.durable)

    def _synchronize(self) -> None:
        """Wait for the device, so that training is not accounted as hopping."""
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


def set_up(runner: UnitRunner, setup: Setup) -> Exception | None:
    """Set a runner up and return what is wrong, if something is."""
    try:
        runner.setup(setup)
    except CerebroError as error:
        return error
    except Exception:  # noqa: BLE001  # a user's class that does not unpickle, say; its own type may not travel back
        return WorkerError(f"{runner.worker} could not be set up for the run:\n{traceback.format_exc()}")
    return None


def run_task(runner: UnitRunner, task: Task) -> Message:
    """Run a unit and turn what the user's code raises into a message."""
    try:
        return runner.run(task)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the traceback becomes the trial's error
        return Raised(runner.worker, task.job, task.unit, traceback.format_exc(), kinds_of(error))


def _place(task: Task) -> tuple[int, int]:
    return task.unit.epoch, task.unit.shard


class _ValidationTimer:
    """`measure()` seeds the generators for validation and takes the time spent inside."""

    def __init__(self, seed: Callable[[], None]) -> None:
        self._seed, self.elapsed_s = seed, 0.0

    def measure(self) -> AbstractContextManager[None]:
        return self._measure()

    @contextmanager
    def _measure(self) -> Iterator[None]:
        began = monotonic()
        self._seed()
        yield
        self.elapsed_s += monotonic() - began
