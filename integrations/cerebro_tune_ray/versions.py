"""Which Ray this package knows from the inside: what is used of it beyond its public face, and the tested range.

`controller` takes the place of Ray's controller, `hosting` puts it there, and a session; `snapshot` takes that of its
checkpoints; `restoring` makes trials again, `classes` makes class-API trainables outside of an actor. What `schedulers`
reads of each scheduler is looked at there. All else is looked up here, once per process, by name and parameters, so
that a Ray that is built otherwise is refused in a sentence, not found out in mid-search.
"""

from __future__ import annotations

import warnings
from functools import cache

import ray

from cerebro_tune.errors import MissingHostError
from cerebro_tune.hosts import lacking

TESTED = "2.60"
_NEWEST = (2, 60)

_CONTROLLER = "tune.execution.tune_controller.TuneController"
_USED: dict[str, tuple[str, ...]] = {
    f"{_CONTROLLER}.__init__": ("callbacks", "metric", "resume_config", "scheduler", "search_alg", "storage"),
    f"{_CONTROLLER}._checkpoint_trial_if_needed": ("trial", "force"),
    f"{_CONTROLLER}._cleanup_trials": (),
    f"{_CONTROLLER}._maybe_add_actors": (),
    f"{_CONTROLLER}._maybe_update_trial_queue": (),
    f"{_CONTROLLER}._on_training_result": ("trial", "result"),
    f"{_CONTROLLER}._process_trial_save": ("trial", "checkpoint_value"),
    f"{_CONTROLLER}._restore_trials": ("experiment_state",),
    f"{_CONTROLLER}._schedule_trial_export": ("trial",),
    f"{_CONTROLLER}._schedule_trial_pause": ("trial", "should_checkpoint"),
    f"{_CONTROLLER}._schedule_trial_save": ("trial", "result"),
    f"{_CONTROLLER}._schedule_trial_stop": ("trial", "exception"),
    f"{_CONTROLLER}._schedule_trial_train": ("trial",),
    f"{_CONTROLLER}._set_trial_status": ("trial", "status"),
    f"{_CONTROLLER}._trial_task_failure": ("trial", "exception"),
    f"{_CONTROLLER}._validate_result_metrics": ("result",),
    f"{_CONTROLLER}._wrapped": (),
    f"{_CONTROLLER}.resume": ("resume_config",),
    f"{_CONTROLLER}.save_to_dir": (),
    f"{_CONTROLLER}.stop_trial": ("trial",),
    "train._internal.checkpoint_manager._CheckpointManager.latest_checkpoint_result": (),
    "train._internal.session._TrainingResult": ("checkpoint", "metrics"),
    "train._internal.session._session": (),
    "train._internal.storage.StorageContext._update_checkpoint_index": ("metrics",),
    "train._internal.storage.StorageContext.persist_current_checkpoint": ("checkpoint",),
    "train._internal.storage.get_fs_and_path": ("storage_path", "storage_filesystem"),
    "tune.execution.experiment_state._find_newest_experiment_checkpoint": ("experiment_path", "fs"),
    "tune.experiment.Trial.generate_id": (),
    "tune.experiment.Trial.get_json_state": (),
    "tune.experiment.trial._TrialInfo": ("trial",),
    "tune.trainable.Trainable._setup_logdir": (),
    "tune.tune.TuneController": (),
}
"""Where each lies below `ray`, and parameters that it must have."""


@cache
def check() -> None:
    """Look at Ray once: MissingHostError for one that cannot work; one newer than those tested is warned about."""
    if absent := lacking("ray", _USED):
        raise MissingHostError(
            f"Ray {ray.__version__} lacks {', '.join(absent)}, as this package uses it; it works with {TESTED}: "
            f'pip install "ray[tune]=={TESTED}.*".'
        )
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) > _NEWEST:
        warnings.warn(
            f"Ray {ray.__version__} is newer than what cerebro_tune_ray is tested with, {TESTED}.", stacklevel=2
        )
