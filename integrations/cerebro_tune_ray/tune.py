"""`ray.tune` with one more argument: `run(..., executor=cerebro)` and `Tuner(..., executor=cerebro)` train by hops.

Without an executor, and in everything else, this module *is* `ray.tune`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray.tune as _ray_tune

from cerebro_tune_ray.boarding import boarded, check_executor
from cerebro_tune_ray.hosting import check_folder

if TYPE_CHECKING:
    from ray.tune import ExperimentAnalysis, ResultGrid

    from cerebro_tune.executor import Cerebro


def __getattr__(name: str) -> Any:
    return getattr(_ray_tune, name)


def run(run_or_experiment: Any, *args: Any, executor: Cerebro | None = None, **kwargs: Any) -> ExperimentAnalysis:
    """`ray.tune.run`; with an executor each `training_iteration` is a unit of it, and trials hop.

    What may be trained then is all that `Cerebro.fit` trains, a class-API Trainable of Ray, whose `step` is one unit,
    and a function whose Trainer has `strategy=HopStrategy()`. `executor.live_trials` says how many trials run side by
    side.
    """
    if executor is None:
        return _ray_tune.run(run_or_experiment, *args, **kwargs)
    check_executor(executor)
    found = boarded(run_or_experiment)
    with found.on(executor):
        return _ray_tune.run(found.stand_in, *args, **kwargs)


class Tuner(_ray_tune.Tuner):
    """`ray.tune.Tuner`; with an executor its trials hop, as those of `run` do."""

    def __init__(self, trainable: Any = None, *, executor: Cerebro | None = None, **kwargs: Any) -> None:
        self._executor, self._found = executor, None
        if executor is not None:
            check_executor(executor)
            self._found = boarded(trainable)
            trainable = self._found.stand_in
            check_folder(kwargs.get("run_config"))
        super().__init__(trainable, **kwargs)

    @classmethod
    def restore(cls, path: str, trainable: Any, *, executor: Cerebro | None = None, **kwargs: Any) -> Tuner:
        """`ray.tune.Tuner.restore`; with an executor it takes up an experiment whose driver has died.

        Every trial goes on from its last report, and the scheduler has its rungs, brackets or population. The executor
        is made as it was made for the experiment.
        """
        if executor is None:
            return super().restore(path, trainable, **kwargs)
        check_executor(executor)
        found = boarded(trainable)
        plain = super().restore(path, found.stand_in, **kwargs)
        tuner = cls(_tuner_internal=plain._local_tuner)
        tuner._executor, tuner._found = executor, found
        return tuner

    def fit(self) -> ResultGrid:
        """Run the experiment."""
        if self._executor is None or self._found is None:
            return super().fit()
        with self._found.on(self._executor):
            return super().fit()
