"""One training step of an image model (forward, backward, AdamW): ours, bare JAX and PyTorch, in turn.

Before anything is timed, all must compute the same loss of the same random numbers, and ours and bare JAX the same norm
of the gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import bare_images
import jax
import jax.numpy as jnp
import numpy as np
import optax
import ours as package
import report
import setups
from flax import nnx
from setups import ImageSetup
from workers import Built, Variant

from artifex.models.diffusion.networks import UNET
from artifex.training.state import Blueprint, TrainState

RATE = 1e-4


NO_VARIANCE = {"out_channels": 4}  # of DiT: the bound that trains it is no part of what PyTorch and bare JAX compute
SETUPS = {
    "dit": ImageSetup("dit-s2", {"network": NO_VARIANCE}, batch=8),
    "unet": ImageSetup("ddpm-cifar", {"network": dataclasses.asdict(UNET["unet-32"])}, batch=16),
    "vae": ImageSetup("vae-cifar", {}, batch=64),
}
SMALL = {
    "dit": ImageSetup(
        "dit-s2",
        {"network": NO_VARIANCE | {"image_size": 8, "embed_dim": 48, "num_layers": 2, "num_heads": 2}},
        batch=2,
    ),
    "unet": ImageSetup(
        "ddpm-cifar",
        {"network": {"image_size": 8, "block_channels": (32, 64), "head_dim": 32, "layers_per_block": 1}},
        batch=2,
    ),
    "vae": ImageSetup("vae-cifar", {"image_size": 8, "block_channels": (8, 16), "latent_dim": 4}, batch=2),
}
GPU = {
    "dit": ImageSetup("dit-b2", {"network": NO_VARIANCE}, batch=128, dtype="bfloat16"),
    "unet": ImageSetup("ddpm-cifar", {}, batch=128, dtype="bfloat16"),
    "vae": ImageSetup("vae-cifar", {}, batch=1_024, dtype="bfloat16"),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("models", nargs="*", help=f"any of {', '.join(SETUPS)}; all of them without")
    size = options.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a few seconds, to see that it runs")
    size.add_argument("--gpu", action="store_true", help="larger, in bfloat16, on an accelerator")
    options.add_argument("--rounds", type=int, default=7, help="times that each variant is timed")
    setups.add_rivals(options)
    args = options.parse_args()
    print(setups.machine())
    sizes = SMALL if args.small else GPU if args.gpu else SETUPS
    for name in args.models:
        if name not in SETUPS:
            options.error(f"{name!r} is unknown; choose any of {', '.join(SETUPS)}")
    report.finish(args, (compare(name, sizes[name], args) for name in args.models or SETUPS))


def compare(name: str, setup: ImageSetup, args: argparse.Namespace) -> report.Record:
    """Time all variants of one model."""
    print(f"\n{name}: {setup}")
    variants = {"ours": Variant(ours, (setup,)), "bare JAX": setups.bare(bare_jax, setup)}
    variants |= setups.in_torch(args, pytorch, (setup, False))
    if name != "dit":  # a transformer has no use for another layout
        variants |= setups.in_torch(args, pytorch, (setup, True), "PyTorch, channels last")
    variants |= setups.against(args, variants["ours"])
    tolerance = 1e-5 if setup.dtype == "float32" else 2e-2
    return report.compared(f"{name} step", variants, args.rounds, work=setup.batch, unit="images", tolerance=tolerance)


def our_blueprint(setup: ImageSetup) -> Blueprint:
    model = {"name": setup.preset, **setup.overrides}
    settings = {"batch_size": setup.batch, "compute_dtype": setup.dtype, "remat": setup.remat}
    return package.build(model, {"source": "digits"}, settings, RATE)


def rough_state(blue: Blueprint) -> TrainState:
    """A fresh state with all parameters moved a little: those that start at 0 would hide what is behind them."""
    state, draw = blue.init(), np.random.default_rng(0)
    moved = jax.tree.map(lambda a: a + 0.02 * draw.standard_normal(a.shape, np.float32), jax.device_get(state.params))
    return dataclasses.replace(state, params=jax.device_put(moved, blue.shardings.params))


def batch(setup: ImageSetup, blue: Blueprint) -> dict[str, np.ndarray]:
    """Random images of 256 levels, and labels where the model has classes."""
    spec, draw = blue.config.model.spec(), np.random.default_rng(0)
    shape = (setup.batch, spec.image_size, spec.image_size, spec.channels)
    rows: dict[str, Any] = {"image": (draw.integers(0, 256, shape) / 127.5 - 1).astype(np.float32)}
    if spec.num_classes:
        rows["label"] = draw.integers(0, spec.num_classes, setup.batch, dtype=np.int32)
    return rows


def bare_model(setup: ImageSetup, blue: Blueprint) -> bare_images.Model:
    """The same computation in bare JAX."""
    spec = blue.config.model.spec()
    if setup.preset.startswith("vae"):
        return bare_images.vae(spec.latent_dim, spec.levels, setup.dtype)
    net, flash = spec.network, setup.dtype == "bfloat16" and jax.default_backend() == "gpu"
    if setup.preset.startswith("dit"):
        predict = bare_images.dit(net.num_heads, net.patch_size, flash)
    else:
        # cuDNN's attention takes heads of up to 128 features
        flash = flash and net.head_dim is not None and net.head_dim <= 128
        predict = bare_images.unet(net.head_dim, net.groups, net.norm_eps, flash)
    return bare_images.diffusion(predict, setup.dtype, net.num_classes)


def ours(setup: ImageSetup) -> Built:
    blue = our_blueprint(setup)
    return package.training_step(blue, rough_state(blue), batch(setup, blue))


def bare_jax(setup: ImageSetup) -> Built:
    blue = our_blueprint(setup)
    model, rows, params = bare_model(setup, blue), jax.device_put(batch(setup, blue)), rough_state(blue).params
    params = jax.tree.map(jnp.copy, jax.device_put(jax.device_get(params.get("network", params))))
    params = bare_images.dit_from_model(params) if setup.preset.startswith("dit") else params
    computed = package.measured(lambda params: model.loss(params, rows, model.draw(rows)), params)
    optimizer = optax.adamw(RATE, **package.ADAMW)
    step, state = bare_images.make_step(model, optimizer), (optimizer.init(params), jax.random.key(0))

    def call() -> jax.Array:
        nonlocal params, state
        params, state, value = step(params, state, rows)
        return value

    return Built(call, computed)


def pytorch(setup: ImageSetup, channels_last: bool, compiled: bool) -> Built:
    import pytorch_images

    blue = our_blueprint(setup)
    state, rows = rough_state(blue), batch(setup, blue)
    drawn = jax.device_get(bare_model(setup, blue).draw(jax.device_put(rows)))
    module = pytorch_images.build(nnx.merge(blue.graphdef, state.params, state.buffers), jax.device_get(state.params))
    how = {"channels_last": channels_last, "compiled": compiled}
    step, loss = pytorch_images.make_step(module, rows, setup.dtype, RATE, package.ADAMW, **how)
    return Built(step, {"loss": loss(drawn)})


if __name__ == "__main__":
    main()
