"""A cell of the matrix: one family trained by one strategy on eight simulated devices, beside the same on one device.

`python tests/cells.py FAMILY [STRATEGY ...]` prints each cell as a line of JSON; `docs/_generate_matrix.py` reads them.
"""

import conftest  # noqa: F401 I001 - the devices, before JAX is imported

import contextlib
import dataclasses
import functools
import json
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hlo
import jax
import numpy as np

from artifex import models, train
from artifex.config import Config
from artifex.models.diffusion.config import DiffusionConfig
from artifex.models.diffusion.networks import MMDiTConfig
from artifex.scaling.compiler_log import laid_out_anew
from artifex.scaling.placement import bytes_on_device
from artifex.training.run_folder import RunFolder
from artifex.training.state import Blueprint, blueprint
from artifex.training.step import make_step
from artifex.training.task import batch_shapes, open_task

STEPS, ROWS, TOKENS, PARTS = 5, 16, 128, 4  # of 8 devices in a ring, each has two parts of a whole tile of 8 positions

SIZES = {"embed_dim": 32, "num_layers": 4, "num_heads": 8, "mlp_dim": 64, "sequence_length": TOKENS}
GROUPED = {**SIZES, "num_kv_heads": 4}
# name -> preset and the fields that make it small
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-nano", {**GROUPED, "tied_head": False}),
    "gpt2, dropout": ("gpt2-nano", {**SIZES, "dropout": 0.1}),
    "gemma2": ("gemma2-nano", {**GROUPED, "num_layers": 8, "window": 32}),
    "mixture": ("moe-nano", {**GROUPED, "expert_mlp_dim": 32}),
    "mixture, capacity": ("moe-nano", {**GROUPED, "expert_mlp_dim": 32, "capacity_factor": 1.25}),
    "linear attention": ("linear-nano", {**SIZES, "num_kv_heads": 8}),
    "masked diffusion": ("masked-nano", {"decoder": GROUPED}),
    "DiT": ("dit-digits", {"network": {"num_layers": 4, "embed_dim": 32, "num_heads": 8, "patch_size": 1}}),
    "latent DiT": ("latent-dit-digits", {"network": {"num_layers": 4, "embed_dim": 32, "num_heads": 8}}),
    "MMDiT": ("mmdit-digits", {}),
    "UNet": ("unet-digits", {"network": {"block_channels": [16, 32]}}),
    "VAE": ("vae-digits", {"block_channels": [16, 32]}),
    "VQ-VAE": ("vq-digits", {"block_channels": [32]}),
    "KL autoencoder": ("kl-digits", {"block_channels": [16, 32]}),
}
# of text, which no data set that is at hand has beside its images
TEXT = {"context": (64, 24), "pooled": (16,)}
MMDIT = MMDiTConfig(
    image_size=8,
    in_channels=1,
    out_channels=1,
    patch_size=1,
    embed_dim=32,
    num_layers=5,  # the last one, without a text output, is no part of its stack
    num_heads=8,
    context_dim=TEXT["context"][-1],
    pooled_dim=TEXT["pooled"][-1],
)

INTERLEAVED = {"schedule": "interleaved", "stages_per_device": 2}
# name -> the `device` section; eight devices in all
MIXTURES = ("mixture", "mixture, capacity")

