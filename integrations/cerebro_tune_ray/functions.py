"""Function trainables by hops: the function runs on a thread of this process, what its Trainer fits in the workers.

A unit of the fit is a report to Ray, and so is what the function itself reports with `ray.tune.report`. While Ray has
the trial paused, the call that is on (`fit` or `report`) does not return; when Ray stops it in a fit, `fit` returns as
if `trainer.should_stop` had been set, and whatever the function asks for after that ends it.

Calls take turns: between two of `fit` and `report` one has the process's random generators to itself, seeded for its
trial, so that what it seeds and draws is what a process of its own would.
"""

from __future__ import annotations

import itertools
import shutil
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.result import RESULT_DUPLICATE, SHOULD_CHECKPOINT

from cerebro_tune.errors import NotTrainableError
from cerebro_tune.results import TrialResult
from cerebro_tune.seat import Seat, seated
from cerebro_tune.seeding import OwnStreams
from cerebro_tune.sharedrun import TakeState
from cerebro_tune.trainable import Config, Recipe
from cerebro_tune.units import Decision
from cerebro_tune_ray.rider import Controller, Result, Rider, filled
from cerebro_tune_ray.riders import Riders
from cerebro_tune_ray.snapshot import Snapshot

if TYPE_CHECKING:
    from cerebro_tune.executor import Cerebro

Asked = tuple[Recipe, Config, TakeState, str | None, str]
"""A fit, as `Seat.train` is asked for it."""


class CallOver(BaseException):  # ends a user's function whatever it catches
    """Ray has stopped the trial of this call, and it wants more."""


