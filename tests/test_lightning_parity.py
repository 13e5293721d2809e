"""The test that matters, for Lightning: hops over two processes against one plain `Trainer.fit`, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import holding_nets
import lightning_nets
import unified_nets
from cerebro_tune import Cerebro, Decision, ShardedDataset, VisitLoader
from cerebro_tune.data import BatchForm
from cerebro_tune.seeding import seed_build
from cerebro_tune_lightning import LightningTrainable, ReseedCallback
from runs import Script, outliving

EPOCHS, BATCH, SEED = 3, 16, 5

# torch about Lightning's own CombinedLoader, in the plain `Trainer.fit`.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("Momentum", {}),
    "adamw": ("AdamW", {}),
    "multistep": ("MultiStep", {}),
    "stepwise": ("Stepwise", {}),
    "onecycle": ("OneCycle", {}),
    "plateau": ("Plateau", {}),
    "warmup": ("Warmup", {}),
    "closure": ("Closure", {}),
    "adversarial": ("Adversarial", {}),
    "clipped": ("Momentum", {"gradient_clip_val": 0.1}),
    "clamped": ("Momentum", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulating": ("OneCycle", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    "accumulating_later": ("Momentum", {"callbacks": ("GradientAccumulationScheduler", {"scheduling": {1: 3, 2: 2}})}),
    "mixed": ("OneCycle", {"precision": "bf16-mixed"}),
    "half": ("Momentum", {"precision": "bf16-true"}),
    "half_adam": ("AdamW", {"precision": "bf16-true"}),
    "tied": ("Tied", {}),
    "counting": ("Counting", {}),
    "teacher": ("Teacher", {}),
    "untied": ("Untied", {}),
    "metrics": ("Metrics", {}),
    "grouped": ("Grouped", {}),
    "composed": ("Composed", {}),
    "refreshing": ("Refreshing", {}),
    "nested": ("Nested", {}),
    "hyper": ("Hyper", {}),
    "configured": ("Configured", {}),
    "annealed": ("Annealed", {}),
    "dicts": ("Dicts", {}),
    "growing": ("Growing", {}),
    "hooks": ("Hooks", {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}),
    "busy": ("Busy", {"accumulate_grad_batches": 2, "log_every_n_steps": 3}),
    "thawing": ("Head", {"callbacks": ("Thaw", {})}),
    "average": ("Momentum", {"callbacks": ("Average", {})}),
    "averaging": ("Busy", {"callbacks": ("WeightAveraging", {})}),
    "ema": ("Momentum", {"callbacks": ("EMAWeightAveraging", {"decay": 0.9, "update_starting_at_step": 10})}),
    "rates": ("Stepwise", {"callbacks": ("LearningRateMonitor", {}), "log_every_n_steps": 2}),
    "stopping": ("Momentum", {"callbacks": ("EarlyStopping", {"monitor": "val_loss", "stopping_threshold": 9.9})}),
    "waiting": ("Plateau", {"callbacks": ("EarlyStopping", {"monitor": "val_loss", "patience": 1, "min_delta": 9})}),
    "holding": ("Holding", {}),
    "by_hand": ("ByHand", {}),
    "sharpness": ("Sharpness", {}),
    "lookahead": ("LookingAhead", {}),
    "late": ("Late", {}),
    "sparse": ("Sparse", {}),
    "keeping": ("Momentum", {"callbacks": ("Keeping", {})}),
    "boring": ("Boring", {}),
    "manual_boring": ("ManualBoring", {}),
    "transformer": ("Transformer", {}),
}
UNIFIED = (
    "onecycle", "plateau", "closure", "adversarial", "accumulating", "mixed", "metrics", "annealed", "growing", "hooks",
    "busy", "thawing", "averaging", "waiting", "boring", "transformer",
)  # fmt: skip
"""The rows that run with `lightning.pytorch` too."""
CASES = [*((row, lightning_nets) for row in ROWS), *((row, unified_nets) for row in UNIFIED)]


class ValidationLoader:
    """The validation set as the workers read it."""

    def __init__(self, dataset: ShardedDataset, loader: dict[str, Any]) -> None:
        self.dataset, self.form = dataset, BatchForm(**loader)

    def __len__(self) -> int:
        return math.ceil(self.dataset.num_rows / BATCH)

    def __iter__(self) -> Iterator[Any]:
        return self.dataset.batches_of(BATCH, self.form, None)


def row_of(row: str, nets: Any) -> tuple[Any, dict[str, Any]]:
    """The module class of a row, and the Trainer's arguments; each call makes callbacks of its own."""
    name, kwargs = ROWS[row]
    kind, options = kwargs.get("callbacks", (None, {}))
    made = [] if kind is None else [found(nets, kind)]
    return found(nets, name), kwargs | {"callbacks": [*(each(**dict(options)) for each in made), nets.Recorder()]}


