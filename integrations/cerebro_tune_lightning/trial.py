"""One trial of a LightningModule in one worker: its state as a Lightning checkpoint, its units, its config."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cerebro_tune.attributes import Attributes, modules_of
from cerebro_tune.data.order import batch_sizes
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.torch_trainable import adopt
from cerebro_tune.trainable import Config, Plan, Trainable, UnitWork, change_optimizers
from cerebro_tune_lightning import carry, results
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
        self._kept = KeptTrainer(self.module, host, plan, self._recipe.trainer_kwargs)
        private = vars(import_module(host).LightningModule())
        self._attributes = Attributes(lambda: modules_of(self.module, skip=results.is_metric), private)

    @property
    def trainer(self) -> Any:
        """The Trainer that is kept."""
        return self._kept.trainer

    def run_unit(self, work: UnitWork) -> dict[str, float]:  # noqa: D102
        rows = batch_sizes(self._plan.shard_rows[work.shard], self._plan.batch_size, self._plan.last_batch)
        return self._kept.run(work, rows)

    def state_dict(self) -> dict[str, Any]:
        """A Lightning checkpoint; what it lacks is under the key "cerebro_tune"."""
        tree = self._kept.dump()
        self._add_hyper_parameters(tree)
        tree["hyper_parameters"], left_out = make_safe(tree["hyper_parameters"])
        tree[EXTRAS] = {
            "left_out": left_out,
            "flags": carry.flags(self.module),
            "results": self._kept.dump_results(),
            "metrics": results.dump_metrics(self.module),
            "attributes": self._attributes.dump(),
            "tensors": carry.unlisted(self.module),
            "gradients": carry.gradients(self.module) if self._kept.accumulating else {},
        }
        return tree

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        tree = dict(state)
        extras = tree.pop(EXTRAS)
        self._kept.call_module("on_load_checkpoint", tree)
        carry.load_weights(self.module, tree["state_dict"])
        adopt(carry.unlisted(self.module), extras["tensors"])
        carry.load_flags(self.module, extras["flags"])
        carry.load_gradients(self.module, extras["gradients"])
        results.restore_metrics(self.module, extras["metrics"])
        self._attributes.load(extras["attributes"])
        self._kept.restore(tree)
        self._kept.restore_results(extras["results"])

    def change_config(self, old: Config, new: Config) -> None:  # noqa: D102
        if hasattr(self.module, "on_config_change"):
            self.module.on_config_change(old, new)
            return
        changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        read = change_optimizers(self.trainer.optimizers, schedulers, old, new)
        for key in changed & self.module.hparams.keys():
            if self.module.hparams[key] == old.get(key):
                self.module.hparams[key] = new.get(key)
            read.add(key)
        unread = {key for key in changed - read if not self._recipe.reads(key, new)}
        if unread:
            raise ConfigurationError(
                f"The config changes {', '.join(sorted(unread))}, which neither {type(self.module).__name__} nor its "
                "optimizer reads; define on_config_change(old, new) in the module to apply other keys."
            )

    def close(self) -> None:  # noqa: D102
        if hasattr(self, "_kept"):
            self._kept.close()

    def _add_hyper_parameters(self, tree: dict[str, Any]) -> None:
        """Give the checkpoint hyper-parameters; the config stands in where the module's class saves none."""
        tree.pop("hparams_type", None)  # a class of OmegaConf's, where the hyper-parameters are no dict
        if "hyper_parameters" not in tree:
            name, tree["hyper_parameters"] = self._recipe.hyper_parameters(self._config)
            if name is not None:
                tree["hparams_name"] = name
