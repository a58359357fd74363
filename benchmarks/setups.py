"""The sizes that the benchmarks measure, and the options that choose among them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import report
from flax import nnx
from workers import Built, Variant

from artifex import models
from artifex.models.transformer.config import DecoderConfig
from artifex.scaling.execution import Execution

# FLOP/s of dense bfloat16 products, by what the device calls itself
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A preset with other sizes, how much a step reads, how much is decoded, and ours' remat."""

    preset: str
    overrides: dict[str, Any]
    batch: int
    sequence: int
    dtype: str = "float32"
    prompt: int = 32
    new_tokens: int = 128
    remat: str = "none"

    @property
    def decoder(self) -> DecoderConfig:
        return models.preset(self.preset, **self.overrides)

    def with_experts(self) -> Setup:
        """The same with 8 experts of half the width for each feed-forward layer, of which a token goes to 2."""
        half = self.decoder.feed_forward // 2
        experts = {"num_experts": 8, "expert_mlp_dim": half, "load_balance_weight": 0.0, "router_z_weight": 0.0}
        return dataclasses.replace(self, overrides=self.overrides | experts)

    @property
    def flash(self) -> bool:
        """Whether cuDNN's attention can be used: half precision on a GPU."""
        return self.dtype == "bfloat16" and jax.default_backend() == "gpu"

    def flops_per_token(self) -> float:
        """Of one training step: 6 for each weight of a product, and 12 L D T for attention (arXiv:2204.02311, B)."""
        cfg = self.decoder
        shapes = jax.tree.leaves(nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))))))
        weights = sum(math.prod(leaf.shape) for leaf in shapes)
        if not cfg.tied_head:
            weights -= cfg.vocab_size * cfg.embed_dim  # the token table is only looked up
        if cfg.positions == "learned":
            weights -= cfg.sequence_length * cfg.embed_dim
        return 6 * weights + 12 * cfg.num_layers * cfg.num_heads * cfg.per_head * self.sequence


@dataclasses.dataclass(frozen=True)
class ImageSetup:
    """A preset of an image model with other sizes, the images of a step, the dtype of compute, and ours' remat."""

    preset: str
    overrides: dict[str, Any]
    batch: int
    dtype: str = "float32"
    remat: str = "none"


SETUPS = {
    "mini": Setup("llama-mini", {}, batch=16, sequence=256),
    "quickstart": Setup("llama-nano", {}, batch=16, sequence=256),
    "gpu": Setup("gpt2", {}, batch=16, sequence=1_024, dtype="bfloat16"),
    "small": Setup(
        "llama-mini",
        {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": None, "head_dim": 16, "mlp_dim": 64},
        batch=2,
        sequence=64,
        prompt=8,
        new_tokens=8,
    ),
}


def known_peak() -> float | None:
    """FLOP/s of the first device, if it is one of `PEAKS`."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every script."""
    options = argparse.ArgumentParser(description=doc)
    size = options.add_mutually_exclusive_group()
    size.add_argument(
        "--small", dest="setup", action="store_const", const="small", help="a few seconds, to see that it runs"
    )
    size.add_argument(
        "--quickstart", dest="setup", action="store_const", const="quickstart", help="width 128, 3 layers"
    )
    size.add_argument(
        "--gpu", dest="setup", action="store_const", const="gpu", help="GPT-2 124M in bfloat16, on an accelerator"
    )
    options.set_defaults(setup="mini")
    options.add_argument("--rounds", type=int, default=7, help="times that each variant is timed")
    options.add_argument("--batch", type=int, help="rows, instead of the setup's")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="of compute, instead of the setup's")
    add_rivals(options)
    return options


def add_rivals(options: argparse.ArgumentParser) -> None:
    """The options that `in_torch`, `against` and `report.finish` read."""
    options.add_argument("--no-torch", dest="torch", action="store_false", help="leave out PyTorch")
    options.add_argument(
        "--torch-python",
        default=sys.executable,
        metavar="PYTHON",
        help="that of an environment with the extra `parity`; by default this one",
    )
    options.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    report.add_json(options)
    options.add_argument("--against", type=Path, metavar="PATH", help="also ours of another checkout of this project")


def bare(build: Callable[..., Built], *args: Any) -> Variant:
    """Bare JAX, with the compiler asked for what ours asks it for."""
    wishes = Execution().compiler_options.items()
    flags = [f"--{name}={value.removeprefix('LIBRARY_FUSION_TYPE_').lower()}" for name, value in wishes]
    return Variant(build, args, environment={"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()})


def in_torch(
    args: argparse.Namespace, build: Callable[..., Built], given: tuple[Any, ...], name: str = "PyTorch"
) -> dict[str, Variant]:
    """Eager and compiled by `torch.compile`, as far as asked for: `build(*given, compiled)`."""
    if not args.torch:
        return {}
    eager = Variant(build, (*given, False), python=args.torch_python)
    return {name: eager} | ({f"{name}, compiled": eager._replace(args=(*given, True))} if args.compile else {})


def against(args: argparse.Namespace, ours: Variant) -> dict[str, Variant]:
    """Ours once more, by the package of the checkout that was asked for, if one was."""
    return {f"ours in {args.against}": ours._replace(root=args.against.resolve())} if args.against else {}


def chosen(args: argparse.Namespace) -> Setup:
    """The setup that the parsed options ask for. Prints it and the machine."""
    setup = SETUPS[args.setup]
    changes = {"batch": args.batch, "dtype": args.dtype}
    setup = dataclasses.replace(setup, **{name: value for name, value in changes.items() if value is not None})
    print(machine())
    print(setup)
    return setup


def machine() -> str:
    """The device and the versions, on one line."""
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    cores = f"{device.platform} {device.device_kind}, {os.cpu_count()} cores"
    return f"{cores}, Python {platform.python_version()}, {versions}"
