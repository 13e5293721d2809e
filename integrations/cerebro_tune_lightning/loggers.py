"""Loggers: a worker records what they are told there, and one logger per trial hears of it in the user's process.

What a unit logged travels with its report and is logged when the unit is committed: in order and once, whichever worker
ran it. What is logged before the first unit, hyper-parameters above all, comes from every worker that a trial visits;
the first to be committed counts. Importing this module imports no Lightning.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from operator import attrgetter, methodcaller
from typing import Any

import cloudpickle
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cerebro_tune.errors import ConfigurationError, NotPicklableError
from cerebro_tune_lightning.callbacks import derives

Call = tuple[int, str, tuple[Any, ...] | bytes, dict[str, Any]]
"""Of which logger, which method, with what: all of it in the place of the arguments where it is pickled."""

_OF_FILES = ("CSVLogger", "TensorBoardLogger")
"""Lightning's loggers that write files of their own under a version, of which one can be made like another."""
_HOSTS = ("pytorch_lightning", "lightning.pytorch")
_GONE_WELL = ("finished", "stopped", "paused")


@dataclass(frozen=True)
class Facts:
    """What a module may ask of a logger: its class, its name, version and folders."""

    kind: type | None = None
    named: tuple[Any, ...] = ("", "", None, None, None)

    @classmethod
    def of(cls, logger: Any) -> Facts:
        """Those of a logger that is there."""
        return cls(type(logger), tuple(_asked(logger, name) for name in _NAMED))


_NAMED = ("name", "version", "save_dir", "root_dir", "log_dir")


def _asked(logger: Any, name: str) -> Any:
    value = getattr(logger, name, None)
    return value if isinstance(value, str | int | os.PathLike) else None


# In a worker.


class Recording:
    """The loggers of a kept Trainer: they write nothing, and remember what they are told.

    Calls of `logger.experiment` and of what else a logger can do are remembered likewise, and return None. `dummy` is
    the DummyLogger of the host. `loggers` says what those are that a module sees; None is one that nobody listens to.
    """

    def __init__(self, dummy: Any, loggers: Sequence[Facts] | None) -> None:
        self._opening: list[Call] = []
        self._calls: list[Call] = []
        made = [_make_recorder(dummy, self._calls, i, facts) for i, facts in enumerate(loggers or ())]
        self.loggers = [dummy()] if loggers is None else made

    def begin(self) -> None:
        """What was logged so far comes before the first unit."""
        self._opening.extend(self._calls)
        self._calls.clear()

    def clear(self) -> None:
        """Forget what an earlier unit, or a first try of this one, logged."""
        self._calls.clear()

    def take(self) -> bytes | None:
        """What was logged, for `Log.hear`; what came before the first unit is given once."""
        if not self._opening and not self._calls:
            return None
        taken: bytes = cloudpickle.dumps((self._opening, self._calls))
        self._opening.clear()
        return taken


def _make_recorder(dummy: Any, calls: list[Call], index: int, facts: Facts) -> Any:
    class Recorder(dummy):  # type: ignore[misc]  # known only when the module's class is
        __module__ = dummy.__module__  # a module that keeps one in an attribute keeps something of Lightning's
        name, version, save_dir, root_dir, log_dir = facts.named
        experiment = _Experiment(calls, index)

        @property  # type: ignore[misc]  # it is only read
        def __class__(self) -> Any:  # what `isinstance` looks at, and code that writes to TensorBoard asks
            return facts.kind or Recorder

        def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
            calls.append((index, "log_metrics", (_numbers(metrics), step), {}))

        def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
            calls.append((index, "log_hyperparams", (_portable(params), *args), kwargs))

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return partial(_record, calls, index, name)

    return Recorder()


class _Experiment:
    """Stands for what a logger writes with: a SummaryWriter, a run of a service."""

    def __init__(self, calls: list[Call], index: int) -> None:
        self._calls, self._index = calls, index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(_record, self._calls, self._index, f"experiment.{name}")


