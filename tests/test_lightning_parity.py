"""The test that matters, for Lightning: hops over two processes against one plain `Trainer.fit`, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from cerebro_tune import Cerebro, ShardedDataset, VisitLoader
from cerebro_tune.data import BatchForm
from cerebro_tune.seeding import seed_build
from cerebro_tune_lightning import LightningTrainable, ReseedCallback
from lightning_nets import Busy, Counting, Marked, Momentum, MultiStep, OneCycle, Plateau, Teacher, Untied

EPOCHS, BATCH, SEED = 3, 16, 5

# torch about Lightning's own CombinedLoader, in the plain `Trainer.fit`.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")

CASES: dict[str, tuple[type[pl.LightningModule], dict[str, Any]]] = {
    "momentum": (Momentum, {}),
    "multistep": (MultiStep, {}),
    "onecycle": (OneCycle, {}),
    "plateau": (Plateau, {}),
    "clipped": (Momentum, {"gradient_clip_val": 0.1}),
    "accumulating": (OneCycle, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    "mixed": (OneCycle, {"precision": "bf16-mixed"}),
    "half": (Momentum, {"precision": "bf16-true"}),
    "counting": (Counting, {}),
    "teacher": (Teacher, {}),
    "untied": (Untied, {}),
    "busy": (Busy, {"accumulate_grad_batches": 2}),
}


class ValidationLoader:
    """The validation set as the workers read it."""

    def __init__(self, dataset: ShardedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return math.ceil(self.dataset.num_rows / BATCH)

    def __iter__(self) -> Iterator[Any]:
        return self.dataset.batches_of(BATCH, BatchForm(), None)


class Recorder(pl.Callback):
    """What was logged by the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def plain_fit(
    case: str, config: dict[str, Any], loader: VisitLoader, visits: Any, validation: ShardedDataset
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What a Lightning user would write; returns the checkpoint, and what was logged in each epoch."""
    kind, kwargs = CASES[case]
    recorder = Recorder()
    seed_build(SEED, loader.trial_index)
    module = kind(**config)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ReseedCallback(SEED, loader.trial_index, visits), recorder],
        **kwargs,
    )
    trainer.fit(module, loader, ValidationLoader(validation))
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False), recorder.epochs


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
        yield executor


@pytest.mark.parametrize("case", CASES)
def test_hops_equal_a_plain_fit(cerebro: Cerebro, train: ShardedDataset, validation: ShardedDataset, case: str) -> None:
    kind, kwargs = CASES[case]
    results = cerebro.fit(
        LightningTrainable(kind, trainer_kwargs=kwargs), [{"lr": 0.05}, {"lr": 0.01}], metric="val_loss"
    )
    torch.set_num_threads(1)
    for index, result in enumerate(results):
        assert result.status == "finished", result.error
        assert {worker for *_, worker in result.visits} == {"worker-0", "worker-1"}
        loader = VisitLoader(train, result.visits, batch_size=BATCH, seed=SEED, trial_index=index)
        expected, logged = plain_fit(case, dict(result.config), loader, result.visits, validation)
        hopped = torch.load(result.last_checkpoint, weights_only=True)
        extras = hopped.pop("cerebro_tune")
        assert extras["left_out"] == []
        assert_equal(hopped, expected)
        if case == "plateau":
            assert hopped["optimizer_states"][0]["param_groups"][0]["lr"] < result.config["lr"]
        for report, metrics in zip(result.history, logged, strict=True):
            assert {name: report[name] for name in metrics} == metrics


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_no_trial_writes_into_anothers_state(train: ShardedDataset, tmp_path: Any) -> None:
    hows = ["plain", "copies", "hook", "trimmed"]
    configs = [{"tag": float(number), "how": hows[number % 4]} for number in range(8)]
    with Cerebro(
        train, epochs=4, batch_size=BATCH, workers=2, placement="pinned", policy="random", live_trials=8,
        progress=False, run_dir=tmp_path,
    ) as executor:  # fmt: skip
        results = executor.fit(Marked, configs, metric="train_loss")
    assert [result.error for result in results] == [None] * 8
    for result in results:
        checkpoint = torch.load(result.last_checkpoint, weights_only=True)
        mark = (checkpoint["state_dict"] | checkpoint["cerebro_tune"]["tensors"])["mark"]
        assert mark.unique().tolist() == [result.config["tag"]]
