"""Model FLOPs against closed forms and XLA's own count, and the peaks that they are divided by."""

from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from artifex.config import Config
from artifex.scaling.autodist.profile import Measured
from artifex.scaling.peak import peak
from artifex.training.model_flops import model_flops

TINY = {"training": {"batch_size": 4}, "data": {"sequence_length": 64}}


def test_a_decoder_needs_six_flops_a_weight_and_token_and_twelve_for_each_pair_that_attends():
    config = Config.from_dict(TINY)
    cfg = config.model.spec()
    tokens, embed, layers, hidden = 4 * 64, cfg.embed_dim, cfg.num_layers, cfg.mlp_dim
    weights = layers * (4 * embed**2 + 3 * embed * hidden) + cfg.vocab_size * embed
    pairs = layers * 64 * embed * tokens  # all of them: 64 tokens are one block
    assert model_flops(config) == 6 * weights * tokens + 12 * pairs


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"batch_size": 4, "remat": "full"}},
        {"training": {"batch_size": 4, "gradient_accumulation": 2, "unroll": 3}},
        {"training": {"batch_size": 4, "attention": "tiles"}, "device": {"pipeline": 2, "data": 2}},
    ],
)
def test_how_it_is_computed_changes_nothing(change):
    assert model_flops(Config.from_dict(TINY | change)) == model_flops(Config.from_dict(TINY))


def test_an_encoder_that_is_not_trained_counts_once():
    latent = Config.from_file("configs/latent_diffusion_digits.yaml").to_dict()
    latent["training"]["batch_size"] = 2
    whole, cached = (
        model_flops(Config.from_dict(latent | {"data": latent["data"] | {"cache_latents": yes}}))
        for yes in (False, True)
    )
    spec = Config.from_dict(latent).model.spec()
    model = nnx.eval_shape(lambda: spec.build(nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((2, spec.image_size, spec.image_size, spec.channels), "float32")
    encode = jax.jit(lambda state, image: nnx.merge(graphdef, state).encode(image))
    by_xla: float = encode.lower(state, image).cost_analysis()["flops"]  # pyright: ignore  # without what is multiplied by padding
    assert by_xla < whole - cached < 1.5 * by_xla


def device(kind: str, platform: str):
    return SimpleNamespace(device_kind=kind, platform=platform)


def test_a_listed_peak_is_that_of_all_devices():
    found = peak([device("NVIDIA H100 80GB HBM3", "gpu")] * 8, "bfloat16")
    assert found is not None and found.flops == pytest.approx(8 * 989.5e12)
    assert "gpu:h100" in str(found)


def test_a_cpu_has_the_peak_that_was_measured_on_it(tmp_path):
    devices = jax.devices()[:1]
    assert peak(devices, "float32", folder=tmp_path) is None
    found = peak(devices, "float32", measured=True, folder=tmp_path)
    assert found is not None
    best = max(2 * row.size**3 / row.seconds for row in Measured.load(tmp_path).rows)  # pyright: ignore
    assert found.flops == best
    assert peak(devices, "float32", folder=tmp_path) == found, "read, not measured again"
    assert peak(devices, "bfloat16", folder=tmp_path) is None
