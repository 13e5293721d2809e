"""A search that goes on where its driver died: Ray's own state of the experiment, brought up to date by the record.

Ray's state is up to ten seconds old and has nothing of the scheduler. So all that the scheduler was told is told again,
to one that is as it was at the beginning, by a stand-in of the controller that only sets statuses; trials that Ray's
state does not know are made again from their noted text; and the searcher, whose state is Ray's, is told again what it
was told since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.train._internal.session import _TrainingResult
from ray.tune import ResumeConfig
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.utils import flatten_dict

from cerebro_tune.errors import CerebroError, ConfigurationError, DamagedJournalError
from cerebro_tune.warn import warn_user
from cerebro_tune_ray.record import Record
from cerebro_tune_ray.recorded import Recorded, set_generators
from cerebro_tune_ray.rows import Call, Standing
from cerebro_tune_ray.snapshot import Snapshot

_MARK = "_cerebro_calls"
"""An attribute of the searcher: how many calls had been noted when its state was written."""


class Rehearsal:
    """Stands for the controller while calls are repeated: it sets statuses, and nothing runs."""

    def __init__(self, controller: Any, scheduler: Recorded, known: Mapping[str, Trial], record: Record) -> None:
        self._controller, self._scheduler, self._known = controller, scheduler, known
        self._standings = record.standings()
        self.trials: list[Trial] = []
        self.files: dict[str, str | None] = {}
        """The state that each trial reported from last."""
        self.last: dict[str, int] = {}
        """The number of the last call about each trial."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def repeat(self, call: Call) -> None:
        """Make a noted call again; CerebroError where its answer is another."""
        trial, told = self._known[call.trial], call.told
        self.last[call.trial] = call.number
        if "generators" in told:
            set_generators(told["generators"])
        match call.kind:
            case "add":
                if trial in self.trials:
                    self.trials.remove(trial)
                else:
                    _begin_anew(trial, told["text"])
                self.trials.append(trial)
                trial.status = Trial.PENDING
                self._scheduler.on_trial_add(self, trial)
            case "start":
                trial.status = Trial.RUNNING
                _take_snapshot(trial)
            case "result":
                self._result(call, trial)
            case "complete" if not trial.is_finished():
                _report(trial, dict(told["result"]) | {"done": True})
                self._scheduler.on_trial_complete(self, trial, dict(told["result"]))
                trial.status = Trial.TERMINATED
            case "remove" if not trial.is_finished():
                self._scheduler.on_trial_remove(self, trial)
                trial.status = Trial.TERMINATED
            case "error":
                self._scheduler.on_trial_error(self, trial)
                trial.status = Trial.ERROR
            case "drop":
                self.trials.remove(trial)

    def _result(self, call: Call, trial: Trial) -> None:
        result = dict(call.told["result"])
        self.files[trial.trial_id] = call.told["file"]
        answer = self._scheduler.on_trial_result(self, trial, result)
        if answer != call.told["decision"]:
            raise CerebroError(
                f"Call {call.number} to {type(self._scheduler.scheduler.scheduler).__name__}, a result of "
                f"{call.trial}, was answered with {call.told['decision']} and is now with {answer}: the scheduler is "
                "not the one that the experiment was begun with, or goes by something that it was not told."
            )
        _report(trial, result)
        if answer == TrialScheduler.PAUSE:
            self.pause_trial(trial)
        if trial.status == Trial.PAUSED and trial.latest_checkpoint_result is None:
            _keep(trial, self._schedule_trial_save(trial))

    # What schedulers ask of a controller.

    def get_trials(self) -> list[Trial]:  # noqa: D102
        return self.trials

    def get_live_trials(self) -> set[Trial]:  # noqa: D102
        return {trial for trial in self.trials if trial.status != Trial.TERMINATED}

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:  # noqa: D102
        trial.status = Trial.PAUSED

    def stop_trial(self, trial: Trial) -> None:  # noqa: D102
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self._scheduler.on_trial_remove(self, trial)
        elif trial.status == Trial.RUNNING:
            self._scheduler.on_trial_complete(self, trial, flatten_dict(trial.last_result))
        trial.status = Trial.TERMINATED

    def _set_trial_status(self, trial: Trial, status: str) -> None:
        trial.status = status

    def _schedule_trial_save(self, trial: Trial, result: Any = None) -> Snapshot | None:
        file = self.files.get(trial.trial_id)
        if file is None:
            return None
        if file not in self._standings:  # nobody referred to it any more when the driver died, and nobody will
            return Snapshot(0, 0.0, None)
        return self._controller.snapshot_of(self._standings[file])


def check_resume(asked: ResumeConfig) -> None:
    """Trials that failed may be tried again; the others are as the scheduler knows them."""
    usual = ResumeConfig()
    if (asked.unfinished, asked.finished) != (usual.unfinished, usual.finished):
        raise ConfigurationError(
            f"By hops an experiment is taken up with unfinished={usual.unfinished} and finished={usual.finished}, and "
            f"{asked} is asked for: what its scheduler was told would not hold any more. Choose by errored alone "
            "(resume_errored or restart_errored of Tuner.restore)."
        )