STRATEGIES: dict[str, dict[str, Any]] = {
    "data 8": {"data": 8},
    "zero 1, data 8": {"data": 8, "zero": 1},
    "zero 2, data 8": {"data": 8, "zero": 2},
    "fsdp 8": {"fsdp": 8},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
    "data 2 x tensor 4": {"data": 2, "tensor": 4},
    "data 2 x tensor 4, whole stream": {"data": 2, "tensor": 4, "sequence_parallel": False},
    "tensor 8": {"tensor": 8},
    "expert 8": {"expert": 8},
    "context 8, ring": {"context": 8},
    "context 8, ulysses": {"context": 8, "context_attention": "ulysses"},
    "pipeline 4 x data 2, gpipe": {"pipeline": 4, "data": 2, "schedule": "gpipe"},
    "pipeline 4 x data 2, 1f1b": {"pipeline": 4, "data": 2},
    "pipeline 2 x fsdp 4, interleaved": {"pipeline": 2, "fsdp": 4, **INTERLEAVED},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 2 x expert 2 x tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp 2 x expert 4": {"fsdp": 2, "expert": 4},
    "fsdp 2 x context 2 x tensor 2": {"fsdp": 2, "context": 2, "tensor": 2},
    "pipeline 2 x fsdp 2 x tensor 2": {"pipeline": 2, "fsdp": 2, "tensor": 2},
    "pipeline 2 x fsdp 2 x expert 2": {"pipeline": 2, "fsdp": 2, "expert": 2},
    "pipeline 2 x data 2 x context 2": {"pipeline": 2, "data": 2, "context": 2},
    "pipeline 2 x data 4, zero 2": {"pipeline": 2, "data": 4, "zero": 2},
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What five steps gave, and what XLA says of the program of one."""

    losses: np.ndarray  # (steps,)
    gradient: Any  # of the first step, on the host
    params: Any  # after the last one
    flops: float  # of the products that one device computes
    argument_bytes: int
    temporary_bytes: int
    placed_bytes: int  # of state and batch on one device, by their shardings
    anew: tuple[str, ...]  # what XLA warns that it lays out anew by giving all of it to every device


@dataclasses.dataclass(frozen=True)
class Cell:
    """A family by a strategy: what differs from one device, or why it was refused."""

    family: str
    strategy: str
    refused: str | None = None
    loss: float | None = None  # largest relative difference of a step's loss
    gradient: float | None = None  # norm of the first step's difference, of the norm of its gradient
    params: float | None = None  # likewise of the parameters after the last step
    work: float | None = None  # FLOPs of one of the devices, of those of one device alone
    temporary: float | None = None  # likewise of bytes
    argument_bytes: int | None = None
    placed_bytes: int | None = None
    anew: tuple[str, ...] = ()  # as in `Training`


@contextlib.contextmanager
def presets() -> Iterator[None]:
    """The presets, and one that the zoo lacks: a small transformer that reads text beside images."""
    with mock.patch.dict(models.PRESETS, {"mmdit-digits": DiffusionConfig(network=MMDIT)}):
        yield


def config_of(family: str, device: dict[str, Any], parts: int) -> Config:
    """The run of a family; its batch is computed in `parts`, by the pipeline where there is one."""
    preset, fields = FAMILIES[family]
    text = models.PRESETS[preset].reads == "text"
    pipeline = "pipeline" in device
    return Config.from_dict(
        {
            "model": {"name": preset, **fields},
            "data": {"source": source(family), "sequence_length": TOKENS} if text else {"source": "digits"},
            "training": {"batch_size": ROWS, "gradient_accumulation": 1 if pipeline else parts, "steps": STEPS}
            # alone, a CPU would leave out tiles that no query sees
            | ({} if device else {"attention": "blockwise"}),
            # without clipping, whose factor would hide one of the gradients
            "optimizer": {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 2, "clip_norm": None},
            "device": device | ({"microbatches": parts} if pipeline else {}),
        }
    )


def source(family: str) -> str:
    """What a family of text reads. Mixtures a text that is the same under every Python: where two experts are equally
    good to the last digit, rounding chooses, and the library of 3.11.2 has such a token."""
    return str(Path(__file__).parents[1] / "LICENSE") if family in MIXTURES else "stdlib"


def batches(config: Config) -> list[dict[str, Any]]:
    """The run's own first batches, in its order."""
    stream = open_task(config, RunFolder(Path("unused"))).batches(0)
    found = [next(stream) for _ in range(STEPS)]
    stream.close()
    # XLA is given what is read: without classes no labels, and of a text that is unmasked its targets alone
    unread = {"tokens"} if config.model.name == "masked-nano" else set()
    read = batch_shapes(config).keys() - unread
    found = [{name: batch[name] for name in read} for batch in found]
    if config.model.name == "mmdit-digits":
        draw = np.random.default_rng(0).normal
        for batch in found:
            batch["condition"] = {name: np.float32(draw(size=(ROWS, *shape))) for name, shape in TEXT.items()}
    return found


def trained(blue: Blueprint) -> Training:
    """Five steps."""
    data = batches(blue.config)
    shapes = shapes_of(blue, data[0])
    with laid_out_anew() as anew:
        step = make_step(blue).lower(blue.state, shapes).compile()
    used = step.memory_analysis()
    state, losses, gradient = blue.init(), [], None
    for batch in data:
        state, metrics = step(state, jax.device_put(batch, blue.batch_sharding(batch)))
        losses.append(float(metrics["loss"]))
        gradient = first_moment(state.optimizer) if gradient is None else gradient
    return Training(
        np.array(losses),
        gradient,
        jax.device_get(state.params),
        hlo.flops(step.as_text(), blue.plan.pipeline and blue.plan.pipeline.taken),
        used.argument_size_in_bytes,
        used.temp_size_in_bytes,
        bytes_on_device((blue.state, shapes)),
        tuple(anew),
    )


def shapes_of(blue: Blueprint, batch: Any) -> Any:
    """The batch without its values, where the plan puts it."""
    where = blue.batch_sharding(batch)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch, where)


