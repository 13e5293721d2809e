"""Plain PyTorch by hops: subclass `TorchTrainable`, say how to build and how to step, and the rest is here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cerebro_tune.adopt import (
    adopt_optimizer,
    gradients,
    load_gradients,
    load_model,
    refuse_modules,
    refuse_outsiders,
    saves_whole,
    unlisted,
)
from cerebro_tune.attributes import Attributes, modules_of
from cerebro_tune.errors import ConfigurationError, NotTrainableError
from cerebro_tune.trainable import (
    Batches,
    Config,
    Plan,
    Recipe,
    Trainable,
    UnitWork,
    change_optimizers,
    names_of_groups,
    note_groups,
)
from cerebro_tune.wholefile import whole_file

_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32": (torch.float32, None),
    "64": (torch.float64, None),
    "bf16-true": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
"""Name -> (dtype of the weights, dtype of autocast)."""


@dataclass
class TrainingState:
    """What `train_unit` works on; everything in it hops with the trial."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    plan: Plan
    epoch: int = 0
    batches_done: int = 0
    """Batches trained in this epoch; with accumulation this decides when the optimizer steps."""
    step: int = 0
    """Optimizer steps made since the trial began."""
    epoch_ends_at: int | None = None
    """What `batches_done` will be at the epoch's end, in its last unit: there an open accumulation is closed."""


