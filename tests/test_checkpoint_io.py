"""Trials of a run in a plain Trainer, by their ids: it goes on with them, and measures them, as with its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_nets
import unified_nets
from cerebro_tune import Cerebro, Decision, VisitLoader
from cerebro_tune.errors import ConfigurationError
from cerebro_tune.seeding import seed_build
from cerebro_tune_lightning import HopCheckpointIO, LightningTrainable, ReseedCallback
from runs import Script
from test_hop_strategy import TRAIN, VALIDATION
from test_lightning_parity import ValidationLoader, assert_equal

QUIET = {
    "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "num_sanity_val_steps": 0,
}  # fmt: skip
BOTH = pytest.mark.parametrize("nets", [lightning_nets, unified_nets], ids=lambda nets: nets.HOST)

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def plain(nets: Any, run_dir: Any = None, **options: Any) -> Any:
    plugins = [] if run_dir is None else [HopCheckpointIO(run_dir)]
    return nets.pl.Trainer(**QUIET | {"enable_checkpointing": False, "plugins": plugins} | options)


def in_order(dataset: Any) -> ValidationLoader:
    return ValidationLoader(dataset, {})


def more_epochs(trainer: Any, module: Any, ckpt_path: Any) -> Any:
    """Everything that is left after going on; the epochs that follow have batches of their own."""
    torch.manual_seed(11)
    trainer.fit(module, DataLoader(TRAIN, 16), DataLoader(VALIDATION, 25), ckpt_path=ckpt_path)
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


@BOTH
@pytest.mark.parametrize("row", ["Momentum", "AdamW", "Stepwise", "Plateau"])
def test_a_trial_goes_on_as_one_that_was_never_hopped(options: dict[str, Any], row: str, nets: Any) -> None:
    kind = getattr(nets, row)
    with Cerebro(**options | {"report_every": "epoch", "placement": "pinned"}) as executor:
        results = executor.fit(kind, [{"lr": 0.1}, {"lr": 0.05}], metric="val_loss")
    result = results[1]
    torch.set_num_threads(1)
    seed_build(0, 1)
    module = kind(lr=0.05)
    loader = VisitLoader(executor.train, result.visits, batch_size=16, trial_index=1)
    never = plain(nets, max_epochs=2, callbacks=[ReseedCallback(0, 1, result.visits)])
    never.fit(module, loader, in_order(options["validation"]))
    never.save_checkpoint(results.run_dir / "never.ckpt")
    expected = more_epochs(plain(nets, max_epochs=4), kind(), str(results.run_dir / "never.ckpt"))
    trainer = plain(nets, results.run_dir, max_epochs=4)
    assert_equal(more_epochs(trainer, kind(), "trial-0001"), expected)
    assert (trainer.current_epoch, trainer.global_step) == (4, expected["global_step"])


@BOTH
def test_measuring_trials(options: dict[str, Any], nets: Any) -> None:
    class Net(nets.Momentum):  # type: ignore[misc,name-defined]
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    with Cerebro(**options | {"epochs": 3}) as executor:
        results = executor.fit(Net, [{"lr": 0.3}, {"lr": 0.01}], metric="val_loss")
    loader = in_order(options["validation"])
    trainer = plain(nets, results.run_dir)
    for result in results:
        for path in (f"{result.trial_id}/best", Path(result.trial_id, "best"), result.checkpoint):
            (measured,) = trainer.validate(Net(), loader, ckpt_path=path, verbose=False)
            assert measured["val_loss"] == pytest.approx(result.metrics["val_loss"], abs=1e-6)
        for path in (result.trial_id, f"{result.trial_id}/last", str(result.last_checkpoint)):
            (measured,) = trainer.test(Net(), loader, ckpt_path=path, verbose=False, weights_only=True)
            assert measured["val_loss"] == pytest.approx(result.last_metrics["val_loss"], abs=1e-6)
        predicted = trainer.predict(Net(), loader, ckpt_path=result.trial_id)
        module = Net.load_from_checkpoint(result.last_checkpoint).eval()
        with torch.no_grad():
            assert_equal(predicted, [module.net(batch[0]) for batch in loader])


def test_a_trial_that_was_stopped_in_mid_epoch(options: dict[str, Any]) -> None:
    script = Script(lambda trial, report: Decision.STOP if report["units"] == 6 else Decision.CONTINUE)
    with Cerebro(**options | {"epochs": 3}) as executor:
        run = executor.run(lightning_nets.AdamW, script, metric="val_loss")
        run.add({})
        run.end_search()
        (result,) = executor.drive(run)
    assert result.status == "stopped"
    trainer = plain(lightning_nets, run.settings.run_dir, max_epochs=3)
    loader = in_order(options["train"])  # 13 batches; of its epoch the trial had 8 of 16 behind it
    with pytest.warns(UserWarning, match="a checkpoint that ended before the epoch ended"):
        trainer.fit(lightning_nets.AdamW(), loader, in_order(options["validation"]), ckpt_path="trial-0000")
    assert (trainer.current_epoch, trainer.global_step) == (3, 16 + 13 + 13)
    assert len(result.visits) == 6


@BOTH
def test_saving_and_other_paths(options: dict[str, Any], nets: Any, tmp_path: Path) -> None:
    with Cerebro(**options) as executor:
        executor.fit(nets.Momentum, [{"lr": 0.2}])
        results = executor.fit(nets.AdamW, [{"lr": 0.1}])
    plugin = HopCheckpointIO(options["run_dir"])  # the executor's folder: its last run is meant
    assert plugin.run_dir == results.run_dir
    assert isinstance(plugin, HopCheckpointIO)
    saver = nets.pl.callbacks.ModelCheckpoint(tmp_path / "own", save_last=True)
    trainer = nets.pl.Trainer(**QUIET, max_epochs=3, plugins=[plugin], callbacks=[saver])
    trainer.fit(nets.AdamW(), DataLoader(TRAIN, 16), DataLoader(VALIDATION, 25), ckpt_path="trial-0000")
    assert trainer.current_epoch == 3
    assert [path.name for path in sorted((tmp_path / "own").iterdir())] == ["epoch=2-step=45.ckpt", "last.ckpt"]
    (measured,) = trainer.validate(dataloaders=DataLoader(VALIDATION, 25), ckpt_path="best", verbose=False)
    assert measured["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    own = torch.load(saver.best_model_path, weights_only=True)
    assert "cerebro_tune" in torch.load(results[0].last_checkpoint, weights_only=True)
    assert "cerebro_tune" not in own
    plugin.remove_checkpoint(saver.best_model_path)
    assert not Path(saver.best_model_path).exists()
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint(own, tmp_path / "x.ckpt", storage_options={})


def test_what_is_not_there(options: dict[str, Any], tmp_path: Path) -> None:
    with Cerebro(**options | {"keep": "last"}) as executor:
        results = executor.fit(LightningTrainable(lightning_nets.Momentum), [{}, {}])
    trainer = plain(lightning_nets, results.run_dir)
    for path, message in (
        ("trial-0007", r"run-0000 has no last checkpoint of trial-0007; it has trial-0000, trial-0001\."),
        ("trial-0001/best", "has no best checkpoint of trial-0001; it has trial-0000, trial-0001"),
        ("trial-0001/first", "trial-0001/first is no checkpoint of trial-0001; valid: trial-0001, trial-0001/best"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            trainer.validate(lightning_nets.Momentum(), DataLoader(VALIDATION), ckpt_path=path)
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.ckpt"):
        trainer.validate(lightning_nets.Momentum(), DataLoader(VALIDATION), ckpt_path="elsewhere.ckpt")
    with pytest.raises(ConfigurationError, match="it has no trials at all"):
        HopCheckpointIO(tmp_path / "nothing").path("trial-0000")