def _record(calls: list[Call], index: int, method: str, *args: Any, **kwargs: Any) -> None:
    """Remember a call with what it is given now: tensors and figures may be other ones by the time it is made."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), (args, kwargs))
    try:
        given = cloudpickle.dumps((args, kwargs))
    except Exception as error:  # pickling runs code of the object's own, which may raise anything
        raise NotPicklableError(
            f"logger.{method} is called in a worker with what cannot travel to the logger: {type(error).__name__}: "
            f"{error}. Give it numbers, text, tensors, arrays or figures."
        ) from error
    calls.append((index, method, given, {}))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as they are now, without the device."""
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _numbers(value)
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.numel() == 1 else value.detach().cpu().clone()


def _portable(params: Any) -> dict[str, Any]:
    """Hyper-parameters, of which those that cannot be pickled become text, as they do in a logger."""
    values = vars(params) if isinstance(params, Namespace) else params or {}
    return {name: value if _travels(value) else str(value) for name, value in values.items()}


def _travels(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # noqa: BLE001  # pickling runs code of the object's own, which may raise anything
        return False
    return True


# In the user's process.


@dataclass(frozen=True)
class Elsewhere:
    """Stands for loggers that hear of a trial by other ways: those of a user's own Trainer."""

    loggers: tuple[Facts, ...]


class TrialLoggers:
    """The loggers of a trainable's trials, made of what was given as the Trainer's `logger`.

    It travels to the workers as what a module is to see there.
    """

    def __init__(self, given: Any) -> None:
        self._makers = [] if isinstance(given, Elsewhere) else _makers(given)
        seen = given.loggers if isinstance(given, Elsewhere) else (Facts(),) * len(self._makers)
        self.recorded = None if given is None else seen
        """The loggers that a worker is to record; None for one that nobody listens to."""
        self._logs: dict[str, Log] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TrialLoggers, (None if self.recorded is None else Elsewhere(self.recorded),)

    def hear(self, trial_id: str, logged: bytes) -> None:
        """Tell the trial's loggers what its next unit logged."""
        if trial_id not in self._logs:
            self._logs[trial_id] = Log([make(trial_id) for make in self._makers], trial_id)
        self._logs[trial_id].hear(logged)

    def end(self, trial_id: str, status: str) -> None:
        """Finalize the trial's loggers; it has this status now."""
        if log := self._logs.pop(trial_id, None):
            log.end("success" if status in _GONE_WELL else "failed")


class Log:
    """The loggers of one trial. One that raises is told no more: it must not end the other trials of its run."""

    def __init__(self, loggers: Sequence[Any], trial: str) -> None:
        self._loggers, self._trial = list(loggers), trial
        self._opened = False
        self._failed: set[int] = set()
        # TensorBoard's last: Weights & Biases has to be there before it, and CSVLogger wants an empty folder.
        for index in sorted(range(len(loggers)), key=lambda i: derives(loggers[i], _OF_FILES[1:], "loggers") or ""):
            self._do(index, lambda logger: hasattr(logger, "experiment"))  # which makes it

    def hear(self, logged: bytes) -> None:
        """Log what `Recording.take` gave of the next unit."""
        opening, calls = cloudpickle.loads(logged)
        for index, method, args, kwargs in calls if self._opened else [*opening, *calls]:
            self._do(index, partial(_call, method, args, kwargs))
        self._opened = True
        for index in range(len(self._loggers)):
            self._do(index, methodcaller("save"))

    def end(self, status: str, savers: Iterable[Any] = ()) -> None:
        """Finalize the loggers; `status` is Lightning's, "success" or "failed", `savers` wrote the checkpoints."""
        for index in range(len(self._loggers)):
            for saver in savers:
                self._do(index, methodcaller("after_save_checkpoint", saver))
            self._do(index, methodcaller("finalize", status))

    def _do(self, index: int, action: Callable[[Any], Any]) -> None:
        if index in self._failed:
            return
        try:
            action(self._loggers[index])
        except Exception as error:  # noqa: BLE001  # a service that is away, a full disk, a value that it cannot log
            self._failed.add(index)
            warnings.warn(
                f"The {type(self._loggers[index]).__name__} of {self._trial} hears no more of it, since it raised "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def _call(method: str, args: Any, kwargs: Any, logger: Any) -> None:
    """Do what was recorded."""
    if isinstance(args, bytes):
        args, kwargs = cloudpickle.loads(args)
    attrgetter(method)(logger)(*args, **kwargs)


def _makers(given: Any) -> list[Callable[[str], Any]]:
    """For each logger given, what makes that of a trial."""
    if given is None or given is False:
        return []
    if given is True:
        return [_default]
    if derives(given, _OF_FILES, "loggers"):
        refuse_graphs([given])
        return [partial(_own_version, given)]
    if hasattr(given, "log_metrics") and not isinstance(given, type):
        name = type(given).__name__
        raise ConfigurationError(
            f"The {name} given as logger is one run of its service, and every trial needs its own: give a function "
            f"that makes it, logger=lambda trial_id: {name}(...)."
        )
    if callable(given):
        return [partial(_made, given)]
    if isinstance(given, Iterable) and not isinstance(given, str):
        return [maker for each in given for maker in _makers(each)]
    raise ConfigurationError(
        f"logger is {given!r}; valid: a CSVLogger or TensorBoardLogger, which each trial gets a version of, a function "
        "that makes the logger of a trial from its id, True for Lightning's default, False for none, or a list of them."
    )


def refuse_graphs(loggers: Iterable[Any]) -> None:
    """Raise ConfigurationError for a logger that wants to trace the module, which is in the workers."""
    for logger in loggers:
        if derives(logger, _OF_FILES, "loggers") and getattr(logger, "_log_graph", False):
            raise ConfigurationError(
                f"The {type(logger).__name__} has log_graph=True, but the module is in the workers: leave it out, and "
                "draw the graph of a module of your own with logger.experiment.add_graph(module, batch)."
            )


def _made(make: Callable[[str], Any], trial_id: str) -> Any:
    logger = make(trial_id)
    if not hasattr(logger, "log_metrics"):
        raise ConfigurationError(
            f"The function given as logger made {logger!r} for {trial_id}; it must return a Lightning logger."
        )
    if derives(logger, ("WandbLogger",), "loggers") and logger._experiment is None:
        raise ConfigurationError(
            "The function given as logger made a WandbLogger without a run, which takes the one that is open in this "
            "process, of whichever trial: give it a run of its own, "
            'WandbLogger(experiment=wandb.init(name=trial_id, reinit="create_new")).'
        )
    return logger


def _default(trial_id: str) -> Any:
    """What Lightning takes for `logger=True`, where it would have it."""
    host = next(
        host for host in sorted(_HOSTS, key=lambda host: host not in sys.modules) if find_spec(host.partition(".")[0])
    )
    kind = "TensorBoardLogger" if find_spec("tensorboard") or find_spec("tensorboardX") else "CSVLogger"
    return _own_version(getattr(import_module(f"{host}.loggers"), kind)(os.getcwd()), trial_id)


def _own_version(prototype: Any, trial_id: str) -> Any:
    """A logger like the prototype, in a folder named by the trial; a number follows where an earlier run has that."""
    logger = copy.deepcopy(prototype)
    logger._experiment = None
    given = logger._version
    above = "" if given is None else f"{given}/" if isinstance(given, str) else f"version_{given}/"
    for suffix in count():
        logger._version = f"{above}{trial_id}-{suffix}" if suffix else f"{above}{trial_id}"
        if not logger._fs.exists(logger.log_dir):
            break
    return logger
