"""Ray's trials as trials of a run: what the controller tells of them, and what it hears.

A trial of Ray is one trial of the run for as long as its state is its own. An exploit, or a retry after an error, is a
clone that takes its place; what a scheduler holds of a trial's past is a clone too, which stands paused: `Snapshot`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial

from cerebro_tune.configtext import plain_config
from cerebro_tune.errors import NonFiniteLossError
from cerebro_tune.policy import abreast
from cerebro_tune.results import TrialResult
from cerebro_tune.trainable import Config, Recipe
from cerebro_tune.units import Decision
from cerebro_tune_ray.record import Record
from cerebro_tune_ray.rider import TIMES, Controller, Result, Rider, filled
from cerebro_tune_ray.rows import Standing
from cerebro_tune_ray.snapshot import LetGo, Snapshot

if TYPE_CHECKING:
    from cerebro_tune.executor import Cerebro
    from cerebro_tune.run import Run

_DIVERGED = f"{NonFiniteLossError.__module__}.{NonFiniteLossError.__name__}"


class Riders:
    """All of Ray's trials that were started. Called on Ray's thread, which also drives the run."""

    def __init__(self, executor: Cerebro, recipe: Recipe | None, controller: Controller) -> None:
        self.executor = executor
        self._recipe, self._controller = recipe, controller
        self._run: Run | None = None
        self._riders: dict[str, Rider] = {}
        self._owners: dict[str, Rider] = {}
        """By id of the run's trial; snapshots, and what nobody wants any more, have none."""
        self._reports: deque[tuple[str, Mapping[str, Any]]] = deque()
        """What Ray has not heard yet."""
        self._deciding: str | None = None
        self._answer: Decision | None = None
        self._search_ended = False
        self.started = 0
        """Trials of Ray's that were started, in all."""
        self._let_go: LetGo = deque()
        self.record: Record | None = None
        """Where what is needed after the death of this process is noted."""
        self._kept: Counter[str] = Counter()
        """Files that snapshots hold."""
        self._spent: list[str] = []
        """Files that are needed no more when what has come after them is noted."""

    # What Ray orders.

    def start(self, trial: Trial, snapshot: Snapshot | None) -> None:
        """Let a trial run: from a snapshot, from where it stands, or from its beginning.

        A config that is not the one it was started with takes effect in its next unit.
        """
        rider = self._riders.setdefault(trial.trial_id, Rider(trial))
        rider.parked = False
        if snapshot is not None and snapshot.standing is not None and snapshot.standing is rider.back:
            snapshot = None  # its own, of a run that is over: it goes on as it was put back
        elif snapshot is not None:  # where it stood in a run that is over counts no more
            rider.iteration, rider.time_s, rider.back, rider.known = snapshot.iteration, snapshot.time_s, None, 0
        self._set_out(rider, snapshot)

    def hear(self, trial: Trial) -> None:
        """Hand Ray what a trial that was started has reported while Ray had it paused."""
        rider = self._riders[trial.trial_id]
        if rider.waiting is not None:
            assert rider.hop is not None, "it has reported"
            hop, make, rider.waiting = rider.hop, rider.waiting, None
            answer = self._ask(rider, hop, make)
            if answer is not None:
                self._settle(hop, answer)

    def go_on(self, trial: Trial) -> None:
        """Let the trial run its next unit."""
        self._order(self._riders[trial.trial_id].hop, Decision.CONTINUE)

    def pause(self, trial: Trial) -> Snapshot | None:
        """Let the trial stand; its state now, unless it is in the middle of a unit."""
        rider = self._riders[trial.trial_id]
        if rider.hop is None or rider.hop != self._deciding:
            rider.parked = True
            return None
        self._answer = Decision.PAUSE
        return self.snapshot(trial)

    def stop(self, trial: Trial) -> None:
        """Let go of the trial."""
        if rider := self._riders.get(trial.trial_id):
            self._replace(rider, None)
            if rider.file is not None and trial.status != Trial.ERROR:  # a trial that failed may be tried again from it
                self._spent.append(rider.file)
                rider.file = None
                self._settle_record()

    def snapshot(self, trial: Trial) -> Snapshot | None:
        """The trial's state now, by reference; None before its first unit, and after its last."""
        rider = self._riders[trial.trial_id]
        if rider.hop is None or not self.run.units_left(rider.hop):
            return None
        return self._snapshot(rider, rider.hop)

    @property
    def name(self) -> str:
        """Of what is trained."""
        assert self._recipe is not None, "known"
        return self._recipe.name

    def file(self, trial: Trial) -> str | None:
        """Where the state that the trial reports from lies on disk."""
        rider = self._riders.get(trial.trial_id)
        return None if rider is None else rider.file

    def next_index(self) -> int:
        """The number of the trial that is started next."""
        self.started += 1
        return self.started - 1

    def put_back(self, trial: Trial, index: int, standing: Standing | None, known: int) -> None:
        """Have a trial of a run that is over go on from where it stood, or from its beginning, when it is started.

        `known` are the reports that Ray has heard of it since.
        """
        rider = self._riders[trial.trial_id] = Rider(trial, index=index, back=standing, known=known)
        if standing is not None:
            rider.file, rider.iteration, rider.time_s = standing.file, standing.iteration, standing.time_s

    def export(self, trial: Trial, folder: Path) -> None:
        """Write the trial's state as a checkpoint."""
        hop = self._riders[trial.trial_id].hop
        assert hop is not None, "it has reported"
        self._write(self.run.state(hop), folder)

    def export_model(self, trial: Trial) -> None:
        """Ray's `export_formats` are for class-API trainables; the others leave checkpoints."""

    def has_state(self, trial: Trial) -> bool:
        """Whether there is something to `export`."""
        rider = self._riders.get(trial.trial_id)
        return rider is not None and rider.hop is not None

    def wait(self, timeout_s: float) -> None:
        """Let the run go on until something has happened, or the time has passed; hand Ray a report.

        What Ray makes of it takes milliseconds: before that the workers start what is ready.
        """
        if not self._reports:
            self.run.turn(timeout_s)
        if self._reports:
            self.run.turn(0)
        if self._reports:  # a trial that failed meanwhile may have had them heard before its end
            self._hand_over()
        while self._let_go:
            hop, file = self._let_go.popleft()
            if hop is not None:
                self.run.stop(hop)
            if file is not None:
                self._kept[file] -= 1
                self._spent.append(file)

    def end_search(self) -> None:
        """No more trials will come, so that those there are are trained in the order that ends soonest."""
        if self._run is not None and not self._search_ended:
            self._run.end_search()
            self._search_ended = True

    def close(self) -> None:
        """End the run, whatever is still going on in it."""
        if self._run is not None:
            self._owners.clear()
            self.executor.give_up(self._run)
            self._run = None

    # What the run tells, as its tuner.

    def on_report(self, trial_id: str, report: Mapping[str, Any]) -> Decision | None:
        """Keep the report for `wait`; Ray's order is the answer."""
        if trial_id not in self._owners:  # stopped while it ran this unit
            return Decision.STOP
        self._reports.append((trial_id, report))
        return None

    def on_end(self, result: TrialResult) -> None:
        """Tell Ray of a trial that has ended otherwise than by its order."""
        self._catch_up(result.trial_id)
        rider = self._owners.pop(result.trial_id, None)
        if rider is None:
            return
        error = result.error or ""
        if result.status == "failed":
            rider.hop = None
        if result.status == "failed" and error.strip().rpartition("\n")[2].startswith(_DIVERGED):
            self._controller.diverged(rider.trial, filled(rider, dict(result.last_metrics), 0.0))
        elif result.status == "failed":
            self._controller.failed(rider.trial, error)
            if rider.trial.status == Trial.PENDING and self._has_trained(result.trial_id):
                self._replace(rider, self._keep(result.trial_id, rider.index))
        else:
            self._controller.ended(rider.trial)
            rider.hop = None

    # Within.

    @property
    def run(self) -> Run:
        """The run, which begins with the first call that needs it."""
        if self._run is None:
            assert self._recipe is not None, "known"
            self._begin(self._recipe, keep="none")  # files are written when Ray asks for them
        assert self._run is not None, "begun"
        return self._run

    def _begin(self, recipe: Recipe, **options: Any) -> None:
        self._recipe = recipe
        policy = abreast(self.executor.policy) if self._controller.compares else None
        self._run = self.executor.run(recipe, self, policy=policy, hosted=True, **options)
        self._run.begin()
        self._controller.begun(self._shards, self.executor.report_every)

    @property
    def _shards(self) -> int:
        return self.executor.train.num_shards

    def _write(self, state: Any, folder: Path) -> None:
        assert self._recipe is not None, "it has made the state"
        self._recipe.export(state, folder / f"checkpoint{self._recipe.suffix}")

    def _given(self, rider: Rider, config: Config) -> Config:
        """The config as the run's trial gets it."""
        return config

    def _set_out(self, rider: Rider, snapshot: Snapshot | None) -> None:
        """Have the trial's next unit run, if it is not to be heard before."""
        config = dict(rider.trial.config)
        if snapshot is not None:
            source = self._hop_of(snapshot, config, partial(self._given, rider))
            self._replace(rider, self.run.clone(source, self._given(rider, config), rider.index))
            self._stand(rider, snapshot.config or config)
        elif rider.back is not None:
            rider.config = rider.back.trained_under or config
            self._replace(rider, self._bring_back(rider.back, self._given(rider, rider.config)))
            rider.back = None
            self._set_out(rider, None)
            return
        elif rider.hop is None:
            rider.index = self.next_index() if rider.index is None else rider.index
            self._replace(rider, self.run.add(self._given(rider, config), index=rider.index))
        elif config != rider.config:
            self._replace(rider, self.run.clone(rider.hop, self._given(rider, config), rider.index))
        elif rider.waiting is None:
            self._order(rider.hop, Decision.CONTINUE)
        rider.config = config

    def _hop_of(self, snapshot: Snapshot, config: Config, given: Callable[[Config], Config]) -> str:
        """The run's trial that a snapshot holds, brought back under its config, or else `config`, as it is `given`."""
        if snapshot.hop is None:
            snapshot.hold(self._bring_back(snapshot.noted, given(snapshot.config or config)), self._let_go)
        assert snapshot.hop is not None, "held"
        return snapshot.hop

    def _bring_back(self, standing: Standing, given: Config) -> str:
        assert self.record is not None, "it is from there"
        path = self.record.folder / standing.file
        return self.run.restore(given, path, standing.units, standing.visited, standing.index)

    def _snapshot(self, rider: Rider, hop: str) -> Snapshot:
        if rider.file is not None:
            self._kept[rider.file] += 1
        snapshot = Snapshot(rider.iteration, rider.time_s, rider.file, rider.config, rider.fit)
        return snapshot.hold(self._keep(hop), self._let_go)

    def _stand(self, rider: Rider, config: Config) -> None:
        """Write the trial's state where it outlives this process; it is noted with the next call to the scheduler.

        `config` is what it was trained under.
        """
        if rider.hop is not None:
            self._write_state(rider, rider.hop, config, rider.fit)

    def _write_state(self, rider: Rider, hop: str, config: Config | None, fit: int) -> None:
        if self.record is None or not self.run.units_left(hop):
            return
        path, trial = self.record.new_file(rider.trial.trial_id), rider.trial.trial_id
        digest = self.record.patiently(partial(self.run.save, hop, path))
        assert rider.index is not None, "it runs"
        place = *self.run.progress(hop), rider.iteration, rider.time_s, rider.index
        self._note(rider, Standing(trial, path.name, digest, *place, plain_config(config or {}), fit))

    def _note(self, rider: Rider, standing: Standing) -> None:
        assert self.record is not None, "the state is there"
        self.record.stand(standing)
        if rider.file is not None:
            self._spent.append(rider.file)
        rider.file = standing.file

    def snapshot_of(self, standing: Standing) -> Snapshot:
        """Where a trial stood in a run that is over, for as long as somebody refers to it."""
        self._kept[standing.file] += 1
        return Snapshot.of(standing).watched(self._let_go)

    def clear_out(self, files: Iterable[str]) -> None:
        """Let go of those of these files that nobody may go back to."""
        self._spent += files
        self._settle_record()

    def _settle_record(self) -> None:
        """What is to be noted is noted: files that came before are needed no more.

        Not while a report is decided: where its trial stands is noted with the call that tells the scheduler of it.
        """
        if self.record is None or self._deciding is not None:
            return
        self.record.settle()
        inuse = {rider.file for rider in self._riders.values()}
        for file in self._spent:
            if file not in inuse and self._kept[file] <= 0:
                self.record.forget(file)
        self._spent.clear()

    def _catch_up(self, ending: str) -> None:
        """Hand Ray what came before the end of a trial that it is to hear of."""
        while ending in self._owners and self._reports:
            self._hand_over()

    def _hand_over(self) -> None:
        """Hand Ray the oldest report, unless its trial was stopped since, which has answered it."""
        hop, report = self._reports.popleft()
        if rider := self._owners.get(hop):
            answer = self._hear(rider, hop, lambda: self._result(rider, report))
            if answer is not None:
                self._settle(hop, answer)

    def _hear(self, rider: Rider, hop: str, make: Callable[[], Result]) -> Decision | None:
        """Hand Ray a result now, or, of a trial that Ray has paused, when it is started again."""
        if rider.known:
            rider.known -= 1
            make()
            return Decision.CONTINUE
        if rider.parked:
            rider.waiting = make
            return None
        return self._ask(rider, hop, make)

    def _ask(self, rider: Rider, hop: str, make: Callable[[], Result]) -> Decision | None:
        before = self._deciding, self._answer  # a trial that starts while another reports may have waited to be heard
        self._deciding, self._answer = hop, None
        try:
            result = make()
            self._stand(rider, rider.config)
            self._controller.reported(rider.trial, result)
            answer = self._answer
        finally:
            self._deciding, self._answer = before
        self._settle_record()
        return answer

    def _result(self, rider: Rider, report: Mapping[str, Any]) -> Result:
        """A report with all that Ray's trainables fill in."""
        rider.iteration += 1
        assert rider.hop is not None, "it reports"
        result = filled(rider, dict(report), sum(report[name] for name in TIMES))
        result["done"] = result["done"] or not self.run.units_left(rider.hop)
        return result

    def _order(self, hop: str | None, decision: Decision) -> None:
        if hop == self._deciding:
            self._answer = decision
        elif hop is not None:
            self._settle(hop, decision)

    def _settle(self, hop: str, decision: Decision) -> None:
        """Answer a report that has waited, or speak of a trial out of turn."""
        self.run.decide(hop, decision)

    def _replace(self, rider: Rider, hop: str | None) -> None:
        """Give a trial another trial of the run, or none, and end the one it had."""
        before, rider.hop, rider.waiting = rider.hop, hop, None
        if hop is not None:
            self._owners[hop] = rider
        if before in self._owners:
            del self._owners[before]
            self._order(before, Decision.STOP)

    def _has_trained(self, hop: str) -> bool:
        """Whether a unit is behind this trial of the run, be it of the trial that it is a clone of."""
        return self.run.progress(hop)[0] > 0

    def _keep(self, hop: str, index: int | None = None) -> str:
        """A clone that stands paused."""
        clone = self.run.clone(hop, index=index)
        self.run.pause(clone)
        return clone
