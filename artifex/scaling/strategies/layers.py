"""Strategies that divide what a layer computes: tensor, expert and context parallelism."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

from jax.sharding import PartitionSpec

from artifex.scaling.axes import Names, Rules
from artifex.scaling.strategies.base import ShardingStrategy, Table, leading, partition_spec

ShardDimension = Literal["out_features", "in_features"]


@dataclasses.dataclass(frozen=True)
class TensorParallelStrategy(ShardingStrategy):
    """Every layer is divided: projections into heads and hidden units by their outputs, those back by their inputs
    (Shoeybi et al. 2019, arXiv:1909.08053), so that each pair of layers needs one all-reduce.

    With `sequence_parallel` the stream between such pairs is split by positions, and the all-reduce becomes a gather
    before and a reduce-scatter behind, of the same bytes (Korthikanti et al. 2022, arXiv:2205.05198). `shard_dimension`
    is the dim of a linear kernel outside such pairs that is split. An array without names is such a kernel, of rank 2,
    and must divide.
    """

    axis_name: str = "model"
    shard_dimension: ShardDimension = "out_features"
    sequence_parallel: bool = False

    label: ClassVar[str] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_dimension not in get_args(ShardDimension):
            raise ValueError(f"shard_dimension {self.shard_dimension!r} is not one of {get_args(ShardDimension)}")

    @property
    def claims(self) -> Rules:
        convolutions = ("conv_hidden", "conv_out", "conv_in")  # of a pair its hidden channels, of others what divides
        weights = ("vocab", "heads", "kv_heads", "mlp", "expert_mlp", *convolutions, self.shard_dimension)
        activations = ("act_heads", "act_kv_heads", "act_mlp", "act_vocab", "act_channels")
        between = ("sequence",) if self.sequence_parallel else ()
        return Rules.of(
            params=dict.fromkeys(weights, self.axis_name),
            activations=dict.fromkeys((*activations, *between), self.axis_name),
            strategy=self.label,
        )

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        if len(shape) != 2:
            raise ValueError(
                f"tensor parallelism cannot tell which dim of an array of shape {shape} to split; only an "
                "[in_features, out_features] kernel may come without names, give names=(...)"
            )
        return ("in_features", "out_features")

    def get_attention_qkv_spec(self) -> PartitionSpec:
        """Of an [embed, heads * head_dim] kernel: each device has some heads."""
        return PartitionSpec(None, self.axis_name)

    def get_attention_output_spec(self) -> PartitionSpec:
        """Of a [heads * head_dim, embed] kernel."""
        return PartitionSpec(self.axis_name, None)

    def get_mlp_up_spec(self) -> PartitionSpec:
        """Of an [embed, mlp] kernel, up or gate: each device has some hidden units."""
        return PartitionSpec(None, self.axis_name)

    def get_mlp_down_spec(self) -> PartitionSpec:
        """Of an [mlp, embed] kernel."""
        return PartitionSpec(self.axis_name, None)

    def get_linear_weight_spec(self) -> PartitionSpec:
        """Of any other [in_features, out_features] kernel, by `shard_dimension`."""
        return partition_spec(self.rules, ("in_features", "out_features"))


@dataclasses.dataclass(frozen=True)
class ExpertParallelStrategy(ShardingStrategy):
    """Each device of the axis has some experts of every mixture, and tokens travel to them (Lepikhin et al. 2020,
    arXiv:2006.16668). Outside of mixtures its devices divide the batch, and the weights as FSDP does.

    An array without names is stacked under a leading `experts` dim, which must divide.
    """

    axis_name: str = "expert"

    label: ClassVar[str] = "expert"
    divides: ClassVar[tuple[Table, ...]] = get_args(Table)

    @property
    def claims(self) -> Rules:
        return Rules.of(
            params={"experts": self.axis_name},
            activations={"batch": self.axis_name, "act_experts": self.axis_name},
            strategy=self.label,
        )

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        return leading("experts", shape)


@dataclasses.dataclass(frozen=True)
class ContextParallelStrategy(ShardingStrategy):
    """Each device of the axis has some positions of every sequence; attention alone looks across them, by passing keys
    and values on or by exchanging positions for heads. Its devices divide the weights as FSDP does.

    An array without names is (batch, sequence, ...), whose second dim must divide.
    """

    axis_name: str = "context"

    label: ClassVar[str] = "context"
    divides: ClassVar[tuple[Table, ...]] = get_args(Table)

    @property
    def claims(self) -> Rules:
        return Rules.of(activations={"sequence": self.axis_name}, strategy=self.label)

    def names_for(self, shape: tuple[int, ...], ways: int) -> Names:
        return ((None, "sequence") + (None,) * len(shape))[: len(shape)]
