"""What a call of Ray Tune is given to train: the class that Ray knows it by, and what its trials are here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray.tune
from ray.tune.experiment import Experiment
from ray.tune.registry import get_trainable_cls
from ray.tune.trainable import FunctionTrainable, wrap_function

from cerebro_tune.data import ShardedDataset
from cerebro_tune.errors import ConfigurationError, NotTrainableError
from cerebro_tune.trainable import Recipe, as_recipe
from cerebro_tune.warn import warn_user
from cerebro_tune_ray.classes import ClassRecipe, ClassRiders, Nothing
from cerebro_tune_ray.functions import FunctionRiders
from cerebro_tune_ray.hosting import hopping
from cerebro_tune_ray.rider import Controller
from cerebro_tune_ray.riders import Riders

if TYPE_CHECKING:
    from cerebro_tune.executor import Cerebro


@dataclass(frozen=True)
class Boarded:
    """What is trained: as Ray knows it, and as the executor does."""

    stand_in: type
    make_riders: Callable[[Cerebro, Controller], Riders]

    @contextmanager
    def on(self, executor: Cerebro) -> Iterator[None]:
        """Within, `ray.tune` trains it by hops."""
        with hopping(partial(self.make_riders, executor)):
            yield


def boarded(given: Any) -> Boarded:
    """What a user gave to train; NotTrainableError for what cannot be stopped between units."""
    if isinstance(given, Experiment | list):
        raise NotTrainableError(
            f"{given!r} cannot be trained on an executor: give what is to be trained, and the rest as arguments of run."
        )
    found: Any = get_trainable_cls(given) if isinstance(given, str) else given
    if _is_class(found, FunctionTrainable):
        return _function(found)
    if _is_class(found, ray.tune.Trainable):
        _explain_resources(found.__name__, found.default_resource_request({}))
        return Boarded(found, partial(_class_riders, ClassRecipe(found)))
    if _is_function(found):
        _explain_resources(_name(found), getattr(found, "_resources", None))
        return _function(wrap_function(found, name=_name(found)))
    recipe = as_recipe(found)
    return Boarded(_stand_in(recipe), lambda executor, controller: Riders(executor, recipe, controller))


def _is_class(given: Any, kind: type) -> bool:
    return isinstance(given, type) and issubclass(given, kind)


def _is_function(given: Any) -> bool:
    return callable(given) and not isinstance(given, type | Recipe) and not hasattr(given, "training_step")


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _function(wrapped: Any) -> Boarded:
    """A function as Ray wraps it: with its results, yielded or returned, and its return reported."""
    call = partial(wrapped._trainable_func, None)
    return Boarded(wrapped, lambda executor, controller: FunctionRiders(executor, call, wrapped._name, controller))


def _class_riders(recipe: ClassRecipe, executor: Cerebro, controller: Controller) -> Riders:
    if not executor.has_data:
        executor.use_data(ShardedDataset.index(Nothing(), num_shards=1))
    return ClassRiders(executor, recipe, controller)


def _stand_in(recipe: Recipe) -> type:
    """A class by which Ray knows what is trained; no actor ever makes one."""

    def default_resource_request(cls: type, config: Any) -> None:
        """Trials have no resources of their own."""

    return type(recipe.name, (ray.tune.Trainable,), {"default_resource_request": classmethod(default_resource_request)})


def _explain_resources(name: str, resources: Any) -> None:
    if resources:
        warn_user(
            f"{name} asks for resources for each of its trials, {resources}; by hops trials share the executor's "
            "workers: say what these have with workers=, devices= or, on a Ray cluster, resources_per_worker= of "
            "Cerebro."
        )


def check_executor(executor: Any) -> None:
    """Raise ConfigurationError for what is no executor."""
    from cerebro_tune.executor import Cerebro

    if not isinstance(executor, Cerebro):
        raise ConfigurationError(f"executor is {executor!r}; it must be a cerebro_tune.Cerebro, or None for stock Ray.")
