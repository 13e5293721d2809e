"""A LightningModule as something that trains by hops. Importing this module imports no Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cerebro_tune.data.order import batch_sizes
from cerebro_tune.errors import ConfigurationError, NotTrainableError
from cerebro_tune.trainable import Config, Plan, Recipe, Trainable, UnitWork, change_optimizers
from cerebro_tune_lightning import construct

if TYPE_CHECKING:
    from cerebro_tune_lightning.loops import KeptTrainer

_PASSED_ON = frozenset(
    "accumulate_grad_batches benchmark callbacks detect_anomaly deterministic gradient_clip_algorithm gradient_clip_val "
    "log_every_n_steps precision".split()
)
_OFF = frozenset(
    "enable_checkpointing enable_model_summary enable_progress_bar fast_dev_run logger num_sanity_val_steps".split()
)
"""Arguments of the Trainer that are accepted when they turn something off, which it is."""

_EXTRAS = "cerebro_tune"
"""The key of a checkpoint that holds what Lightning's own keys do not."""


def namespace(cls: type) -> str | None:
    """The package whose LightningModule the class derives from: pytorch_lightning, lightning.pytorch, or none."""
    for base in cls.__mro__:
        for package in ("pytorch_lightning", "lightning.pytorch"):
            if base.__name__ == "LightningModule" and base.__module__.startswith(f"{package}."):
                return package
    return None


class LightningTrainable(Recipe):
    """Any LightningModule with automatic optimization and one optimizer, as something that trains by hops.

    Args:
        make_module: A LightningModule class, called with the config as keywords (or as one mapping, where that is what
            it takes), or a function of the config that returns a module.
        batch_size: Rows per batch; a `batch_size` in a config that the module does not take itself wins.
        trainer_kwargs: Arguments of the Trainer, such as precision, gradient_clip_val, accumulate_grad_batches.
    """

    suffix = ".ckpt"

    def __init__(
        self,
        make_module: Callable[..., Any],
        batch_size: int | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.make_module, self.batch_size, self.trainer_kwargs = make_module, batch_size, dict(trainer_kwargs or {})
        self.name = getattr(make_module, "__name__", type(make_module).__name__).replace("<lambda>", "module")
        self._class = make_module if isinstance(make_module, type) else None
        refused = [
            name
            for name, value in self.trainer_kwargs.items()
            if name not in _PASSED_ON and not (name in _OFF and not value)
        ]
        if refused:
            raise ConfigurationError(
                f"trainer_kwargs has {', '.join(sorted(refused))}, which the executor decides. "
                f"Valid are {', '.join(sorted(_PASSED_ON))}."
            )
        self.accumulate = int(self.trainer_kwargs.get("accumulate_grad_batches", 1))

    def create(self) -> LightningTrial:  # noqa: D102
        return LightningTrial(self)

    def export(self, state: dict[str, Any], path: Path) -> None:
        """Write a `.ckpt` for `load_from_checkpoint`, `Trainer.fit(ckpt_path=...)` and `torch.load(weights_only=True)`."""
        from cerebro_tune_lightning.checkpoint import export

        export(state, [f"hyper_parameters.{name}" for name in state[_EXTRAS]["left_out"]], path)

    def takes(self, key: str) -> bool:  # noqa: D102
        return self._class is not None and construct.takes(self._class, key)

    def check_config(self, config: Config) -> None:  # noqa: D102
        if self._class is not None:
            construct.check_config(self._class, config)

    def reads(self, key: str, config: Config) -> bool:
        """Whether the key can make a difference when a module is built; a function may read any."""
        if self._class is None or construct.mapping_parameter(self._class, config):
            return True
        return construct.takes(self._class, key)

    def hyper_parameters(self, config: Config) -> tuple[str | None, Config]:
        """What `load_from_checkpoint` needs to call the class as it was called: the mapping parameter, the values."""
        if self._class is None:
            return None, {}
        name = construct.mapping_parameter(self._class, config)
        return name, config if name else construct.arguments(self._class, config)

    def build(self, config: Config) -> Any:
        """Make the module of a config."""
        module = self.make_module(config) if self._class is None else construct.construct(self._class, config)
        if namespace(type(module)) is None:
            raise NotTrainableError(f"{self.name} made a {type(module).__name__}; it must make a LightningModule.")
        return module


class LightningTrial(Trainable):
    """One trial in one worker: a module and the Trainer that is kept for it."""

    def __init__(self, recipe: LightningTrainable) -> None:
        self._recipe = recipe

    def start(self, config: Config, plan: Plan) -> None:  # noqa: D102
        from cerebro_tune_lightning.loops import KeptTrainer

        self._config, self._plan = config, plan
        self.module = self._recipe.build(config)
        host = namespace(type(self.module)) or ""
        self._kept: KeptTrainer = KeptTrainer(self.module, host, plan, self._recipe.trainer_kwargs)

    @property
    def trainer(self) -> Any:
        """The Trainer that is kept."""
        return self._kept.trainer

    def run_unit(self, work: UnitWork) -> dict[str, float]:  # noqa: D102
        rows = batch_sizes(self._plan.shard_rows[work.shard], self._plan.batch_size, self._plan.last_batch)
        return self._kept.run(work, rows)

    def state_dict(self) -> dict[str, Any]:
        """A Lightning checkpoint; what it lacks is under the key "cerebro_tune"."""
        from cerebro_tune_lightning import carry, checkpoint, results

        tree = self._kept.dump()
        self._add_hyper_parameters(tree)
        tree["hyper_parameters"], left_out = checkpoint.make_safe(tree["hyper_parameters"])
        tree[_EXTRAS] = {
            "left_out": left_out,
            "flags": carry.flags(self.module),
            "results": self._kept.dump_results(),
            "metrics": results.dump_metrics(self.module),
            "tensors": carry.unlisted(self.module),
            "gradients": carry.gradients(self.module) if self._kept.accumulating else {},
        }
        return tree

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        from cerebro_tune.torch_trainable import adopt
        from cerebro_tune_lightning import carry, results

        tree = dict(state)
        extras = tree.pop(_EXTRAS)
        self._kept.call_module("on_load_checkpoint", tree)
        carry.load_weights(self.module, tree["state_dict"])
        adopt(carry.unlisted(self.module), extras["tensors"])
        carry.load_flags(self.module, extras["flags"])
        carry.load_gradients(self.module, extras["gradients"])
        results.restore_metrics(self.module, extras["metrics"])
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
        unread = {key for key in changed - read - construct.OURS if not self._recipe.reads(key, new)}
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
