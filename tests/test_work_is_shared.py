"""Devices share the work of steps, validation and samples: each one's FLOPs fall with their number.

XLA's own count of the compiled program, whose shapes are those of one device. It takes the body of a loop once, on one
device and on eight, so that the ratio is that of the bodies.
"""

import functools

import jax
import numpy as np
import pytest

from artifex.config import Config
from artifex.scaling.plan import Plan
from artifex.training.state import blueprint
from artifex.training.step import make_evaluate, make_step
from artifex.training.task import batch_shapes

DECODER = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "mlp_dim": 128, "sequence_length": 64}
FAMILIES = {
    "llama-nano": {**DECODER, "num_kv_heads": 2},
    "gemma2-nano": {**DECODER, "num_kv_heads": 2, "window": 16},
    "moe-nano": {**DECODER, "num_kv_heads": 2, "expert_mlp_dim": 64},
    "linear-nano": {**DECODER, "num_kv_heads": 4},
    "masked-nano": {"decoder": {**DECODER, "num_kv_heads": 2}},
    "dit-digits": {"network": {"num_layers": 2, "embed_dim": 64, "num_heads": 4}},
    "unet-digits": {"network": {"block_channels": [16, 32]}},
    "latent-dit-digits": {"network": {"num_layers": 2, "embed_dim": 64}},
    "vae-digits": {"block_channels": [16]},
    "vq-digits": {"block_channels": [32]},
}
EVERY_DAY = [(preset, "fsdp+tensor") for preset in ("llama-nano", "dit-digits", "vae-digits")]
MESHES = {"data": {"data": 8}, "fsdp": {"fsdp": 8}, "fsdp+tensor": {"fsdp": 2, "tensor": 4}}
POSITIONS = {
    "context+tensor": {"context": 4, "tensor": 2},
    "data+context+tensor": {"data": 2, "context": 2, "tensor": 2},
    "fsdp+context+tensor": {"fsdp": 2, "context": 2, "tensor": 2},
}
ROWS = 16


@functools.cache
def built(preset: str, mesh: str | None):
    text = "decoder" in FAMILIES[preset] or FAMILIES[preset].get("sequence_length")
    config = Config.from_dict(
        {
            "model": {"name": preset, **FAMILIES[preset]},
            "data": {"source": "stdlib", "sequence_length": 64} if text else {"source": "digits"},
            # unrolled, so that one device's program and eight's are counted alike
            "training": {"batch_size": ROWS, "unroll": 2},
            "optimizer": {"name": "sgd"},
            "device": (MESHES | POSITIONS)[mesh] if mesh else {},
        }
    )
    count = 8 if mesh else 1
    plan = Plan.from_device(config.device, count)
    return blueprint(config, plan, plan.make_mesh(jax.devices()[:count]))


@functools.cache
def flops(preset: str, mesh: str | None, program: str) -> float:
    blue = built(preset, mesh)
    shapes = {name: jax.ShapeDtypeStruct(*kind) for name, kind in batch_shapes(blue.config).items()}
    where = blue.batch_sharding(shapes)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in shapes.items()}
    if program == "step":
        lowered = make_step(blue).lower(blue.state, batch)
    elif program == "validation":
        lowered = jax.jit(lambda state, batch: make_evaluate(blue)(state, batch)).lower(blue.state, batch)
    else:
        text = blue.config.model.reads == "text"
        how = {"prompt": np.full((ROWS, 32), 7), "num_tokens": 2} if text else {"count": ROWS}
        draw = lambda state: blue.run(state, lambda model: model.sample(jax.random.key(0), **how))  # noqa: E731
        lowered = jax.jit(draw).lower(blue.state)
    costs = lowered.compile().cost_analysis()
    assert costs is not None
    return costs["flops"]


# a vocabulary of 257, that of bytes and a mask, does not divide; of convolutions tensor parallelism leaves whole norms
# before a pair, and of a VQ-VAE the codebook
WHOLE_UNDER_TENSOR = {"masked-nano"}
ALL = [
    (preset, mesh) for preset in FAMILIES for mesh in MESHES if "tensor" not in mesh or preset not in WHOLE_UNDER_TENSOR
]


@pytest.mark.parametrize("program", ["validation", "sample"])
@pytest.mark.parametrize(
    ("preset", "mesh"),
    [pytest.param(*case, marks=() if case in EVERY_DAY else pytest.mark.slow) for case in ALL],
)
def test_eight_devices_do_a_small_part_each(preset, mesh, program):
    share = flops(preset, mesh, program) / flops(preset, None, program)
    assert share < 1 / 5.5, f"{share:.3f} of the work of one device on each of 8"


@pytest.mark.parametrize("count", [1, 11])
def test_rows_that_do_not_divide_are_drawn_alike_on_eight_devices(count):
    drawn = []
    for mesh in (None, "fsdp"):
        blue = built("dit-digits", mesh)
        state = blue.init()
        key = jax.random.key(3)
        drawn.append(blue.run(state, lambda model, key=key: model.sample(key, count=count, steps=2, sampler="ddpm")))
    assert drawn[0].shape == (count, 8, 8, 1)
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "mesh"),
    [
        pytest.param(preset, mesh, marks=() if (preset, mesh) == ("llama-nano", "context+tensor") else pytest.mark.slow)
        for preset in ("llama-nano", "gemma2-nano", "moe-nano", "linear-nano", "dit-digits")
        for mesh in POSITIONS
    ],
)
def test_positions_that_two_axes_divide_are_not_computed_twice(preset, mesh):
    """Left alone, XLA gathers what `context` divides for the sums over `tensor`: 1.75 times the work."""
    share = flops(preset, mesh, "step") / flops(preset, None, "step")
    assert share < 1.2 / 8, f"{8 * share:.3f} times an eighth of the work of one device"
