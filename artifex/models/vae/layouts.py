"""What `diffusers` calls the tensors of a KL autoencoder: the table of its `AutoencoderKL`. Imports no JAX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from artifex.models.layouts import Entry, Layout
from artifex.models.vae.config import KLAutoencoderConfig

# Keys of their config.json that our autoencoder has one way to answer.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
}


def read_config(theirs: Mapping[str, Any]) -> KLAutoencoderConfig:
    """Our configuration of an `AutoencoderKL`.

    Raises `ValueError` for a key whose value our autoencoder cannot do.
    """
    theirs = _DEFAULTS | dict(theirs)
    widths = tuple(theirs["block_out_channels"])
    expected = FIXED | {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "out_channels": theirs["in_channels"],
        "use_post_quant_conv": theirs["use_quant_conv"],
    }
    for key, value in expected.items():
        got = list(theirs[key]) if isinstance(value, list) else theirs[key]
        if got != value:
            raise ValueError(f"AutoencoderKL with {key} {got!r} is not supported; expected {value!r}")
    return KLAutoencoderConfig(
        image_size=theirs["sample_size"],
        channels=theirs["in_channels"],
        latent_channels=theirs["latent_channels"],
        block_channels=widths,
        layers_per_block=theirs["layers_per_block"],
        groups=theirs["norm_num_groups"],
        mid_attention=theirs["mid_block_add_attention"],
        latent_convs=theirs["use_quant_conv"],
        latent_scale=theirs["scaling_factor"],
        latent_shift=theirs["shift_factor"] or 0.0,
    )


def write_config(cfg: KLAutoencoderConfig) -> dict[str, Any]:
    """Their `config.json` of our configuration."""
    levels, (shift, scale) = len(cfg.block_channels), cfg.shift_and_scale
    return FIXED | {
        "_class_name": "AutoencoderKL",
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(cfg.block_channels),
        "layers_per_block": cfg.layers_per_block,
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": cfg.groups,
        "sample_size": cfg.image_size,
        "scaling_factor": scale,
        "shift_factor": shift or None,
        "use_quant_conv": cfg.latent_convs,
        "use_post_quant_conv": cfg.latent_convs,
        "mid_block_add_attention": cfg.mid_attention,
    }


# What a key that is not there means: older files leave out the later ones.
_DEFAULTS: dict[str, Any] = {
    **FIXED,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def entries(cfg: KLAutoencoderConfig) -> list[Entry]:
    """Every tensor of an `AutoencoderKL`."""
    found = []
    for side in ("encoder", "decoder"):
        found += _conv(f"{side}.conv_in", f"{side}.conv_in")
        found += _levels(cfg, side)
        found += _block(f"{side}.mid_block.resnets.0", f"{side}.middle.block1")
        found += _block(f"{side}.mid_block.resnets.1", f"{side}.middle.block2")
        if cfg.mid_attention:
            found += _attention(f"{side}.mid_block.attentions.0", f"{side}.middle.attention")
        found += _norm(f"{side}.conv_norm_out", f"{side}.norm_out")
        found += _conv(f"{side}.conv_out", f"{side}.conv_out")
    if cfg.latent_convs:
        found += [*_conv("quant_conv", "latent_out"), *_conv("post_quant_conv", "latent_in")]
    return found


def _levels(cfg: KLAutoencoderConfig, side: str) -> Iterator[Entry]:
    count = len(cfg.block_channels)
    widths = cfg.block_channels if side == "encoder" else cfg.block_channels[::-1]
    blocks, kind, sampler = {
        "encoder": (cfg.layers_per_block, "down_blocks", "downsamplers"),
        "decoder": (cfg.layers_per_block + 1, "up_blocks", "upsamplers"),
    }[side]
    for level in range(count):
        theirs, ours = f"{side}.{kind}.{level}", f"{side}.levels.{level}"
        for index in range(blocks):
            changes = index == 0 and widths[max(level - 1, 0)] != widths[level]
            yield from _block(f"{theirs}.resnets.{index}", f"{ours}.blocks.{index}", shortcut=changes)
        if level + 1 < count:
            yield from _conv(f"{theirs}.{sampler}.0.conv", f"{ours}.resample.conv")


def _block(theirs: str, ours: str, shortcut: bool = False) -> Iterator[Entry]:
    for index in (1, 2):
        yield from _norm(f"{theirs}.norm{index}", f"{ours}.norm{index}")
        yield from _conv(f"{theirs}.conv{index}", f"{ours}.conv{index}")
    if shortcut:
        yield from _conv(f"{theirs}.conv_shortcut", f"{ours}.shortcut")


def _attention(theirs: str, ours: str) -> Iterator[Entry]:
    yield from _norm(f"{theirs}.group_norm", f"{ours}.norm")
    for their, our in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
        yield Entry(f"{theirs}.{their}.weight", f"{ours}.{our}.kernel", (1, 0))
        yield Entry(f"{theirs}.{their}.bias", f"{ours}.{our}.bias")


def _conv(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}.kernel", (2, 3, 1, 0))
    yield Entry(f"{theirs}.bias", f"{ours}.bias")


def _norm(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}.scale")
    yield Entry(f"{theirs}.bias", f"{ours}.bias")


LAYOUTS: list[Layout] = [
    Layout(
        "AutoencoderKL",
        read_config,
        write_config,
        entries,
        tensors="diffusion_pytorch_model.safetensors",
    )
]
