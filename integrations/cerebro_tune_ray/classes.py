"""Ray's class API by hops: `step` is one unit, and what `save_checkpoint` writes is the state between two of them."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from ray.tune.experiment import Trial
from ray.tune.experiment.trial import _TrialInfo
from ray.tune.result import TRIAL_INFO
from torch import Tensor
from torch.utils.data import Dataset

from cerebro_tune.errors import NotTrainableError
from cerebro_tune.trainable import Config, Plan, Recipe, Trainable, UnitWork
from cerebro_tune.visiting import visiting
from cerebro_tune_ray.rider import TIMES, Result, Rider
from cerebro_tune_ray.riders import Riders

_NO_END = 1 << 20
"""Epochs of a trial that ends by Ray's stop only."""
_COUNTERS = ("_iteration", "_time_total", "_timesteps_total", "_episodes_total")
_DICT = "dict"


class ClassRecipe(Recipe):
    """A class-API trainable. It runs in the workers as it is; an executor without data needs none for it."""

    suffix = ""
    epochs = _NO_END

    def __init__(self, cls: type) -> None:
        self.cls, self.name = bound(cls), cls.__name__

    def create(self) -> Trainable:  # noqa: D102
        return ClassTrial(self.cls)

    def takes(self, key: str) -> bool:
        """Every key of a config is the class's own."""
        return True

    def model_config(self, config: Config) -> dict[str, Any]:  # noqa: D102
        return dict(config)

    def export(self, state: Mapping[str, Any], path: Path) -> None:
        """Write what `save_checkpoint` wrote, where a stock trial's checkpoint would have it."""
        write_saved(state["saved"], path.parent)


class Nothing(Dataset[int]):
    """The data of an executor that has none: what is trained brings its own."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return 0


class ClassTrial(Trainable):
    """One trial of a class-API trainable in one worker."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def start(self, config: Config, plan: Plan) -> None:  # noqa: D102
        self.trainable = _at_home(self._cls)(config=dict(config))
        self._folder = tempfile.TemporaryDirectory(prefix="cerebro-tune-")

    def run_unit(self, work: UnitWork) -> dict[str, Any]:
        """Call `train`, which calls `step`. The result travels whole: its keys are Ray's and the user's own."""
        with visiting(work):
            return {"result": self.trainable.train()}

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        with self._empty_folder() as folder:
            files = saved(self.trainable, folder)
        return {"saved": files, "counters": {name: vars(self.trainable)[name] for name in _COUNTERS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        vars(self.trainable).update(state["counters"])
        with self._empty_folder() as folder:
            made = _dict_of(state["saved"])
            if made is None:
                write_saved(state["saved"], folder)
            self.trainable.load_checkpoint(str(folder) if made is None else made)

    def change_config(self, old: Config, new: Config) -> None:
        """The class was made with the new config; what of the loaded state goes by it is `load_checkpoint`'s to say."""

    def close(self) -> None:  # noqa: D102
        if hasattr(self, "trainable"):
            self.trainable.stop()
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    @contextmanager
    def _empty_folder(self) -> Iterator[Path]:
        """The trial's folder, emptied afterwards: a new one for each unit would cost more than the rest of it."""
        folder = Path(self._folder.name)
        try:
            yield folder
        finally:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def saved(trainable: Any, folder: Path) -> dict[str, Tensor]:
    """What `save_checkpoint` gives, as bytes by file name; it may write into the folder."""
    try:
        made = trainable.save_checkpoint(str(folder))
    except NotImplementedError:
        name = type(trainable).__name__
        raise NotTrainableError(
            f"{name} has no save_checkpoint, so that its trials could not leave the worker they are on: define "
            f"save_checkpoint and load_checkpoint in {name}."
        ) from None
    if isinstance(made, dict):
        return {_DICT: _tensor(cloudpickle.dumps(made))}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {f"file/{path.relative_to(folder)}": _tensor(path.read_bytes()) for path in files}


def write_saved(files: Mapping[str, Tensor], folder: Path) -> None:
    """Write what `saved` gave into the folder; a dict as Ray writes it."""
    for name, held in files.items():
        path = folder / ("_dict_checkpoint.pkl" if name == _DICT else name.removeprefix("file/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held.numpy().tobytes())


def _dict_of(files: Mapping[str, Tensor]) -> Any:
    """The dict that `save_checkpoint` gave, if it was one."""
    return cloudpickle.loads(files[_DICT].numpy().tobytes()) if _DICT in files else None


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def _at_home(cls: type) -> type:
    """The class with a folder of its own as its logdir: Ray's own lies in the session of an actor, and is entered."""

    def set_up(trainable: Any) -> None:
        trainable._logdir = tempfile.mkdtemp(prefix="cerebro-tune-")

    def clean_up(trainable: Any) -> None:
        cls.cleanup(trainable)  # type: ignore[attr-defined]
        shutil.rmtree(trainable._logdir, ignore_errors=True)

    return type(cls.__name__, (cls,), {"_setup_logdir": set_up, "cleanup": clean_up, "__module__": cls.__module__})


def bound(cls: type) -> type:
    """The class without `tune.with_parameters`, whose values are in Ray's object store: it has them itself."""
    for base in cls.__mro__:
        setup = vars(base).get("setup")
        inside = inspect.getclosurevars(setup).nonlocals if inspect.isfunction(setup) else {}
        if {"parameter_registry", "prefix", "keys"} <= inside.keys():
            registry, prefix = inside["parameter_registry"], inside["prefix"]
            values = {key: registry.get(prefix + key) for key in inside["keys"]}
            return _with(values, bound(base.__mro__[1]), cls.__name__)
    return cls


def _with(values: dict[str, Any], cls: Any, name: str) -> type:
    return type(name, (cls,), {"setup": lambda self, config: cls.setup(self, config, **values)})


class ClassRiders(Riders):
    """Trials of a class-API trainable, whose results are its own."""

    _recipe: ClassRecipe

    _shards = 1  # lengths in steps are what the class's author meant

    def export_model(self, trial: Trial) -> None:
        """Have the class export the trial's last state, in this process."""
        rider = self._riders.get(trial.trial_id)
        if rider is None or rider.hop is None:
            return
        made = ClassTrial(self._recipe.cls)
        made.start(self._given(rider, rider.config), self.executor.plan(1, 1))
        try:
            made.load_state_dict(self.run.state(rider.hop))
            made.trainable.export_model(trial.export_formats, trial.local_path)
        finally:
            made.close()

    def _given(self, rider: Rider, config: Config) -> Config:
        return {**config, TRIAL_INFO: _TrialInfo(rider.trial)}

    def _result(self, rider: Rider, report: Mapping[str, Any]) -> Result:
        shown = {name: report[name] for name in (*TIMES, "units", "shard", "worker")}
        return super()._result(rider, {**shown, **report["result"]})