def first_moment(optimizer: Any) -> Any:
    """AdamW's mean of gradients, after one step 1 - beta1 times the gradient as the optimizer had it."""
    states = jax.tree.leaves(optimizer, is_leaf=lambda node: hasattr(node, "mu"))
    return jax.device_get(next(state.mu for state in states if hasattr(state, "mu")))


def built(family: str, device: dict[str, Any], parts: int, count: int) -> Blueprint:
    """The blueprint on `count` devices. Raises `ValueError` for what is refused."""
    config = config_of(family, device, parts)
    plan = train.plan_of(config, count)
    return blueprint(config, plan, plan.make_mesh(jax.devices()[:count]))


@functools.cache
def alone(family: str, parts: int) -> Training:
    """One device, with as many microbatches."""
    return trained(built(family, {}, parts, 1))


@functools.cache
def cell(family: str, strategy: str) -> Cell:
    """A family by a strategy beside one device."""
    device = STRATEGIES[strategy]
    parts = PARTS if "pipeline" in device else 1
    with presets():
        try:
            blue = built(family, device, parts, 8)
        except ValueError as error:  # before anything is compiled
            return Cell(family, strategy, refused=str(error))
        one, spread = alone(family, parts), trained(blue)
    return Cell(
        family,
        strategy,
        None,
        float(np.max(np.abs(spread.losses / one.losses - 1))),
        apart(spread.gradient, one.gradient),
        apart(spread.params, one.params),
        spread.flops / one.flops,
        spread.temporary_bytes / one.temporary_bytes,
        spread.argument_bytes,
        spread.placed_bytes,
        spread.anew,
    )


def apart(tree: Any, reference: Any) -> float:
    """The norm of a difference, of the norm of the reference."""
    squares = lambda tree: sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(tree))  # noqa: E731
    return math.sqrt(squares(jax.tree.map(np.subtract, tree, reference)) / squares(reference))


if __name__ == "__main__":
    family, *wanted = sys.argv[1:]
    for strategy in wanted or STRATEGIES:
        try:
            print(json.dumps(dataclasses.asdict(cell(family, strategy))), flush=True)
        except Exception as error:  # noqa: BLE001 - a cell that fails is told, and the others go on
            traceback.print_exc()
            print(json.dumps({"family": family, "strategy": strategy, "failed": repr(error)[:300]}), flush=True)
