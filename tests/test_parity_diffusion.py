"""Outputs equal those of `diffusers` with the same random weights, through files. Needs the extra `parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from artifex import models
from artifex.models.diffusion import variance
from artifex.models.diffusion.layouts import CONV, LINEAR, TENSORS, linear
from artifex.models.diffusion.networks import DIT, UNET, MMDiTConfig
from artifex.models.diffusion.objective import to_x0
from artifex.models.diffusion.process import DDPM as DDPMProcess
from artifex.models.layouts import Entry, Layout
from artifex.models.weights import from_pretrained, save_pretrained

torch = pytest.importorskip("torch", reason="parity with diffusers needs: pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs: pip install -e '.[parity]'")

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


def randomised(theirs):
    """Every tensor, biases and norms too, with values that matter, those of repeated embeddings the same ones."""
    generator, drawn = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            key = name.split(".norm1.emb.")[-1] if ".norm1.emb." in name else name
            value = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            scale = "norm" in name.split(".")[-2] and name.endswith("weight")
            parameter.copy_(drawn.setdefault(key, value * fan_in**-0.5 + scale))
    return theirs.eval()


def assert_same_output(theirs, folder, **condition):
    """Ours, read from the file of theirs. `condition` is by their names."""
    randomised(theirs).save_pretrained(folder)
    ours, times = from_pretrained(folder), [0, 999, 417]
    size, channels = theirs.config.sample_size, theirs.config.in_channels
    x = np.random.default_rng(0).normal(size=(3, size, size, channels)).astype(np.float32)
    with torch.no_grad():
        given = {name: torch.tensor(value) for name, value in condition.items()}
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), timestep=torch.tensor(times), **given).sample
    expected = expected.numpy().transpose(0, 2, 3, 1)
    if "pooled_projections" in condition:
        ours_too = {"context": condition["encoder_hidden_states"], "pooled": condition["pooled_projections"]}
    else:
        ours_too = condition.get("class_labels")
    graphdef, state = nnx.split(ours)
    run = jax.jit(lambda state, *given: nnx.merge(graphdef, state)(*given), compiler_options=QUICKLY)
    got = run(state, x, jnp.asarray(times, jnp.float32), ours_too)
    assert np.abs(expected).max() > 0.5 and np.abs(expected[0] - expected[1]).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
    return ours


def dit(**options):
    how = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "sample_size": 12}
    how |= {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10}
    return diffusers.DiTTransformer2DModel(**(how | options))


def unet(*attention_levels, **options):
    attends = [level in attention_levels for level in range(3)]
    how = {"sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 8, "layers_per_block": 1}
    how["down_block_types"] = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    how["up_block_types"] = tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
    return diffusers.UNet2DModel(**(how | options))


DDPM = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
NETWORKS = {
    "DiT": dit,
    "DiT of other sizes": lambda: dit(patch_size=4, out_channels=4, norm_eps=1e-2),
    "DDPM": lambda: unet(1, layers_per_block=2, norm_eps=1e-6, dropout=0.1, **DDPM),
    "UNet with classes": lambda: unet(1, 2, num_class_embeds=11, time_embedding_dim=48),
    "UNet without attention": lambda: unet(add_attention=False, in_channels=2, out_channels=5),
    "ADM": lambda: unet(
        2, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8, attention_head_dim=16, num_class_embeds=11
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_output_equals_that_of_diffusers_and_it_reads_our_file_back(kind, tmp_path):
    theirs = NETWORKS[kind]()
    labelled = isinstance(theirs, diffusers.DiTTransformer2DModel) or theirs.config.num_class_embeds
    condition = {"class_labels": np.array([3, 10, 0])} if labelled else {}
    ours = assert_same_output(theirs, tmp_path / "theirs", **condition)
    save_pretrained(tmp_path / "ours", ours, layout="huggingface")
    again = type(theirs).from_pretrained(tmp_path / "ours").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())


def test_embeddings_that_differ_between_blocks_are_refused(tmp_path):
    theirs = randomised(dit())
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias[1] += 1e-3
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias unlike"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dit(attention_bias=False), "attention_bias False; our network has True"),
        (lambda: unet(center_input_sample=True), "center_input_sample True; our network has False"),
        (lambda: unet(resnet_time_scale_shift="scale_shift"), "attn_norm_num_groups None"),
        (lambda: unet(up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")), "up_block_types"),
        (lambda: unet(class_embed_type="timestep"), "class_embed_type 'timestep'; our network has None"),
    ],
)
def test_what_our_network_cannot_compute_is_refused(make, message, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_the_published_networks_are_those_of_diffusers():
    read = {name: models.LAYOUTS[name].read_config for name in ("UNet2DModel", "DiTTransformer2DModel")}
    down, attends = "DownBlock2D", "AttnDownBlock2D"
    published = {
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": [down, attends, down, down],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_eps": 1e-6,
        "sample_size": 32,
        "dropout": 0.1,
        **DDPM,
    }
    assert read["UNet2DModel"](published) == UNET["ddpm-cifar"]
    assert read["DiTTransformer2DModel"]({"out_channels": 8, "norm_eps": 1e-6}) == DIT["dit-xl2"]


def read_sd3(config) -> MMDiTConfig:
    return MMDiTConfig(
        image_size=config["sample_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        patch_size=config["patch_size"],
        embed_dim=config["num_attention_heads"] * config["attention_head_dim"],
        num_layers=config["num_layers"],
        num_heads=config["num_attention_heads"],
        context_dim=config["joint_attention_dim"],
        pooled_dim=config["pooled_projection_dim"],
        position_grid=config["pos_embed_max_size"],
    )


def sd3_entries(cfg) -> list[Entry]:
    block, last = "transformer_blocks.{layers}", f"transformer_blocks.{cfg.num_layers - 1}"
    entries = [
        Entry("pos_embed.proj.weight", "patches.project.kernel", CONV),
        Entry("pos_embed.proj.bias", "patches.project.bias"),
        *linear("context_embedder", "context"),
        *linear("proj_out", "head.project", (1, 3)),
    ]
    for theirs, ours in (("timestep_embedder", "time"), ("text_embedder", "pooled")):
        for layer, name in (("linear_1", "first"), ("linear_2", "second")):
            entries += linear(f"time_text_embed.{theirs}.{layer}", f"{ours}.{name}")
    image = ("norm1", "to_{}", "to_out.0", "ff")
    text = ("norm1_context", "add_{}_proj", "to_add_out", "ff_context")
    for theirs, ours, names in (
        (block, "layers.image", image),
        (block, "layers.text", text),
        (last, "last.image", image),
    ):
        norm, project, out, mlp = names
        entries += linear(f"{theirs}.{norm}.linear", f"{ours}.modulation.project", (1, 2))
        for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
            entries += linear(f"{theirs}.attn.{project.format(short)}", f"{ours}.attention.{name}", (1, 2))
        entries.append(Entry(f"{theirs}.attn.{out}.weight", f"{ours}.attention.out.kernel", LINEAR, (2, 1)))
        entries.append(Entry(f"{theirs}.attn.{out}.bias", f"{ours}.attention.out.bias"))
        entries += linear(f"{theirs}.{mlp}.net.0.proj", f"{ours}.mlp.up") + linear(
            f"{theirs}.{mlp}.net.2", f"{ours}.mlp.down"
        )
    for short, name in (("k", "key"), ("v", "value")):
        entries += linear(f"{last}.attn.add_{short}_proj", f"last.text_{name}", (1, 2))
    for theirs, ours in ((f"{last}.norm1_context.linear", "last.text_norm"), ("norm_out.linear", "head.norm")):
        for part, transpose in (("kernel", LINEAR), ("bias", None)):
            both = (f"{ours}.scale.{part}", f"{ours}.shift.{part}")
            entries.append(Entry(f"{theirs}.{'weight' if part == 'kernel' else part}", both, transpose))
    return entries


def test_output_equals_that_of_sd3(tmp_path, monkeypatch):
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        pos_embed_max_size=10,
    )
    # the queries of the text in the last block are read by nothing
    ignored = (r"pos_embed\.pos_embed", r"transformer_blocks\.2\.attn\.add_q_proj\.(weight|bias)")
    layout = Layout("SD3Transformer2DModel", read_sd3, dict, sd3_entries, ignored, TENSORS)
    monkeypatch.setitem(models.LAYOUTS, layout.architecture, layout)
    draw = np.random.default_rng(1)
    text = {"encoder_hidden_states": (3, 7, 20), "pooled_projections": (3, 12)}
    condition = {name: draw.normal(size=shape).astype(np.float32) for name, shape in text.items()}
    assert_same_output(theirs, tmp_path, **condition)


@pytest.mark.parametrize(("betas", "clipped"), [("linear", True), ("cosine", False)])
def test_each_ancestral_step_with_a_learned_variance_equals_that_of_diffusers(betas, clipped, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas],
        variance_type="learned_range",
        clip_sample=clipped,
    )
    # in float64: theirs in float32 have three digits of the first betas
    beta = np.linspace(1e-4, 0.02, 1_000) if betas == "linear" else scheduler.betas.double().numpy()
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.from_numpy(beta), 0)
    entries = [999, 979, 600, 300, 20, 2, 1, 0]  # to entry 0: theirs adds noise in a last step from another one
    scheduler.set_timesteps(timesteps=entries)
    steps = len(entries)
    shape, draw = (2, 4, 4, 3), np.random.default_rng(0)
    x_T = draw.normal(size=shape).astype(np.float32)
    outputs = draw.normal(size=(steps, *shape[:3], 6)).astype(np.float32)
    key = jax.random.key(0)
    noise = [np.asarray(jax.random.normal(each, shape)) for each in jax.random.split(key, steps)]

    def channels_first(x):
        return torch.from_numpy(np.array(x, np.float64).transpose(0, 3, 1, 2))

    fresh = iter(noise)
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda shape, **how: channels_first(next(fresh)))
    expected = [channels_first(x_T)]
    for time, output in zip(scheduler.timesteps, outputs, strict=True):
        expected.append(scheduler.step(channels_first(output), time, expected[-1]).prev_sample)
    expected = np.stack([x.numpy().transpose(0, 2, 3, 1) for x in expected])

    process, seen = DDPMProcess(betas), []

    def denoise(x, t_B):
        eps, v = jnp.split(jnp.asarray(outputs[len(seen)]), 2, axis=-1)
        seen.append(np.asarray(x))
        x0 = to_x0("eps", eps, x, t_B, process)
        return (jnp.clip(x0, -1, 1) if clipped else x0), v

    with jax.disable_jit():  # a loop in Python, whose steps can be seen
        last = variance.ddpm(denoise, jnp.asarray(x_T), process, np.array(entries, np.float32) / 999, key)
    for ours, theirs in zip([*seen, last], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
