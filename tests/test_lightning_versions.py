"""What this package uses of Lightning's insides is looked for before it is used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import pytorch_lightning as pl

from cerebro_tune.errors import MissingHostError
from cerebro_tune_lightning import HopStrategy, versions


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    versions.check.cache_clear()
    yield
    versions.check.cache_clear()


@pytest.mark.parametrize("host", ["pytorch_lightning", "lightning.pytorch"])
def test_the_installed_one_has_all(host: str) -> None:
    versions.check(host)


def test_a_newer_one_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "__version__", "2.7.1")
    with pytest.warns(UserWarning, match=r"pytorch_lightning 2\.7\.1 is newer than what .* tested with, 2\.6\.0 to"):
        versions.check("pytorch_lightning")
    versions.check("pytorch_lightning")


@pytest.mark.parametrize(
    ("owner", "name", "lacking"),
    [
        (pl.trainer.connectors.data_connector._DataConnector, "attach_data", "_DataConnector.attach_data"),
        (pl.loops.fit_loop, "_FitLoop", r"_FitLoop.on_advance_end, loops.fit_loop._FitLoop.on_advance_start"),
    ],
)
def test_one_that_is_built_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, lacking: str
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(MissingHostError, match=f'lacks .*{lacking}.* it works with .* pip install "pytorch-lightning>'):
        versions.check("pytorch_lightning")


def test_other_parameters_count_as_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    def _fit_impl(self: object, model: object, data: object) -> None:
        """As another version might have it."""

    monkeypatch.setattr(pl.Trainer, "_fit_impl", _fit_impl)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with pytest.raises(MissingHostError, match=r"lacks trainer.trainer.Trainer._fit_impl, as this package uses it"):
        pl.Trainer(strategy=HopStrategy(), max_epochs=1, enable_model_summary=False, **options).fit(
            pl.LightningModule()
        )
