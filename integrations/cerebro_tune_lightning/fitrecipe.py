"""What is trained where a module is given as it is, with the weights it has: by a fit, or to an executor."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from cerebro_tune.configtext import config_text
from cerebro_tune.data.fingerprint import digest_of
from cerebro_tune.errors import ConfigurationError, NotPicklableError
from cerebro_tune.sources import source_digest
from cerebro_tune.trainable import Config, Plan, Recipe, Trainable
from cerebro_tune_lightning import checkpoint
from cerebro_tune_lightning.trainable import LightningTrainable


def pickled(what: Any, name: str) -> bytes:
    """What is to travel, as bytes; `name` begins the sentence of the NotPicklableError."""
    try:
        with BytesIO() as made:
            _Pickler(made).dump(what)
            return made.getvalue()
    except Exception as error:  # pickling runs code of the object's own, which may raise anything
        raise NotPicklableError(
            f"{name} cannot be sent to the workers: {type(error).__name__}: {error}. Make in setup() or "
            "on_train_start() what cannot travel (open files, locks, connections): these are called in every worker."
        ) from error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Keeps what a plain pickle of a module leaves out: which tensors share memory, and hooks of parameters."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file)
        self._protocol = pickle.DEFAULT_PROTOCOL
        self._storages: dict[int, Any] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            first = self._storages.setdefault(obj._untyped_storage._cdata, obj)
            return NotImplemented if first is obj else (_itself, (first,))
        if isinstance(obj, torch.nn.Parameter) and (hooks := {n: h for n in _HOOKS if (h := getattr(obj, n))}):
            make, given, *_ = obj.__reduce_ex__(self._protocol)  # type: ignore[no-untyped-call]  # torch's
            return make, given, hooks, None, None, _set_hooks
        return super().reducer_override(obj)


_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _set_hooks(parameter: torch.nn.Parameter, hooks: Mapping[str, Any]) -> None:
    for name, own in hooks.items():
        setattr(parameter, name, own)


def _itself(value: Any) -> Any:
    return value


class InstanceRecipe(LightningTrainable):
    """A module instance: every trial begins with the weights that it has now."""

    def __init__(self, module: Any) -> None:
        name = type(module).__name__
        packed = pickled(module, f"The module {name}")
        super().__init__(lambda _: cloudpickle.loads(packed))
        self.name = name
        self._packed = packed

    @property
    def identity(self) -> str:  # noqa: D102
        module = cloudpickle.loads(self._packed)
        weights = digest_of(list(module.state_dict().items()))
        return f"{source_digest(type(module))} {weights} {config_text(dict(getattr(module, 'hparams', {})))}"

    def check_config(self, config: Config) -> None:  # noqa: D102
        if unread := sorted(config.keys() - {"batch_size", "epochs"}):
            raise ConfigurationError(
                f"A config has {', '.join(unread)}, but {self.name} is given as an instance, which is trained as it "
                f"is: give the class {self.name}, or a LightningTrainable of a function, to try out configs."
            )


class OneFit(LightningTrainable):
    """One module and what its Trainer is made with, both there already: callbacks may hold parts of the module."""

    def __init__(self, module: Any, trainer_kwargs: Mapping[str, Any]) -> None:
        super().__init__(lambda _: module, trainer_kwargs=trainer_kwargs)

    def kwargs_of_trial(self) -> dict[str, Any]:  # noqa: D102
        return self.trainer_kwargs


@dataclass
class Fit:
    """What one fit trains, as it travels in a trial's config."""

    packed: bytes
    """The module and the arguments of its Trainer, in one pickle: what they share, they share in a worker."""
    name: str
    hear: Callable[[bytes], None] | None = field(default=None, compare=False)
    """Takes what the trial logs, in the process of the fit; it does not travel."""

    def release(self) -> None:
        """Let go of what has arrived: a run would hold the weights of each of its trials until its end."""
        self.packed = b""

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return Fit, (self.packed, self.name)


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
                self._recipe = OneFit(*cloudpickle.loads(config["fit"].packed))
                super().start(config.get("given", {}), replace(plan, accumulate=self._recipe.accumulate))

            def change_config(self, old: Config, new: Config) -> None:
                super().change_config(old.get("given", {}), new.get("given", {}))

        return FitTrial()

    def log(self, trial_id: str, config: Config, logged: Any) -> None:  # noqa: D102
        config["fit"].hear(logged)

    def export(self, state: dict[str, Any], path: Path) -> None:  # noqa: D102
        checkpoint.export(state, path)