class Call(Seat):
    """One call of the user's function, and what the function sees of Ray there."""

    metric, mode = None, "min"  # of the Trainer's own ModelCheckpoint; Ray's is measured by Ray
    world_rank = None
    loaded_checkpoint = None
    """A trial that goes on from a state has it already when its Trainer fits."""

    def __init__(self, riders: FunctionRiders, trial: Trial, index: int, begin: Snapshot | None) -> None:
        self.executor, self._riders, self.trial = riders.executor, riders, trial
        self.begin = begin
        """The state that one of its fits goes on from."""
        self.fits = 0
        """How many it has asked for."""
        self.renamed: dict[str, str] = {}
        """Metrics that a callback was to report to Ray by another name: theirs, by Ray's."""
        self._streams = OwnStreams(riders.executor.seed, index)
        self.thread = Thread(target=self._run, name=f"cerebro-{trial.trial_id}", daemon=True)

    def _run(self) -> None:
        try:
            with seated(self), self._streams:
                self._riders.function(dict(self.trial.config))
        except CallOver:
            return
        except BaseException:  # noqa: BLE001  # the user's; the traceback becomes the trial's error
            error = traceback.format_exc()
            self._riders.post(lambda: self._riders.raised(self, error))

    # What `HopStrategy` asks, on the thread of the function.

    def train(
        self, recipe: Recipe, config: Config, take_state: TakeState, *, metric: str | None, mode: str
    ) -> TrialResult:
        """Have the run train it, as this trial of Ray's."""
        asked = recipe, {**config, "given": dict(self.trial.config)}, take_state, metric, mode
        result: TrialResult = self._ask(lambda reply: self._riders.fit(self, asked, reply))
        return result

    def decide(self, trial_id: str, report: Mapping[str, Any]) -> Decision | None:
        """Reports go to Ray by way of the run that `train` uses."""
        raise NotImplementedError

    def conclude(self, result: TrialResult) -> None:
        """A fit that was stopped returns as if `trainer.should_stop` had been set."""

    def takes_over(self, callback: Any) -> bool:
        """Ray's own callbacks report what every unit reports anyway; the names that they give it hold."""
        if not type(callback).__module__.startswith(("ray.tune.integration.", "ray.train.lightning")):
            return False
        names = getattr(callback, "_metrics", None) or {}
        self.renamed |= names if isinstance(names, Mapping) else {}
        return True

    # What `ray.tune` asks for, there too.

    def report(self, metrics: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> None:
        """Tell Ray, and wait until the trial may go on."""
        self._ask(lambda reply: self._riders.report(self, dict(metrics), checkpoint, reply))

    def __getattr__(self, name: str) -> Any:
        info = {
            "trial_name": str(self.trial),
            "trial_id": self.trial.trial_id,
            "trial_resources": self.trial.placement_group_factory,
            "trial_dir": self.trial.local_path,
            "experiment_name": self.trial.experiment_dir_name,
            "metadata": {},
        }
        if name not in info:
            raise AttributeError(f"Nothing is known of {name} in a function whose Trainer trains by hops.")
        return info[name]

    def _ask(self, call: Callable[[Future[Any]], None]) -> Any:
        reply: Future[Any] = Future()
        self._riders.post(lambda: call(reply))
        with self._streams.left():
            return reply.result()


class FunctionRiders(Riders):
    """Trials of a function trainable; `function` reports its own return, as Ray's wrapped functions do."""

    def __init__(
        self, executor: Cerebro, function: Callable[[dict[str, Any]], Any], name: str, controller: Controller
    ) -> None:
        super().__init__(executor, None, controller)
        self.function, self._name = function, name
        self._calls: dict[str, Call] = {}
        """By id of Ray's trial."""
        self._good: dict[str, Snapshot] = {}
        """The last good state of those that failed."""
        self._threads: list[Thread] = []
        self._mail: deque[Callable[[], None]] = deque()
        self._bell = Event()
        self._fits: dict[str, tuple[Future[Any], TakeState]] = {}
        """By id of the run's trial: who waits for its end."""
        self._replies: dict[str, Future[Any]] = {}
        """To what functions report themselves, which takes the place of a trial of the run meanwhile."""
        self._numbers = itertools.count()
        self._saved: dict[str, Callable[[Path], object]] = {}
        """What writes the checkpoint that a function has reported, or the end of its fit, until Ray wants it."""

    @property
    def name(self) -> str:  # noqa: D102
        return self._name

    def post(self, call: Callable[[], None]) -> None:
        """Have a call made on Ray's thread."""
        self._mail.append(call)
        self._bell.set()
        if self._run is not None:
            self._run.wake()

    # What Ray orders.

    def stop(self, trial: Trial) -> None:  # noqa: D102
        self._leave(trial)
        super().stop(trial)

    def snapshot(self, trial: Trial) -> Snapshot | None:  # noqa: D102
        return super().snapshot(trial) if self._in_fit(trial) else None

    def file(self, trial: Trial) -> str | None:  # noqa: D102
        return super().file(trial) if self._in_fit(trial) else None

    def has_state(self, trial: Trial) -> bool:  # noqa: D102
        return trial.trial_id in self._saved or self._in_fit(trial)

    def export(self, trial: Trial, folder: Path) -> None:  # noqa: D102
        self._saved.pop(trial.trial_id, partial(super().export, trial))(folder)

    def wait(self, timeout_s: float) -> None:  # noqa: D102
        if self._run is not None:
            super().wait(timeout_s)
        elif not self._mail:
            self._bell.wait(timeout_s)
        self._bell.clear()
        while self._mail:
            self._mail.popleft()()

    def close(self) -> None:
        """End the run and every call: fits that Ray has stopped return, and what functions do then is waited for."""
        self._calls.clear()
        while self._fits.keys() - self._owners.keys():
            self.wait(_LAST_CALLS_S)
        super().close()
        while any(thread.is_alive() for thread in self._threads):
            self._turn_away()
            self._bell.wait(_LAST_CALLS_S)
            self._bell.clear()

    # What functions ask, on Ray's thread.

    def fit(self, call: Call, asked: Asked, reply: Future[Any]) -> None:
        """Train what the function's Trainer fits, as the trial of Ray's that the call is of."""
        recipe, config, take_state, metric, mode = asked
        rider = self._riders[call.trial.trial_id]
        if not self._is_on(call):
            reply.set_exception(CallOver())
            return
        try:
            if self._run is None:
                self._begin(recipe, metric=metric, mode=mode)
            begin = call.begin
            if begin is None or begin.fit != call.fits + 1:
                hop = self.run.add(config, index=rider.index)
            else:
                source = self._hop_of(begin, dict(call.trial.config), lambda given: {**config, "given": given})
                hop, call.begin = self.run.clone(source, config, rider.index), None
        except Exception as error:  # noqa: BLE001  # the function waits for an answer, whatever it is
            reply.set_exception(error)
            return
        call.fits = rider.fit = call.fits + 1
        rider.config = dict(call.trial.config)
        self._fits[hop] = reply, take_state
        self._replace(rider, hop)

    def report(self, call: Call, metrics: dict[str, Any], checkpoint: Checkpoint | None, reply: Future[Any]) -> None:
        """Hand Ray what the function reports itself, its return among it."""
        rider = self._riders[call.trial.trial_id]
        if not self._is_on(call):
            reply.set_exception(CallOver())
            return
        if not call.fits:
            reply.set_exception(
                NotTrainableError(
                    f"{self._name} reported to Ray Tune, or returned, without having trained by hops: a function that "
                    "trains by itself cannot be paused, or stopped, between units. Give its Trainer "
                    "strategy=HopStrategy() (from cerebro_tune_lightning), or give tune.run a LightningModule, a "
                    "TorchTrainable or a class-API Trainable."
                )
            )
            return
        if checkpoint is not None:
            self._saved[call.trial.trial_id] = lambda folder: checkpoint.to_directory(str(folder))
            metrics[SHOULD_CHECKPOINT] = True
        hop = rider.hop = f"report-{next(self._numbers)}"
        self._replies[hop] = reply
        began = monotonic()
        answer = self._hear(rider, hop, lambda: self._own_result(rider, metrics, monotonic() - began))
        if answer is not None:
            self._settle(hop, answer)

    def raised(self, call: Call, error: str) -> None:
        """The function has raised: so has the trial failed, if it is still Ray's."""
        if self._is_on(call):
            trial = call.trial
            self.stop(trial)
            self._controller.failed(trial, error)
            if trial.status != Trial.PENDING:
                self._good.pop(trial.trial_id, None)

    # What the run tells.

    def on_end(self, result: TrialResult) -> None:
        """Let the fit return; of a trial that failed, keep the state that it may be tried again from."""
        hop = result.trial_id
        self._catch_up(hop)
        rider = self._owners.pop(hop, None)
        reply, take_state = self._fits.pop(hop, (None, None))
        if rider is not None:
            rider.hop = None
            if result.status == "failed" and self._has_trained(hop):
                self._good[rider.trial.trial_id] = self._snapshot(rider, hop)
        if reply is None or take_state is None:
            return  # a snapshot
        if result.status != "failed" and self._has_trained(hop):
            state = self.run.state(hop)
            take_state(state)
            if rider is not None:
                self._saved[rider.trial.trial_id] = lambda folder: self._write(state, folder)
        reply.set_result(result)

    # Within.

    def _set_out(self, rider: Rider, snapshot: Snapshot | None) -> None:
        """Call the function, or let the call that waits go on; to go on from another state it is called anew."""
        trial = rider.trial
        if snapshot is not None:
            self._leave(trial)
            self._stand_at(rider, snapshot)
        if trial.trial_id in self._calls:
            if rider.waiting is None and rider.hop is not None:
                self._order(rider.hop, Decision.CONTINUE)
            return
        begin = snapshot or self._good.pop(trial.trial_id, None)
        if begin is None and rider.back is not None:
            begin, rider.back = self.snapshot_of(rider.back), None
        if rider.index is None:
            rider.index = self.next_index()
        call = Call(self, trial, rider.index, begin)
        self._calls[trial.trial_id] = call
        self._threads = [*(thread for thread in self._threads if thread.is_alive()), call.thread]
        call.thread.start()

    def _settle(self, hop: str, decision: Decision) -> None:
        reply = self._replies.pop(hop, None)
        if reply is None:
            super()._settle(hop, decision)
        elif decision is Decision.PAUSE:
            self._replies[hop] = reply
        elif decision is Decision.STOP:
            reply.set_exception(CallOver())
        else:
            reply.set_result(None)

    def _replace(self, rider: Rider, hop: str | None) -> None:
        if rider.hop in self._replies:
            before, rider.hop = rider.hop, None
            self._order(before, Decision.STOP)
        super()._replace(rider, hop)

    def _leave(self, trial: Trial) -> None:
        """End the call of the trial."""
        self._calls.pop(trial.trial_id, None)
        self._saved.pop(trial.trial_id, None)
        if rider := self._riders.get(trial.trial_id):
            self._replace(rider, None)

    def _stand(self, rider: Rider, config: Config) -> None:
        if self._in_fit(rider.trial):
            super()._stand(rider, config)

    def _stand_at(self, rider: Rider, snapshot: Snapshot) -> None:
        """Note that the trial goes on from there, before its function asks for a fit."""
        if snapshot.hop is not None:
            self._write_state(rider, snapshot.hop, snapshot.config, snapshot.fit)
        elif self.record is not None:  # of a run that is over, whose state is on disk
            noted, path = snapshot.noted, self.record.new_file(rider.trial.trial_id)
            self.record.patiently(partial(shutil.copyfile, self.record.folder / noted.file, path))
            assert rider.index is not None, "it was started before"
            own = {"trial": rider.trial.trial_id, "file": path.name, "index": rider.index}
            self._note(rider, replace(noted, **own))

    def _result(self, rider: Rider, report: Mapping[str, Any]) -> Result:
        renamed = self._calls[rider.trial.trial_id].renamed
        result = super()._result(rider, {**report, **{mine: report[name] for mine, name in renamed.items()}})
        return result | {"done": False}  # the function may have more to do

    def _own_result(self, rider: Rider, metrics: dict[str, Any], elapsed_s: float) -> Result:
        if RESULT_DUPLICATE in metrics:
            return metrics
        rider.iteration += 1
        return filled(rider, metrics, elapsed_s)

    def _in_fit(self, trial: Trial) -> bool:
        rider = self._riders.get(trial.trial_id)
        return rider is not None and rider.hop in self._fits

    def _is_on(self, call: Call) -> bool:
        return self._calls.get(call.trial.trial_id) is call

    def _turn_away(self) -> None:
        """The experiment is over: answer every call so that it ends."""
        for reply, _ in self._fits.values():
            reply.set_exception(CallOver())
        for reply in self._replies.values():
            reply.set_exception(CallOver())
        self._fits.clear()
        self._replies.clear()
        while self._mail:
            self._mail.popleft()()


_LAST_CALLS_S = 0.05
