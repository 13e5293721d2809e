"""Shards: write, open, check, batch."""

from cerebro_tune.data.dataset import ShardedDataset as ShardedDataset
from cerebro_tune.data.form import Batch as Batch
from cerebro_tune.data.form import BatchForm as BatchForm
from cerebro_tune.data.order import batch_sizes as batch_sizes
from cerebro_tune.data.order import shard_order as shard_order
from cerebro_tune.data.shard import TableShard as TableShard
