"""What is trained where a module is given as it is, with the weights it has: by a fit, or to an executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle

from cerebro_tune.errors import ConfigurationError, NotPicklableError
from cerebro_tune.trainable import Config, Plan, Recipe, Trainable
from cerebro_tune_lightning import checkpoint
from cerebro_tune_lightning.trainable import LightningTrainable


def pickled(what: Any, name: str) -> bytes:
    """What is to travel, as bytes; `name` begins the sentence of the NotPicklableError."""
    try:
        made: bytes = cloudpickle.dumps(what)
    except Exception as error:  # pickling runs code of the object's own, which may raise anything
        raise NotPicklableError(
            f"{name} cannot be sent to the workers: {type(error).__name__}: {error}. Make in setup() or "
            "on_train_start() what cannot travel (open files, locks, connections): these are called in every worker."
        ) from error
    return made


class InstanceRecipe(LightningTrainable):
    """A module instance: every trial begins with the weights that it has now."""

    def __init__(self, module: Any) -> None:
        name = type(module).__name__
        packed = pickled(module, f"The module {name}")
        super().__init__(lambda _: cloudpickle.loads(packed))
        self.name = name

    def check_config(self, config: Config) -> None:  # noqa: D102
        if unread := sorted(config.keys() - {"batch_size", "epochs"}):
            raise ConfigurationError(
                f"A config has {', '.join(unread)}, but {self.name} is given as an instance, which is trained as it "
                f"is: give the class {self.name}, or a LightningTrainable of a function, to try out configs."
            )


@dataclass
class Fit:
    """What one fit trains, as it travels in a trial's config."""

    module: bytes
    trainer_kwargs: bytes
    name: str
    hear: Callable[[bytes], None] | None = field(default=None, compare=False)
    """Takes what the trial logs, in the process of the fit; it does not travel."""

    def release(self) -> None:
        """Let go of what has arrived: a run would hold the weights of each of its trials until its end."""
        self.module = self.trainer_kwargs = b""

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return Fit, (self.module, self.trainer_kwargs, self.name)


class FitRecipe(Recipe):
    """Trains what the config brings under `fit`: the trials of one run may be modules of different classes.

    Under `given` it may bring the config that the module was made with, so that a change of it takes effect.
    """

    name, suffix = "fit", ".ckpt"

    def create(self) -> Trainable:  # noqa: D102
        from cerebro_tune_lightning.trial import LightningTrial

        class FitTrial(LightningTrial):
            """A trial of the module in the config."""

            def __init__(self) -> None:
                """Nothing is known before the config is."""

            def start(self, config: Config, plan: Plan) -> None:
                fit: Fit = config["fit"]
                kwargs = cloudpickle.loads(fit.trainer_kwargs)
                self._recipe = LightningTrainable(lambda _: cloudpickle.loads(fit.module), trainer_kwargs=kwargs)
                super().start(config.get("given", {}), replace(plan, accumulate=self._recipe.accumulate))

            def change_config(self, old: Config, new: Config) -> None:
                super().change_config(old.get("given", {}), new.get("given", {}))

        return FitTrial()

    def log(self, trial_id: str, config: Config, logged: Any) -> None:  # noqa: D102
        config["fit"].hear(logged)

    def export(self, state: dict[str, Any], path: Path) -> None:  # noqa: D102
        checkpoint.export(state, path)
