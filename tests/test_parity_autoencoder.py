"""The KL autoencoder and its blocks equal `diffusers`' with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from artifex import models  # noqa: E402
from artifex.models import weights  # noqa: E402
from artifex.models.resnet import ResnetBlock  # noqa: E402
from artifex.models.vae.config import PRESETS  # noqa: E402
from artifex.models.vae.layouts import entries, read_config, write_config  # noqa: E402
from artifex.models.vae.vae import gaussian_kl  # noqa: E402

SIZES = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "latent_channels": 3,
}
VARIANTS = {
    "stable diffusion": {},
    "without latent convolutions": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1,
        "scaling_factor": 1.5,
    },
    "without attention": {"mid_block_add_attention": False, "layers_per_block": 2},
}
PUBLISHED = {"sd-autoencoder": 83_653_863, "sd3-autoencoder": 83_819_683}


def random_weights(module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def last(x):
    return np.transpose(x.detach().numpy(), (0, 2, 3, 1))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    theirs = diffusers.AutoencoderKL(**(SIZES | VARIANTS[request.param])).eval()
    random_weights(theirs)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, weights.from_pretrained(folder)


def test_latents_and_images_equal_those_of_diffusers(pair):
    theirs, ours = pair
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        posterior, decoded = theirs.encode(x).latent_dist, theirs.decode(z).sample
    mean, logvar = nnx.jit(lambda model, x: model.encode(x))(ours, jnp.asarray(last(x)))
    np.testing.assert_allclose(mean, last(posterior.mean), atol=1e-4)
    np.testing.assert_allclose(logvar, last(posterior.logvar), atol=1e-4)
    np.testing.assert_allclose(
        nnx.jit(lambda model, z: model.decode(z))(ours, jnp.asarray(last(z))), last(decoded), atol=1e-4
    )
    np.testing.assert_allclose(gaussian_kl(mean, logvar), posterior.kl().numpy(), rtol=1e-4)


def test_what_we_write_diffusers_reads(pair, tmp_path):
    theirs, ours = pair
    weights.save_pretrained(tmp_path, ours, layout="AutoencoderKL")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert again.config.scaling_factor == theirs.config.scaling_factor
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_conditioned_residual_block_equals_that_of_diffusers(scale_shift):
    from diffusers.models.resnet import ResnetBlock2D

    norm = "scale_shift" if scale_shift else "default"
    theirs = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=12, groups=8, time_embedding_norm=norm).eval()
    random_weights(theirs)
    ours = ResnetBlock(16, 32, groups=8, eps=1e-6, condition=12, scale_shift=scale_shift, rngs=nnx.Rngs(0))
    names = {"time_emb_proj": "condition", "conv_shortcut": "shortcut"}
    for name, value in theirs.state_dict().items():
        part, kind = name.split(".")
        module, value = getattr(ours, names.get(part, part)), value.numpy()
        if kind == "weight" and value.ndim > 1:
            module.kernel[...] = jnp.asarray(value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0)))
        else:
            setattr_of = module.bias if kind == "bias" else module.scale
            setattr_of[...] = jnp.asarray(value)
    x, c = torch.randn(2, 16, 4, 4), torch.randn(2, 12)
    with torch.no_grad():
        expected = theirs(x, c)
    found = nnx.jit(lambda block, x, c: block(x, c))(ours, jnp.asarray(last(x)), jnp.asarray(c.numpy()))
    np.testing.assert_allclose(found, last(expected), atol=1e-4)


def test_the_divergence_is_that_of_torch():
    mean, logvar = torch.randn(3, 7), torch.randn(3, 7)
    q = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    np.testing.assert_allclose(gaussian_kl(jnp.asarray(mean.numpy()), jnp.asarray(logvar.numpy())), expected, rtol=1e-4)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters_and_their_shapes(preset):
    cfg = PRESETS[preset]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(write_config(cfg))
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))))
    ours = {".".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == PUBLISHED[preset]
    table = entries(cfg)
    assert sorted(entry.ours for entry in table) == sorted(ours)
    assert {entry.theirs: entry.their_shape([ours[entry.ours].shape]) for entry in table} == shapes


def test_a_configuration_comes_back_from_theirs():
    for preset in PUBLISHED:
        cfg = PRESETS[preset]
        assert read_config(write_config(cfg)) == cfg


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("out_channels", 4),
        ("use_post_quant_conv", False),
        ("latents_mean", [0.0] * 4),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
    ],
)
def test_what_our_autoencoder_cannot_do_is_refused_by_its_key(key, value):
    with pytest.raises(ValueError, match=key):
        read_config(write_config(PRESETS["sd-autoencoder"]) | {key: value})


def test_the_layout_is_one_of_the_zoo():
    assert models.LAYOUTS["AutoencoderKL"].tensors == "diffusion_pytorch_model.safetensors"
