"""What `when_not.py` needs beyond the rest: a model with a large state, and a cluster of nodes on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import ray
import torch
from ray.cluster_utils import Cluster

from _cnn import LitStrided


class BallastCnn(LitStrided):
    """Carries so many megabytes that nothing trains."""

    def __init__(self, lr: float, width: int, dropout: float, megabytes: float = 0) -> None:
        super().__init__(lr, width, dropout)
        self.register_buffer("ballast", torch.zeros(round(megabytes * 250_000)))


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """A Ray of so many nodes with one CPU each, to which this process is connected, in a folder of its own."""
    each = {"num_cpus": 1, "object_store_memory": 200_000_000}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, patch.dict(os.environ, RAY_TMPDIR=folder):
        made = Cluster(initialize_head=True, head_node_args=each | {"include_dashboard": False})
        try:
            for _ in range(nodes - 1):
                made.add_node(**each)
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            yield
        finally:
            ray.shutdown()
            made.shutdown()
