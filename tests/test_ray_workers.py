"""Workers on a Ray cluster: the contract, equal bits, nodes that go and come, and what is left behind."""

from __future__ import annotations

from typing import Any

import pytest

from cerebro_tune import Cerebro
from cerebro_tune.testing import WorkersContract
from cerebro_tune.workers.base import Workers
from cerebro_tune_ray.workers import RayWorkers
from nets import Deep
from runs import CONFIGS, outcome


@pytest.mark.usefixtures("ray_cluster")
class TestRay(WorkersContract):
    kill = True

    def make(self, count: int) -> Workers:
        return RayWorkers(("cpu",) * count, threads=1)


@pytest.mark.usefixtures("ray_cluster")
def test_equal_bits_on_ray_and_inline(options: dict[str, Any]) -> None:
    fixed = options | {"policy": "fixed", "placement": "pinned"}
    with Cerebro(**fixed) as inline:
        expected = inline.fit(Deep, CONFIGS, metric="val_loss")
    with Cerebro(**fixed | {"backend": "ray"}) as ray:
        found = ray.fit(Deep, CONFIGS, metric="val_loss")
        again = ray.fit(Deep, CONFIGS, metric="val_loss")
    assert outcome(found) == outcome(again) == outcome(expected)