class TorchTrainable(Trainable):
    """A trial that trains plain PyTorch. Override `build` and `training_step`, and what else you need.

    Class attributes: `precision` (one of 32, 64, bf16-true, bf16-mixed, 16-mixed), `clip_norm` (largest gradient norm,
    or None), `accumulate` (batches per optimizer step), `schedule` ("step" or "epoch": when the scheduler steps) and
    `monitor` (the metric that a ReduceLROnPlateau watches), `loader` (settings as in `Cerebro(loader=...)`, which they
    win over).

    What hops: the model's parameters and buffers, optimizer, scheduler, scaler, pending gradients, and attributes
    (numbers, text, tensors, containers of these, objects of your own with such attributes) of the trainable, the
    optimizer and the model's own modules. Random numbers do not: each unit seeds them. Modules and parameters that the
    model does not contain are refused at the start. Keep anything else out of attributes, or override `state_dict` and
    `load_state_dict`.
    """

    precision: ClassVar[str] = "32"
    clip_norm: ClassVar[float | None] = None
    accumulate: ClassVar[int] = 1
    schedule: ClassVar[str] = "epoch"
    monitor: ClassVar[str] = "val_loss"
    loader: ClassVar[Mapping[str, Any]] = {}

    state: TrainingState

    def build(self, config: Config, plan: Plan) -> tuple[Any, ...]:
        """Return (model, optimizer) or (model, optimizer, scheduler)."""
        raise NotTrainableError(
            f"{type(self).__name__} has no build(self, config, plan) -> model, optimizer[, scheduler]."
        )

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        """Return the loss, or {"loss": ..., more metrics}."""
        raise NotTrainableError(f"{type(self).__name__} has no training_step(self, model, batch) -> loss.")

    def validation_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Return metrics of one batch; by default the training step's, with `val_` before each name."""
        output = self.training_step(model, batch)
        metrics = output if isinstance(output, Mapping) else {"loss": output}
        return {f"val_{name}": value for name, value in metrics.items()}

    def validation_end(self, outputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Make metrics of all that `validation_step` returned (each with its rows as `batch_size`): weighted means."""
        rows = sum(output["batch_size"] for output in outputs)
        names = [name for name in outputs[0] if name != "batch_size"]
        return {name: sum(float(out[name]) * out["batch_size"] for out in outputs) / rows for name in names}

    def train_unit(self, state: TrainingState, batches: Batches) -> dict[str, Any]:
        """Train on every batch of a shard; return metrics. Override it for a loop of your own."""
        totals: dict[str, Any] = {}
        rows = 0
        for number, batch in enumerate(batches):
            size = _size(batches, number, batch)
            rows += size
            for name, value in self._train_batch(state, batch).items():
                totals[name] = totals.get(name, 0.0) + value * size
        return {"train_loss" if name == "loss" else name: float(total) / rows for name, total in totals.items()}

    def on_config_change(self, old: Config, new: Config) -> set[str]:
        """Make `new` effective where a state was trained under `old`; return the keys that took effect."""
        schedulers = [self.state.scheduler] if self.state.scheduler is not None else []
        return change_optimizers([self.state.optimizer], schedulers, old, new, self._fresh)

    # What the worker calls.

    def start(self, config: Config, plan: Plan) -> None:  # noqa: D102
        weights, autocast = _PRECISIONS[self.precision]
        self._config = _ReadKeys(config)
        model, optimizer, *rest = self._checked(self.build(self._config, plan))
        if weights is not torch.float32:
            model.to(weights)
        self._autocast = autocast
        self._device = torch.device(plan.device)
        model.to(self._device)
        scaler = torch.amp.GradScaler(self._device.type, enabled=autocast is torch.float16)
        self.state = TrainingState(model, optimizer, rest[0] if rest else None, scaler, plan)
        self._fresh = note_groups([optimizer], rest)
        # Last, so that what was set here is part of a fresh build.
        own = ("state", "_config", "_fresh", "_attributes")
        self._attributes = Attributes(lambda: [("", self), ("optimizer", optimizer), *modules_of(model)], own)
        refuse_modules(type(self).__name__, self._attributes.modules())

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        state = self.state
        weights = state.model.state_dict()
        return {
            "model": weights,
            "buffers": unlisted(state.model, weights),
            "gradients": gradients(state.model) if state.batches_done % self.accumulate else {},
            "optimizer": state.optimizer.state_dict(),
            "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict(),
            "progress": (state.epoch, state.batches_done, state.step),
            "attributes": self._attributes.dump(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        mine = self.state
        load_model(mine.model, state["model"], state["buffers"])
        load_gradients(mine.model, state["gradients"])
        if saves_whole(mine.optimizer):  # what another has made of it hops as attributes do
            adopt_optimizer(mine.optimizer, state["optimizer"])
        if mine.scheduler is not None:
            mine.scheduler.load_state_dict(state["scheduler"])
        mine.scaler.load_state_dict(state["scaler"])
        mine.epoch, mine.batches_done, mine.step = state["progress"]
        self._attributes.load(state["attributes"])

    def run_unit(self, work: UnitWork) -> dict[str, float]:  # noqa: D102
        state = self.state
        if state.epoch != work.epoch:
            state.epoch, state.batches_done = work.epoch, 0
        state.epoch_ends_at = state.batches_done + len(work.train) if work.last else None
        state.model.train()
        metrics = dict(self.train_unit(state, work.train) or {})
        if work.epoch == work.position == 0:
            self._warn_of_unread()
        if work.validation is not None:
            with work.validating(), torch.no_grad():
                state.model.eval()
                metrics |= self.validation_end(list(self._validate(work.validation)))
                state.model.train()
        if work.last and self.schedule == "epoch" and state.scheduler is not None:
            self._step_schedule(metrics)
        if work.last:
            state.batches_done = 0
        return {name: float(value) for name, value in metrics.items()}

    def change_config(self, old: Config, new: Config) -> None:  # noqa: D102
        changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
        if "batch_size" in changed and self.accumulate > 1 and self.state.batches_done:
            raise ConfigurationError(
                f"The config changes batch_size from {old.get('batch_size')} to {new.get('batch_size')} in mid-epoch, "
                f"where gradients of {self.accumulate} batches are accumulated and the batches done were of the old "
                "size: change it at the end of an epoch, or set accumulate to 1."
            )
        changed -= {"batch_size", "epochs"}  # the executor's, which has applied them
        applied = set(self.on_config_change(old, new))
        idle = (changed - applied) & names_of_groups([self.state.optimizer], self._fresh)
        if idle:
            raise ConfigurationError(
                f"The config changes {', '.join(sorted(idle))}, but nothing in the optimizer had the old value or a "
                "multiple of it; override on_config_change(old, new) to apply it, and return its name."
            )
        unread = changed - applied - self._config.read
        if unread:
            raise ConfigurationError(
                f"The config changes {', '.join(sorted(unread))}, which neither {type(self).__name__}.build nor its "
                f"optimizer reads. It reads {', '.join(sorted(self._config.read)) or 'nothing'}; "
                "override on_config_change(old, new) to apply other keys."
            )

    # Steps.

    def _checked(self, built: Any) -> tuple[Any, ...]:
        """What `build` returned, if it is what it should be."""
        parts = built if isinstance(built, tuple | list) else (built,)
        if (
            len(parts) not in (2, 3)
            or not isinstance(parts[0], nn.Module)
            or not isinstance(parts[1], torch.optim.Optimizer)
        ):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise ConfigurationError(
                f"{type(self).__name__}.build returned ({kinds}); it must return (model, optimizer) or "
                "(model, optimizer, scheduler)."
            )
        refuse_outsiders(type(self).__name__, parts[0], parts[1])
        return tuple(parts)

    def _warn_of_unread(self) -> None:
        unread = sorted(self._config.keys() - self._config.read - {"batch_size", "epochs"})
        if unread:
            warnings.warn(
                f"{type(self).__name__} has not read {', '.join(unread)} of its config: is a name misspelled?",
                stacklevel=2,
            )

    def _train_batch(self, state: TrainingState, batch: Any) -> dict[str, Tensor | float]:
        with torch.autocast(self._device.type, self._autocast) if self._autocast else nullcontext():
            output = self.training_step(state.model, self._transferred(batch))
        metrics = dict(output) if isinstance(output, Mapping) else {"loss": output}
        if not isinstance(metrics.get("loss"), Tensor):
            returned = sorted(metrics) if isinstance(output, Mapping) else type(output).__name__
            raise ConfigurationError(
                f"{type(self).__name__}.training_step returned {returned}; it must return the loss, a tensor, or "
                'a dict that has it under "loss".'
            )
        state.scaler.scale(metrics["loss"] / self.accumulate if self.accumulate > 1 else metrics["loss"]).backward()
        state.batches_done += 1
        if state.batches_done % self.accumulate == 0 or state.batches_done == state.epoch_ends_at:
            self._step_optimizer(state)
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}

    def _transferred(self, batch: Any) -> Any:
        """The batch on the device, by the hooks of the DataModule where it comes from one."""
        module = self.state.plan.datamodule
        if not hasattr(module, "transfer_batch_to_device"):
            return to_device(batch, self._device)
        moved = module.transfer_batch_to_device(module.on_before_batch_transfer(batch, 0), self._device, 0)
        return module.on_after_batch_transfer(moved, 0)

    def _step_optimizer(self, state: TrainingState) -> None:
        if self.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), self.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if self.schedule == "step" and state.scheduler is not None:
            state.scheduler.step()

    def _step_schedule(self, metrics: dict[str, Any]) -> None:
        if not isinstance(self.state.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.state.scheduler.step()
        elif self.monitor in metrics:
            self.state.scheduler.step(float(metrics[self.monitor]))
        else:
            raise ConfigurationError(
                f"ReduceLROnPlateau watches {self.monitor!r}, but the metrics are {', '.join(sorted(metrics))}: "
                f"set {type(self).__name__}.monitor to one of them."
            )

    def _validate(self, batches: Batches) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(batches):
            with torch.autocast(self._device.type, self._autocast) if self._autocast else nullcontext():
                output = self.validation_step(self.state.model, self._transferred(batch))
            if not isinstance(output, Mapping):
                raise ConfigurationError(
                    f"{type(self).__name__}.validation_step returned a {type(output).__name__}; "
                    'it must return a dict of metrics, such as {"val_loss": loss}.'
                )
            yield {"batch_size": _size(batches, number, batch)} | dict(output)


class TorchRecipe(Recipe):
    """A `TorchTrainable` subclass as something to be shipped; exports are safetensors files of the model's tensors."""

    suffix = ".safetensors"

    def __init__(self, trainable: type[TorchTrainable]) -> None:
        if trainable.precision not in _PRECISIONS:
            raise ConfigurationError(
                f"{trainable.__name__}.precision is {trainable.precision!r}; valid: {list(_PRECISIONS)}."
            )
        if trainable.schedule not in ("step", "epoch"):
            raise ConfigurationError(
                f'{trainable.__name__}.schedule is {trainable.schedule!r}; valid: "step", "epoch".'
            )
        if trainable.accumulate < 1:
            raise ConfigurationError(
                f"{trainable.__name__}.accumulate is {trainable.accumulate}; it must be at least 1."
            )
        self.trainable, self.name, self.accumulate = trainable, trainable.__name__, trainable.accumulate
        self.loader, self.model = trainable.loader, trainable

    def model_config(self, config: Config) -> dict[str, Any]:  # noqa: D102  # `build` may read all of it
        return dict(config)

    def create(self) -> TorchTrainable:  # noqa: D102
        return self.trainable()

    def export(self, state: dict[str, Any], path: Path) -> None:  # noqa: D102
        from safetensors.torch import save

        # Cloned one by one: safetensors refuses tied and non-contiguous tensors.
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in state["model"].items()
            if isinstance(tensor, Tensor)  # not the extra state of a module
        }
        content = save(tensors)
        with whole_file(path) as file:
            file.write(content)


class _ReadKeys(dict[str, Any]):
    """A config that notes which of its keys were read."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.read.update(super().keys())  # `f(**config)` and loops over it read every key
        return super().__iter__()

    def items(self) -> Any:
        self.read.update(super().keys())
        return super().items()


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`; unknown types stay as they are."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _size(batches: Batches, number: int, batch: Any) -> int:
    """Rows of a batch; a loop of the user's own may hand on a plain list of them."""
    return batches.sizes[number] if hasattr(batches, "sizes") else rows_of(batch)


def rows_of(batch: Any) -> int:
    """Rows of a batch: the length of its first tensor, or of the batch itself."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor | Mapping | list | tuple):
        return rows_of(values[0])
    return len(values)
