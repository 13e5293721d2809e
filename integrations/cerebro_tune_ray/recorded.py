"""The scheduler of a search by hops: what it is told is noted before its answer is carried out, and can be told again.

Told again, in the same order and with the same random numbers, to a scheduler that is as it was at the beginning, it
gives the same answers, and has its rungs, brackets or population back. A call that a scheduler makes from inside
another (HyperBand, which stops others of a bracket when one of it reports) is not noted: it comes by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from ray.tune.experiment import Trial

from cerebro_tune_ray.record import Record
from cerebro_tune_ray.score import Judged

_Generators = tuple[tuple[Any, ...], Any]
"""The states of the global generators of Python and of NumPy."""


class Recorded:
    """A scheduler that is told as Ray tells it; what is not here is the scheduler's own."""

    record: Record | None = None

    def __init__(self, scheduler: Judged) -> None:
        self.scheduler = scheduler
        self.file: Callable[[Trial], str | None] = lambda trial: None
        """The file of the state that a trial reports from."""
        self._inside = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    # As Ray calls them.

    def on_trial_add(self, controller: Any, trial: Trial) -> None:  # noqa: D102
        self._call("add", trial, lambda: self.scheduler.on_trial_add(controller, trial), text=trial.get_json_state())

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:  # noqa: D102
        told = {"result": dict(result), "file": self.file(trial)}
        call = lambda: self.scheduler.on_trial_result(controller, trial, result)  # noqa: E731
        return str(self._call("result", trial, call, **told))

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:  # noqa: D102
        call = lambda: self.scheduler.on_trial_complete(controller, trial, result)  # noqa: E731
        self._call("complete", trial, call, result=dict(result))

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:  # noqa: D102
        self._call("remove", trial, lambda: self.scheduler.on_trial_remove(controller, trial))

    def on_trial_error(self, controller: Any, trial: Trial) -> None:  # noqa: D102
        self._call("error", trial, lambda: self.scheduler.on_trial_error(controller, trial))

    def started(self, trial: Trial) -> None:
        """Ray starts a trial, of which no scheduler is told."""
        if self.record is not None:
            self.record.note("start", trial.trial_id, text=trial.get_json_state())

    def dropped(self, trial: Trial) -> None:
        """Another takes the place of a trial that failed."""
        if self.record is not None:
            self.record.note("drop", trial.trial_id)

    def _call(self, kind: str, trial: Trial, call: Callable[[], Any], **told: Any) -> Any:
        if self._inside or self.record is None:
            return call()
        self._inside, before = True, (random.getstate(), np.random.get_state())
        try:
            answer = call()
        finally:
            self._inside = False
        if _moved(before):
            told["generators"] = _plain(before)
        self.record.note(kind, trial.trial_id, decision=answer, **told)
        return answer


def _moved(before: _Generators) -> bool:
    """Whether the global generators have been drawn from, or set, since."""
    python, (_, words, *rest) = before
    _, words_now, *rest_now = np.random.get_state()
    return random.getstate() != python or rest_now != rest or not np.array_equal(words_now, words)


def _plain(generators: _Generators) -> list[Any]:
    """Where the global generators of Python and NumPy were in their streams, as plain data."""
    (version, words, gauss), (kind, keys, *rest) = generators
    return [[version, list(words), gauss], [kind, np.asarray(keys).tolist(), *rest]]


def set_generators(saved: list[Any]) -> None:
    """Put the generators where they were."""
    (version, words, gauss), (kind, keys, *rest) = saved
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