def rehearse(controller: Any, scheduler: Recorded, record: Record, known: dict[str, Trial]) -> Rehearsal:
    """Make every noted call again; afterwards trials have the statuses that they had."""
    calls = record.calls()
    known |= {trial.trial_id: trial for trial in _unknown(controller, calls, known)}
    rehearsal = Rehearsal(controller, scheduler, known, record)
    whole = {trial.trial_id: trial.run_metadata.last_result for trial in known.values()}
    for call in calls:
        rehearsal.repeat(call)
    if calls and calls[-1].kind == "result" and calls[-1].told["decision"] == TrialScheduler.STOP:
        rehearsal.stop_trial(known[calls[-1].trial])  # decided, and not carried out
    for trial in known.values():
        if _same_report(whole[trial.trial_id], trial.run_metadata.last_result):
            trial.run_metadata.last_result = whole[trial.trial_id]  # a scheduler is not told what is nested as such
        trial.invalidate_json_state()
        trial.run_metadata.invalidate_cache()
    return rehearsal


def _begin_anew(trial: Trial, text: list[str]) -> None:
    """Make of the trial what it was when it was added: its config too, which the scheduler may have changed since."""
    first = Trial.from_json_state(text[0])
    trial.config, trial.experiment_tag = first.config, first.experiment_tag
    about = trial.run_metadata
    about.checkpoint_manager._latest_checkpoint_result = None
    about.last_result = {}
    about.metric_analysis.clear()
    about.metric_n_steps.clear()


def _report(trial: Trial, flat: dict[str, Any]) -> None:
    """Have the trial's last result be this one."""
    if _same_report(flat, trial.run_metadata.last_result):  # a trial completes with the result that it was stopped at
        trial.run_metadata.last_result["done"] = flat["done"]
    else:
        own = {name: value for name, value in flat.items() if not name.startswith("config/")}
        trial.update_last_result({**own, "config": dict(trial.config)})


def _same_report(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("training_iteration", "timestamp", "time_total_s"))


def _unknown(controller: Any, calls: list[Call], known: Mapping[str, Trial]) -> list[Trial]:
    """Trials that Ray's state does not know, made again from their latest text."""
    texts = {call.trial: call.told["text"] for call in calls if "text" in call.told and call.trial not in known}
    return controller._restore_trials({"trial_data": list(texts.values())}) if texts else []


def mark(search_alg: Any, calls: int) -> None:
    """Have the searcher's state say that it goes up to this call."""
    vars(_innermost(search_alg))[_MARK] = calls


def marked(search_alg: Any, record: Record) -> int:
    """Up to which call the searcher's state goes; DamagedJournalError where the record does not go that far."""
    calls: int = getattr(_innermost(search_alg), _MARK, 0)
    if calls > record.count:
        raise DamagedJournalError(
            f"The record in {record.folder} ends with call {record.count}, and Ray's state of the experiment was "
            f"written after call {calls}: what the disk had is lost. Restore the experiment's folder from a copy, or "
            "begin a new experiment."
        )
    return calls


def _innermost(search_alg: Any) -> Any:
    """The searcher within its wrappers, whose attributes are its state."""
    while hasattr(search_alg, "searcher"):
        search_alg = search_alg.searcher
    return search_alg


def tell_searcher(search_alg: Any, calls: list[Call], known: set[str]) -> None:
    """Tell the searcher again what it was told since its state was written; `known` are the trials it knew then."""
    for call in calls:
        told = call.told
        if call.kind == "add" and call.trial not in known:
            known.add(call.trial)
            with _next_id(call.trial):
                if search_alg.next_trial() is None:
                    warn_user(f"The searcher does not propose {call.trial} again, as it did before.")
        elif call.kind == "result" and told["decision"] != TrialScheduler.STOP:
            search_alg.on_trial_result(call.trial, dict(told["result"]))
        elif call.kind == "complete":
            search_alg.on_trial_complete(call.trial, result=dict(told["result"]))
        elif call.kind == "remove":
            search_alg.on_trial_complete(call.trial)


def latest(record: Record, trial: Trial) -> Standing | None:
    """Where a trial stood last."""
    found = [standing for standing in record.standings().values() if standing.trial == trial.trial_id]
    return found[-1] if found else None


def reports_since(standing: Standing | None, trial: Trial, calls: list[Call]) -> int:
    """How many reports of the trial the scheduler has heard that its standing knows nothing of.

    They are those of a function's last unit, which leaves no state to go on from, and of the function itself.
    """
    heard = [call.told for call in calls if call.kind == "result" and call.trial == trial.trial_id]
    if standing is None:
        return len(heard)
    since = len(heard) - next((at for at, told in enumerate(heard) if told["file"] == standing.file), len(heard))
    # A state that was noted when the trial was started is that of no report of its own.
    is_of_first = since and heard[-since]["result"].get("training_iteration") == standing.iteration
    return since - bool(is_of_first)


@contextmanager
def _next_id(name: str) -> Iterator[None]:
    """The next trial that is made has this id."""
    generate = vars(Trial)["generate_id"]
    Trial.generate_id = classmethod(lambda cls: name)
    try:
        yield
    finally:
        Trial.generate_id = generate


def _take_snapshot(trial: Trial) -> None:
    trial.run_metadata.checkpoint_manager._latest_checkpoint_result = None


def _keep(trial: Trial, snapshot: Snapshot | None) -> None:
    if snapshot is not None:
        result = _TrainingResult(checkpoint=snapshot, metrics=trial.last_result)
        trial.run_metadata.checkpoint_manager._latest_checkpoint_result = result
