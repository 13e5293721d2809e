"""One trial of a LightningModule in one worker: its state as a Lightning checkpoint, its units, its config."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from cerebro_tune.adopt import gradients, load_gradients, load_model, unlisted
from cerebro_tune.attributes import Attributes, modules_of
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.trainable import Config, Plan, Trainable, UnitWork, change_optimizers, note_groups
from cerebro_tune_lightning import carry, groups, results
from cerebro_tune_lightning.checkpoint import EXTRAS, make_safe
from cerebro_tune_lightning.loops import KeptTrainer
from cerebro_tune_lightning.trainable import LightningTrainable, namespace


class LightningTrial(Trainable):
    """One trial in one worker: a module and the Trainer that is kept for it."""

    def __init__(self, recipe: LightningTrainable) -> None:
        self._recipe = recipe

    def start(self, config: Config, plan: Plan) -> None:  # noqa: D102
        self._config, self._plan = config, plan
        self.module = self._recipe.build(config)
        host = namespace(type(self.module)) or ""
        kwargs, loggers = self._recipe.kwargs_of_trial(), self._recipe.loggers.recorded
        self._kept = KeptTrainer(self.module, host, plan, kwargs, loggers)
        self._note_fresh_groups()
        private = vars(import_module(host).LightningModule())
        callbacks = [(f"callbacks[{i}].{type(each).__name__}", each) for i, each in enumerate(self._kept.callbacks)]
        self._attributes = Attributes(lambda: self._owners(callbacks), private, results.is_metric)
        self._asides = carry.Asides(self.module, self._attributes)

    @property
    def trainer(self) -> Any:
        """The Trainer that is kept."""
        return self._kept.trainer

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks that came with the trainable and the module."""
        return self._kept.callbacks

    @property
    def should_stop(self) -> bool:  # noqa: D102
        return self._kept.should_stop

    def run_unit(self, work: UnitWork) -> dict[str, float]:  # noqa: D102
        self._begin()
        return self._kept.run(work)

    def conclude(self) -> None:
        """End a trial that was stopped from outside: call the hooks that follow the last epoch, if they were not."""
        self._kept.conclude()

    def take_log(self) -> bytes | None:  # noqa: D102
        return self._kept.take_log()

    def state_dict(self) -> dict[str, Any]:
        """A Lightning checkpoint; what it lacks is under the key "cerebro_tune"."""
        tree = self._kept.dump()
        self._add_hyper_parameters(tree)
        left_out = []
        for key in tree.keys() & {"hyper_parameters", "datamodule_hyper_parameters"}:
            tree[key], unsafe = make_safe(tree[key])
            left_out += [f"{key}.{name}" for name in unsafe]
        tree[EXTRAS] = {
            "left_out": left_out,
            "flags": carry.flags(self.module),
            "progress": self._kept.dump_progress(),
            "metrics": results.dump_metrics(self.module),
            "attributes": self._attributes.dump(),
            "tensors": unlisted(self.module, tree["state_dict"]),
            "asides": self._asides.dump(),
            "groups": groups.names_of(self.module, self.trainer.optimizers),
            "batch_size": self._plan.batch_size,
            "first_rates": self._first_rates,
            "gradients": gradients(self.module) if self._kept.gradients_count else {},
        }
        return tree

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        tree = dict(state)
        extras = tree.pop(EXTRAS)
        self._begin()
        if self._kept.hooked:  # which Lightning calls on a fresh build
            self._attributes.load({})
        saved = dict(tree["state_dict"])
        hook = partial(self._call_load_hook, tree) if self._kept.module_overrides("on_load_checkpoint") else None
        load_model(self.module, saved, extras["tensors"], hook, bool(self.module.strict_loading))
        carry.load_flags(self.module, extras["flags"])
        load_gradients(self.module, extras["gradients"])
        results.restore_metrics(self.module, extras["metrics"])
        self._asides.load(extras["asides"])
        self._kept.restore(tree, extras["groups"])
        self._kept.restore_progress(extras["progress"])
        put = self._attributes.dump() if self._kept.hooked else {}
        carried = extras["attributes"]
        self._attributes.load({name: put.get(name, {}) | carried.get(name, {}) for name in {*put, *carried}})
        self._first_rates = extras["first_rates"]
        self._check_batch_size(extras["batch_size"])

    def change_config(self, old: Config, new: Config) -> None:  # noqa: D102
        if hasattr(self.module, "on_config_change"):
            self.module.on_config_change(old, new)
            return
        changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        read = self._change_optimizers(schedulers, old, new)
        for key in changed & self.module.hparams.keys():
            if self.module.hparams[key] == old.get(key):
                self.module.hparams[key] = new.get(key)
            read.add(key)
        executors = {"batch_size", "epochs"}  # in the plan
        unread = {key for key in changed - read - executors if not self._recipe.reads(key, new)}
        if unread:
            raise ConfigurationError(
                f"The config changes {', '.join(sorted(unread))}, which neither {type(self.module).__name__} nor its "
                "optimizer reads; define on_config_change(old, new) in the module to apply other keys."
            )

    def close(self) -> None:  # noqa: D102
        if hasattr(self, "_kept"):
            self._kept.close()

    def _change_optimizers(self, schedulers: list[Any], old: Config, new: Config) -> set[str]:
        optimizers = self.trainer.optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        grown = len(groups) != sum(map(len, self._fresh))  # a callback has unfrozen parameters since the build
        lent = [group for group in groups if "initial_lr" not in group]
        for group, rate in zip(groups, self._first_rates, strict=False):
            group.setdefault("initial_lr", rate)
        read = change_optimizers(optimizers, schedulers, old, new, None if grown else self._fresh)
        self._first_rates = [group.get("initial_lr") for group in groups]
        for group in lent:
            group.pop("initial_lr", None)
        return read

    def _note_fresh_groups(self) -> None:
        """Note what the build gave the optimizer, and leave its groups as a plain fit has them."""
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        lent = [group for group in groups if "initial_lr" not in group]
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self._fresh = note_groups(self.trainer.optimizers, schedulers)
        self._first_rates = [group.get("initial_lr") for group in groups]
        for group in lent:
            group.pop("initial_lr", None)

    def _begin(self) -> None:
        if self._kept.begin():
            self._attributes.settle()

    def _owners(self, callbacks: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """All whose attributes hop."""
        hparams = [("hparams", _Items(self.module.hparams))] if isinstance(self.module.hparams, dict) else []
        optimizers = [(f"optimizers[{i}]", each) for i, each in enumerate(self.trainer.optimizers)]
        return [*modules_of(self.module, results.is_metric), *hparams, *optimizers, *callbacks]

    def _call_load_hook(self, tree: dict[str, Any]) -> Any:
        """Call the module's `on_load_checkpoint`; return the state dict as that left it.

        What the unit before has left in the module views the buffer of that unit, and must not be there to write into.
        """
        load_gradients(self.module, {})
        results.restore_metrics(self.module, {})
        self._asides.move_out()
        self._kept.call_module("on_load_checkpoint", tree)
        return tree["state_dict"]

    def _check_batch_size(self, trained_with: int) -> None:
        """Refuse to go on in mid-epoch with batches of another size: how many are left is not a whole number then."""
        if trained_with != self._plan.batch_size and self._kept.in_mid_epoch:
            raise ConfigurationError(
                f"batch_size is changed from {trained_with} to {self._plan.batch_size} in mid-epoch; "
                "it can change at an epoch's end only: clone the trial after an epoch's last unit."
            )

    def _add_hyper_parameters(self, tree: dict[str, Any]) -> None:
        """Give the checkpoint hyper-parameters; the config stands in where the module's class saves none."""
        for key in ("hparams_type", "datamodule_hparams_type"):
            tree.pop(key, None)  # a class of OmegaConf's, where the hyper-parameters are no dict
        if "hyper_parameters" not in tree:
            name, tree["hyper_parameters"] = self._recipe.hyper_parameters(self._config)
            if name is not None:
                tree["hparams_name"] = name


class _Items:
    """The items of a dict as attributes of an object."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.__dict__ = items
