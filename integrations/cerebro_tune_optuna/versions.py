"""What this package knows of Optuna from the inside, beyond its public face, and the tested range.

`Study.stop` works only in what Optuna takes for its own loop, which `optimizing` is; the progress bar and the settings
of pruners have no public names. The pruners of this package hand Optuna's own arithmetic a study that lists other
trials; that it asks for `get_trials` and `direction` only is what `tests/test_optuna_pruners.py` watches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import optuna
from optuna.progress_bar import _ProgressBar
from optuna.trial import FrozenTrial

from cerebro_tune.errors import MissingHostError

TESTED = "5.0.0"
_NEWEST = (5, 0)
_USED = ("_stop_flag", "_storage.set_trial_user_attr", "_thread_local.in_optimize_loop")
"""Of a study."""


def check(study: optuna.Study) -> None:
    """MissingHostError for an Optuna that cannot work, a warning for one newer than the tested ones."""
    version = optuna.__version__
    if lacking := [f"Study.{name}" for name in _USED if not _has(study, name)]:
        raise MissingHostError(
            f"optuna {version} lacks {', '.join(lacking)}, as this package uses it; it works with {TESTED}: "
            'pip install "optuna>=5.0,<5.1".'
        )
    if tuple(int(part) for part in version.split(".")[:2]) > _NEWEST:
        warnings.warn(
            f"optuna {version} is newer than what cerebro_tune_optuna is tested with, {TESTED}.", stacklevel=2
        )


@contextmanager
def optimizing(study: optuna.Study) -> Iterator[None]:
    """Be the study's loop on this thread: `study.stop()` in an objective or a callback ends it."""
    check(study)
    if study._thread_local.in_optimize_loop:
        raise RuntimeError("Nested invocation of `Study.optimize` method isn't allowed.")  # in Optuna's words
    study._thread_local.in_optimize_loop, study._stop_flag = True, False
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False


def is_stopped(study: optuna.Study) -> bool:
    """Whether `study.stop()` was called in this loop."""
    return study._stop_flag


def progress_bar(shown: bool, n_trials: int | None, timeout: float | None) -> Any:
    """Optuna's own."""
    return _ProgressBar(shown, n_trials, timeout)


def note(study: optuna.Study, trial: optuna.trial.FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a trial that somebody else asked for."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def setting(pruner: optuna.pruners.BasePruner, name: str) -> Any:
    """What a pruner was made with; None where it has no such setting."""
    return getattr(pruner, f"_{name}", None)


def _has(study: optuna.Study, name: str) -> bool:
    try:
        attrgetter(name)(study)
    except AttributeError:
        return False
    return True


def again(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """A trial that is running, as its objective had it: what it suggested it suggests again."""
    return optuna.Trial(study, trial._trial_id)
