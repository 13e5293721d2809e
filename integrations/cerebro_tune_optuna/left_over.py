"""Trials that a killed process has left RUNNING in a study: found again, to go on or to be told.

Every trial of ours notes which process trains it, and below which folder that writes its runs. A process of this
machine that is gone will tell nothing any more. Of those on other machines nothing can be known here.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from cerebro_tune.executor import Cerebro
from cerebro_tune.journal import NAME as JOURNAL
from cerebro_tune_optuna import versions

PROCESS, FOLDER, PRUNED = "process", "folder", "pruned"
"""The user attributes that say who trains a trial, where its checkpoints lie, and, by that, that it was pruned."""
_SAME_START_S = 0.01
"""Systems count in hundredths of a second."""


def runs_of(executor: Cerebro) -> Path:
    """The folder below which the executor's runs write."""
    return (Path("runs") if executor.run_dir is None else executor.run_dir).absolute()


def this_process(executor: Cerebro) -> dict[str, Any]:
    """What a trial notes."""
    started_s, runs = _started_s(psutil.Process()), str(runs_of(executor))
    return {"host": socket.gethostname(), "pid": os.getpid(), "started_s": started_s, "runs": runs}


def find(study: optuna.Study, executor: Cerebro) -> list[FrozenTrial]:
    """What a killed process of this run directory has left behind."""
    here, found = this_process(executor), []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get(PROCESS)
        if owner is None or any(owner[key] != here[key] for key in ("host", "runs")) or _is_alive(owner):
            continue
        found.append(trial)
    return found


def run_of(trial: FrozenTrial) -> tuple[Path | None, str]:
    """The folder of the run that trained it, if that has a journal, and its id there."""
    place = Path(trial.user_attrs.get(FOLDER, ""))
    return (place.parent if (place.parent / JOURNAL).exists() else None), place.name


def was_pruned(trial: FrozenTrial) -> bool:
    """Whether a pruner had ended it; what a trial that is tried again has inherited is of another folder."""
    return PRUNED in trial.user_attrs and trial.user_attrs[PRUNED] == trial.user_attrs.get(FOLDER)


def tell(study: optuna.Study, trial: FrozenTrial, why: str = "") -> None:
    """Tell FAIL for a trial that nobody goes on with, PRUNED where it was."""
    owner, pruned = trial.user_attrs[PROCESS], was_pruned(trial)
    with suppress(UpdateFinishedTrialError):  # another process has found it, too
        if not pruned:
            versions.note(study, trial, "error", f"process {owner['pid']}, which trained it, has been killed{why}")
        study.tell(trial.number, state=TrialState.PRUNED if pruned else TrialState.FAIL, skip_if_finished=True)


def _is_alive(owner: dict[str, Any]) -> bool:
    try:
        started_s = _started_s(psutil.Process(owner["pid"]))
    except psutil.NoSuchProcess:
        return False
    return bool(abs(started_s - owner["started_s"]) < _SAME_START_S)


def _started_s(process: psutil.Process) -> float:
    """When it was started, in seconds since the machine was: no setting of the clock changes that."""
    return float(process.create_time() - psutil.boot_time())
