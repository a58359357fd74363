"""Strategies: how tensors are spread over the axes of a mesh. Each one is a table of rules for logical axes.

A strategy answers with specs for names (`get_partition_spec`), places arrays by them (`apply_sharding`) and combines
with others by the union of their tables (`combine`). A linear kernel is [in_features, out_features], as in Flax NNX.
"""

from artifex.scaling.strategies.base import REST, ShardingStrategy, errors_name, partition_spec, place
from artifex.scaling.strategies.combining import combine, strategies_for
from artifex.scaling.strategies.data import DataParallelStrategy, FSDPStrategy, ZeROStrategy
from artifex.scaling.strategies.layers import ContextParallelStrategy, ExpertParallelStrategy, TensorParallelStrategy
from artifex.scaling.strategies.pipeline import PipelineParallelStrategy

__all__ = [
    "REST",
    "ContextParallelStrategy",
    "DataParallelStrategy",
    "ExpertParallelStrategy",
    "FSDPStrategy",
    "PipelineParallelStrategy",
    "ShardingStrategy",
    "TensorParallelStrategy",
    "ZeROStrategy",
    "combine",
    "errors_name",
    "partition_spec",
    "place",
    "strategies_for",
]
