"""The runs that the planner is scored on: models of many kinds, over every mesh of 8 devices and every setting.

A case is a `Config` as plain values. Nothing here knows the planner: the grid is made by hand, and XLA answers it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

DEVICES = 8
TEXT = {"embed_dim": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 768}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model": {"name": "llama-nano", **TEXT, "vocab_size": 4_096, "tied_head": False},
        "rows": 64,
        "axes": ("data", "fsdp", "tensor", "context", "pipeline"),
    },
    "moe": {
        "model": {"name": "moe-nano", **TEXT, "vocab_size": 2_048, "expert_mlp_dim": 384},
        "rows": 32,
        "axes": ("data", "fsdp", "tensor", "expert", "pipeline"),
    },
    "gemma2": {
        "model": {"name": "gemma2-nano", **TEXT, "num_kv_heads": 4, "vocab_size": 4_096},
        "rows": 64,
        "axes": ("data", "fsdp", "tensor", "context", "pipeline"),
    },
    "masked": {
        "model": {"name": "masked-nano", "decoder": {**TEXT, "vocab_size": 4_096}},
        "rows": 64,
        "axes": ("data", "fsdp", "tensor", "context", "pipeline"),
    },
    "dit": {
        "model": {
            "name": "dit-s2",
            "network": {
                "image_size": 32,
                "in_channels": 3,
                "out_channels": 6,
                "embed_dim": 256,
                "num_layers": 6,
                "num_heads": 8,
            },
        },
        "rows": 64,
        "axes": ("data", "fsdp", "tensor", "context", "pipeline"),
    },
    "unet": {
        "model": {
            "name": "ddpm-cifar",
            "network": {"block_channels": (64, 128, 128), "groups": 8, "layers_per_block": 1},
        },
        "rows": 64,
        "axes": ("data", "fsdp", "tensor"),
    },
    "vae": {"model": {"name": "vae-cifar", "residual_blocks": 1}, "rows": 128, "axes": ("data", "fsdp", "tensor")},
    "vq": {
        "model": {
            "name": "vq-digits",
            "image_size": 32,
            "channels": 3,
            "block_channels": (64, 128),
            "codes": 256,
            "latent_dim": 64,
        },
        "rows": 128,
        "axes": ("data", "fsdp", "tensor"),
    },
}
"""Family -> fields of its model, rows of a batch, and the mesh axes that it can be spread over."""


def meshes(axes: tuple[str, ...], devices: int = DEVICES) -> Iterator[dict[str, int]]:
    """Every way to give these axes sizes whose product is the number of devices."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for chosen in itertools.product(sizes, repeat=len(axes)):
        if math.prod(chosen) == devices:
            yield {axis: size for axis, size in zip(axes, chosen, strict=True) if size > 1}


def cases(family: str) -> Iterator[dict[str, Any]]:
    """Every setting of a family: mesh x ZeRO x remat x microbatches, of those that divide."""
    of = FAMILIES[family]
    for mesh in meshes(of["axes"]):
        ways = math.prod(size for axis, size in mesh.items() if axis in ("data", "fsdp", "expert"))
        zeros = (0, 1, 2) if "data" in mesh else (0,)
        remats = (
            ("none", "dots", "full")
            if "pipeline" not in mesh and family not in ("unet", "vae", "vq")
            else ("none", "full")
        )
        if family in ("vae", "vq", "unet"):
            remats = ("none",)
        for zero, remat, parts in itertools.product(zeros, remats, (1, 2, 4)):
            if of["rows"] % (ways * parts * (2 * mesh.get("pipeline", 1) if "pipeline" in mesh else 1)):
                continue
            settings = {"device": {**mesh, "zero": zero}, "training": {"remat": remat, "gradient_accumulation": parts}}
            yield case_of(family, settings)


def case_of(family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of one setting, `device` and `training`, of a family."""
    of = FAMILIES[family]
    return {
        "model": of["model"],
        "data": {"source": "stdlib", "sequence_length": 256} if is_text(family) else {"source": "digits"},
        "optimizer": {"name": "adamw"},
        "training": {"batch_size": of["rows"], **settings["training"]},
        "device": settings["device"],
    }


def is_text(family: str) -> bool:
    """Whether it learns from text."""
    return family in ("llama", "moe", "gemma2", "masked")


def sampled(family: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many cases of a family, each mesh as often as the others."""
    every = list(cases(family))
    draw = random.Random(f"{family} {seed}")
    draw.shuffle(every)
    by_mesh: dict[str, list] = {}
    for case in every:
        by_mesh.setdefault(str({k: v for k, v in case["device"].items() if k != "zero"}), []).append(case)
    turns = itertools.zip_longest(*by_mesh.values())
    return [case for turn in turns for case in turn if case is not None][:count]
