"""Outputs equal those of `diffusers` with the same random weights. Needs the extra `parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex.models.diffusion.layouts import LAYOUTS, read_dit, read_unet
from artifex.models.diffusion.networks import DIT, UNET, DiTConfig, MMDiTConfig, UNetConfig

torch = pytest.importorskip("torch", reason="parity with diffusers needs: pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs: pip install -e '.[parity]'")

BY_NAME = {layout.architecture: layout for layout in LAYOUTS}


def randomised(theirs):
    """Every tensor, biases and norms too, with values that matter, those of repeated embeddings the same ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            key = name.split(".norm1.emb.")[-1] if ".norm1.emb." in name else name
            value = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            drawn.setdefault(key, value * fan_in**-0.5 + ("norm" in name.split(".")[-2] and name.endswith("weight")))
            parameter.copy_(drawn[key])
    return theirs.eval()


def ours_from(theirs):
    """Our network with the weights of theirs, moved by our table of entries."""
    layout = BY_NAME[type(theirs).__name__]
    cfg = layout.read_config(dict(theirs.config))
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))))
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    flat = {}
    for entry in layout.entries(cfg):
        count = cfg.num_layers if "{layers}" in entry.theirs else 1
        tensors = [state.pop(entry.theirs.format(layers=i)) for i in range(count)]
        turned = np.stack([t if entry.transpose is None else t.transpose(entry.transpose) for t in tensors])
        turned = turned if count > 1 and not entry.copies else turned[0]
        names = (entry.ours,) if isinstance(entry.ours, str) else entry.ours
        for name, part in zip(names, np.split(turned, len(names), axis=-1), strict=True):
            flat[name] = part.reshape(shapes[name])
    assert state == {} and set(flat) == set(shapes)
    paths = {path: jnp.asarray(flat[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(abstract)}
    return nnx.merge(graphdef, nnx.from_flat_state([(path, nnx.Param(value)) for path, value in paths.items()]))


@jax.jit
def run(split, *inputs):
    return nnx.merge(*split)(*inputs)


def assert_same_output(theirs, times, labels=None):
    randomised(theirs)
    ours = ours_from(theirs)
    size, channels = theirs.config.sample_size, theirs.config.in_channels
    x = np.random.default_rng(0).normal(size=(len(times), size, size, channels)).astype(np.float32)
    condition = {} if labels is None else {"class_labels": torch.tensor(labels)}
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), timestep=torch.tensor(times), **condition).sample
    expected = expected.numpy().transpose(0, 2, 3, 1)
    got = run(nnx.split(ours), x, jnp.asarray(times, jnp.float32), None if labels is None else jnp.asarray(labels))
    assert np.abs(expected).max() > 0.5 and np.abs(expected[0] - expected[1]).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def dit(**options):
    how = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "sample_size": 12, "norm_eps": 1e-5}
    how |= {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10}
    return diffusers.DiTTransformer2DModel(**(how | options))


def unet(*attention_levels, **options):
    attends = [level in attention_levels for level in range(3)]
    how = {"sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 8, "norm_eps": 1e-6}
    how["down_block_types"] = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    how["up_block_types"] = tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
    return diffusers.UNet2DModel(**(how | options))


@pytest.mark.parametrize("options", [{}, {"patch_size": 4, "out_channels": 4, "norm_eps": 1e-2}])
def test_output_equals_that_of_dit(options):
    assert_same_output(dit(**options), [0, 999, 417], [3, 10, 0])


UNETS = {
    "ddpm": lambda: unet(1, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1),
    "class labels": lambda: unet(1, 2, num_class_embeds=11, layers_per_block=1, time_embedding_dim=48),
    "no attention": lambda: unet(add_attention=False, in_channels=2, out_channels=5),
    "adm": lambda: unet(2, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8, attention_head_dim=16),
}


@pytest.mark.parametrize("kind", UNETS)
def test_output_equals_that_of_unet(kind):
    assert_same_output(UNETS[kind](), [0, 999, 417], [3, 10, 0] if kind == "class labels" else None)
