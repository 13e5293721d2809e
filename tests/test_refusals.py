"""What an executor refuses, with what is valid, before any training where that is possible."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cerebro_tune import Cerebro, Decision, ShardedDataset
from cerebro_tune.errors import (
    ConfigurationError,
    DamagedShardError,
    NotPicklableError,
    NotTrainableError,
    StateMemoryError,
    UnknownMetricError,
)
from nets import Linear
from runs import CONFIGS, Script


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"workers": 0}, "workers is 0; it must be a whole number of at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"placement": "sharded"}, "placement is 'sharded'; valid: 'auto', 'shared', 'pinned'"),
        ({"policy": "greedy"}, "policy is 'greedy'; valid: 'auto', 'random', 'fixed'"),
        ({"report_every": "step"}, "report_every is 'step'"),
        ({"keep": "worst"}, "keep is 'worst'"),
        ({"loader": {"shuffle": True}}, "loader has shuffle; valid: columns, as_dict"),
        ({"workers": 5, "placement": "pinned"}, "4 shards cannot be pinned to 5 workers"),
        ({"validation_rows": "most"}, "validation_rows is 'most'"),
        ({"state_memory": "plenty"}, "plenty"),
        ({"train": 7}, "train is a int; valid: the path of a set"),
        ({"devices": "gpu"}, 'devices has \'gpu\'; valid: "auto", "cpu"'),
        ({"seed": -1}, "seed is -1"),
        ({"loader": {"columns": "xy"}}, "columns is 'xy'; it must be a list of names"),
    ],
)
def test_bad_arguments(options: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        Cerebro(**options | changed)
    assert not Path(options["run_dir"]).exists()


def test_unknown_column_and_backend(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="x"):
        Cerebro(**options, loader={"columns": ["pixels"]})
    with pytest.raises(ConfigurationError, match="no backend 'slurm'; valid: inline, local"):
        Cerebro(**options | {"backend": "slurm"}).fit(Linear, CONFIGS)


def test_bad_configs_and_trainables(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        with pytest.raises(ConfigurationError, match="configs is empty"):
            cerebro.fit(Linear, [])
        with pytest.raises(ConfigurationError, match="epochs in a config is 0"):
            cerebro.fit(Linear, [{"lr": 1, "epochs": 0}])
        with pytest.raises(NotTrainableError, match="Valid are a TorchTrainable subclass"):
            cerebro.fit(print, CONFIGS)
        with pytest.raises(NotTrainableError, match="Give the class, Linear"):
            cerebro.fit(Linear(), CONFIGS)
        with pytest.raises(NotTrainableError, match="import LightningTrainable"):
            cerebro.fit(lambda config: None, CONFIGS)
        for configs in ({"lr": 0.1}, ["lr"]):
            with pytest.raises(ConfigurationError, match="it must be a list of dicts"):
                cerebro.fit(Linear, configs)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="the name of one metric"):
            cerebro.fit(Linear, CONFIGS, metric=["val_loss"])  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="mode is 'least'"):
            cerebro.fit(Linear, CONFIGS, mode="least")
        with pytest.raises(NotPicklableError, match=r"The config .* cannot be sent to the workers"):
            cerebro.fit(Linear, [{"lr": 0.1, "lock": threading.Lock()}])
        assert list(Path(options["run_dir"]).iterdir()) == []  # nothing half-written
        assert cerebro.fit(Linear, CONFIGS[:1])[0].status == "finished"  # and it still works


def test_an_unknown_metric_lists_those_there_are(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro, pytest.raises(UnknownMetricError, match="train_loss, val_accuracy, val_loss"):
        cerebro.fit(Linear, CONFIGS, metric="accuracy")


def test_a_flipped_bit_in_a_shard_stops_the_run_before_training(options: dict[str, Any], tmp_path: Path) -> None:
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 800, pa.float32()), 8), "y": [0, 1] * 50})
    damaged = ShardedDataset.write(table, tmp_path / "damaged", num_shards=4)
    file = damaged.file(2)
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    with Cerebro(**options | {"train": damaged}) as cerebro, pytest.raises(DamagedShardError, match=file.name):
        cerebro.fit(Linear, CONFIGS)
    assert list(Path(options["run_dir"]).iterdir()) == []


def test_full_state_memory_says_what_to_do(options: dict[str, Any]) -> None:
    with Cerebro(**options, state_memory=100_000) as cerebro, pytest.raises(StateMemoryError, match="state_memory"):
        cerebro.fit(Linear, CONFIGS)


def test_one_run_at_a_time(options: dict[str, Any]) -> None:
    with Cerebro(**options) as cerebro:
        run = cerebro.run(Linear, Script(lambda *_: Decision.CONTINUE))
        with pytest.raises(ConfigurationError, match="has a run in progress"):
            cerebro.fit(Linear, CONFIGS)
        run.end_search()
        assert len(cerebro.drive(run)) == 0