def found(nets: Any, name: str) -> Any:
    """The class of this name, among those of the tests or Lightning's callbacks."""
    return next(getattr(home, name) for home in (nets, holding_nets, nets.pl.callbacks) if hasattr(home, name))


def plain_fit(
    row: str, nets: Any, config: dict[str, Any], loader: VisitLoader, visits: Any, validation: ValidationLoader
) -> Any:
    """What a Lightning user would write; returns the Trainer."""
    kind, kwargs = row_of(row, nets)
    seed_build(SEED, loader.trial_index)
    module = kind(**config)
    trainer = nets.pl.Trainer(
        **kwargs
        | {
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "logger": import_module(f"{nets.HOST}.loggers.logger").DummyLogger(),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": [ReseedCallback(SEED, loader.trial_index, visits), *kwargs["callbacks"]],
        }
    )
    trainer.fit(module, loader, validation)
    return trainer


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Equal values and equal bits, all the way down."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


@pytest.fixture(scope="module")
def cerebro(
    train: ShardedDataset, validation: ShardedDataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cerebro]:
    executor = Cerebro(
        train, validation, epochs=EPOCHS, batch_size=BATCH, workers=2, placement="pinned", report_every="epoch",
        progress=False, seed=SEED, run_dir=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip
    with executor:
        yield outliving(executor)


@pytest.mark.filterwarnings("ignore:The number of training batches")  # to the plain fit, whose log_every_n_steps is 50
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")  # Transformer
@pytest.mark.filterwarnings("ignore:.*overriding `LightningModule.optimizer_")  # Busy, Hooks
@pytest.mark.parametrize(("row", "nets"), CASES, ids=[f"{row}-{nets.HOST}" for row, nets in CASES])
def test_hops_equal_a_plain_fit(
    cerebro: Cerebro, train: ShardedDataset, validation: ShardedDataset, row: str, nets: Any, tmp_path: Path
) -> None:
    kind, kwargs = row_of(row, nets)
    form = {"as_dict": True} if row == "dicts" else {}
    trainable = LightningTrainable(kind, trainer_kwargs=kwargs, loader=form)
    metric = None if row == "adversarial" else "train_loss"
    results = cerebro.fit(trainable, [{"lr": 0.05}, {"lr": 0.01}], metric=metric)
    torch.set_num_threads(1)
    for index, result in enumerate(results):
        assert result.error is None
        assert {worker for *_, worker in result.visits} == {"worker-0", "worker-1"}
        loader = VisitLoader(train, result.visits, batch_size=BATCH, seed=SEED, trial_index=index, loader=form)
        measured = ValidationLoader(validation, form)
        trainer = plain_fit(row, nets, dict(result.config), loader, result.visits, measured)
        assert result.status == ("stopped" if trainer.current_epoch < EPOCHS else "finished")
        expected = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        hopped = torch.load(result.last_checkpoint, weights_only=True)
        extras = hopped.pop("cerebro_tune")
        assert extras["left_out"] == []
        if "hyper_parameters" not in expected:
            assert hopped.pop("hyper_parameters") == result.config
        assert_equal(hopped, expected)
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        assert_equal(reopened(kind, result.last_checkpoint), reopened(kind, tmp_path / "plain.ckpt"))
        recorder = trainer.callbacks[-1]
        (recorded,) = (of for name, of in extras["attributes"].items() if name.endswith(".Recorder"))
        assert_equal(recorded, {name: vars(recorder)[name] for name in recorded})
        assert len(recorded) == 3
        ends = [logged for logged, *_ in [*recorder.epochs[1:], recorder._logged(trainer)]]
        for report, logged in zip(result.history, ends, strict=True):
            assert {name: report[name] for name in logged} == logged
        check_row(row, trainer, extras)


def reopened(kind: Any, path: Any) -> Any:
    """The weights that a checkpoint gives a module of this class, or what is wrong."""
    try:
        return kind.load_from_checkpoint(path).state_dict()
    except RuntimeError as error:  # a buffer that has no value in a fresh build
        return str(error)


def check_row(row: str, trainer: Any, extras: dict[str, Any]) -> None:
    """That the row tests what it says, and what only it has."""
    groups = trainer.optimizers[0].param_groups
    module = trainer.lightning_module
    match row:
        case "plateau":
            assert groups[0]["lr"] < module.hparams["lr"]
        case "hooks":
            assert_equal(extras["attributes"]["model."]["calls"], module.calls)
            assert len({call[0] for call in module.calls}) == 27
        case "growing":
            assert len(groups) == 3
        case "thawing":
            assert len(groups) == 2
        case "stopping":
            assert trainer.current_epoch == 1
        case "waiting":
            assert trainer.current_epoch == 2


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_no_trial_writes_into_anothers_state(train: ShardedDataset, tmp_path: Any) -> None:
    hows = ["plain", "copies", "hook", "trimmed"]
    configs = [{"tag": float(number), "how": hows[number % 4]} for number in range(8)]
    with Cerebro(
        train, epochs=4, batch_size=BATCH, workers=2, placement="pinned", policy="random", live_trials=8,
        progress=False, run_dir=tmp_path,
    ) as executor:  # fmt: skip
        results = executor.fit(lightning_nets.Marked, configs, metric="train_loss")
    assert [result.error for result in results] == [None] * 8
    for result in results:
        checkpoint = torch.load(result.last_checkpoint, weights_only=True)
        mark = (checkpoint["state_dict"] | checkpoint["cerebro_tune"]["tensors"])["mark"]
        assert mark.unique().tolist() == [result.config["tag"]]


class Stopping(lightning_nets.Momentum):  # type: ignore[misc]
    """Asks to stop in the second unit, in mid-epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.should_stop = batch_idx == 6


@pytest.mark.parametrize("report_every", ["unit", "epoch"])
@pytest.mark.parametrize("policy", ["auto", "fixed"])
def test_a_trial_that_is_to_stop_in_mid_epoch_is_stopped(
    options: dict[str, Any], report_every: str, policy: str
) -> None:
    with Cerebro(**options | {"report_every": report_every, "policy": policy}) as executor:
        (stopping,) = executor.fit(Stopping, [{"lr": 0.1}])
        (going,) = executor.fit(lightning_nets.Momentum, [{"lr": 0.1}])
    assert (stopping.status, going.status) == ("stopped", "finished")
    assert len(stopping.visits) == 2
    assert len(stopping.history) == (2 if report_every == "unit" else 0)
    assert torch.load(stopping.last_checkpoint, weights_only=True)["global_step"] == 7


def test_a_stop_of_its_own_is_firmer_than_a_pause_of_the_tuner(options: dict[str, Any]) -> None:
    with Cerebro(**options) as executor:
        tuner = Script(lambda trial_id, report: Decision.PAUSE if report["units"] == 2 else Decision.CONTINUE)
        run = executor.run(Stopping, tuner)
        run.add({"lr": 0.1})
        run.end_search()
        executor.drive(run)
    assert tuner.ended == [("trial-0000", "stopped")]
