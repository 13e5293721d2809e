"""`HopStrategy`: a user's own Trainer trains by hops.

A strategy's launcher is handed the whole fit: the function, model, loaders or DataModule. What becomes of a fit is in
`hopfit`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cerebro_tune.errors import MissingHostError
from cerebro_tune_lightning import versions
from cerebro_tune_lightning.hopfit import HopFit

if TYPE_CHECKING:
    from cerebro_tune.executor import Cerebro
    from cerebro_tune.results import TrialResult

_HOSTS = ("pytorch_lightning", "lightning.pytorch")
_BASE = "strategies.SingleDeviceStrategy"


class HopStrategy:
    """Give it to a Trainer, `pl.Trainer(strategy=HopStrategy(), ...)`, and `fit` trains by hops.

    Args:
        executor: The `Cerebro` that trains; None for the running tuner's, and without a tuner for one of this fit's
            own, with two workers. One that was made without data takes that of the first fit.
        trial: What Optuna calls the objective with; a tuner that has set a seat for this thread needs none.
        metric: What trials are compared by; None for the tuner's, or the monitor of the Trainer's ModelCheckpoint.

    After `fit` the module has the trained weights, and the Trainer what a fit leaves behind: `callback_metrics`,
    `current_epoch`, `global_step`, the state of callbacks, `checkpoint_callback.best_model_path`; `validate`, `test`
    and `predict` work as ever. Hooks and callbacks run in the workers, on copies. Fits of one executor in several
    threads advance side by side; a fit that the tuner pauses waits, one that it stops returns as if
    `trainer.should_stop` had been set. Modules that you build in threads of your own draw their weights from one global
    generator: build them before, or use the class forms, if runs are to repeat. (Ray's function trainables have each
    streams of their own.)
    """

    result: TrialResult | None = None
    """How the last fit went as a trial: its history, visits and checkpoints."""

    def __new__(cls, *args: Any, **kwargs: Any) -> HopStrategy:  # noqa: D102
        kind: type[HopStrategy] = with_bases(cls, hosts_in_use("HopStrategy"), _BASE)  # type: ignore[arg-type]  # it has a hash
        return object.__new__(kind)

    def __init__(self, executor: Cerebro | None = None, trial: Any = None, metric: str | None = None) -> None:
        super().__init__(device="cpu")  # type: ignore[call-arg]  # a host's
        self.executor, self.trial, self.metric = executor, trial, metric

    def _configure_launcher(self) -> None:
        self._launcher = _launcher(self)

    def _settle(self, host: str, trainer: Any) -> None:
        """Be a strategy of the Trainer's package alone, on its device, now that the Trainer is known."""
        plain = type(self).__mro__[1]
        self.__class__ = with_bases(plain, (host,), _BASE)
        self._root_device = trainer._accelerator_connector._parallel_devices[0]


def hosts_in_use(name: str) -> tuple[str, ...]:
    """The packages of Lightning that are imported; MissingHostError if none is."""
    hosts = tuple(host for host in _HOSTS if host in sys.modules)
    if not hosts:
        raise MissingHostError(
            f"{name} is for a Trainer, and neither pytorch_lightning nor lightning.pytorch is imported: import the one "
            'that your Trainer is of (pip install "cerebro-tune[lightning]").'
        )
    return hosts


@cache
def with_bases(cls: type, hosts: tuple[str, ...], base: str) -> type:
    """The class as a strategy, or a plugin, of the hosts: a Trainer takes only those of its own package."""
    package, _, name = base.rpartition(".")
    bases = dict.fromkeys(getattr(import_module(f"{host}.{package}"), name) for host in hosts)
    return type(cls.__name__, (cls, *bases), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _launcher(strategy: Any) -> Any:
    bases = tuple(import_module(f"{host}.strategies.launchers.launcher")._Launcher for host in hosts_in_use("It"))

    class HopLauncher(*bases):  # type: ignore[misc]  # known only when the hosts are
        """Takes `fit` over, and leaves the rest to the Trainer."""

        is_interactive_compatible = True

        def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
            if trainer is None:
                return function(*args, **kwargs)
            host = next(host for host in hosts_in_use("It") if isinstance(trainer, import_module(host).Trainer))
            versions.check(host)
            strategy._settle(host, trainer)
            if trainer.state.fn != "fit":
                return function(*args, **kwargs)
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            fit = HopFit(trainer, host, given, strategy.executor, strategy.trial, strategy.metric)
            try:
                fit.run()
            finally:
                strategy.result = fit.result
            return None

        def kill(self, signum: int) -> None:
            """There are no processes that are the Trainer's."""

    return HopLauncher()
