"""What `diffusers` calls the tensors of our diffusion networks. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifex.models.diffusion.networks import DiTConfig, UNetConfig
from artifex.models.layouts import Entry, Layout

TENSORS = "diffusion_pytorch_model.safetensors"
CONV, LINEAR = (2, 3, 1, 0), (1, 0)  # theirs are (out, in, height, width) and (out, in)


def linear(theirs: str, ours: str, merge: tuple[int, ...] | None = None, copies: int = 0) -> list[Entry]:
    """Kernel and bias of a linear map; `merge` as for the kernel, whose input is one dim."""
    bias = None if merge is None else merge[1:]
    return [
        Entry(f"{theirs}.weight", f"{ours}.kernel", LINEAR, merge, copies=copies),
        Entry(f"{theirs}.bias", f"{ours}.bias", None, bias, copies=copies),
    ]


def conv(theirs: str, ours: str) -> list[Entry]:
    """Kernel and bias of a convolution."""
    return [Entry(f"{theirs}.weight", f"{ours}.kernel", CONV), Entry(f"{theirs}.bias", f"{ours}.bias")]


def norm(theirs: str, ours: str) -> list[Entry]:
    """Scale and bias of a norm."""
    return [Entry(f"{theirs}.weight", f"{ours}.scale"), Entry(f"{theirs}.bias", f"{ours}.bias")]


def require(config: Mapping[str, Any], expected: Mapping[str, tuple]) -> None:
    """Raise `ValueError` for a value in `config` that is none of the `expected`, the first of which is the default."""
    for key, values in expected.items():
        value = config.get(key, values[0])
        value = tuple(value) if isinstance(value, list) else value
        if value not in values:
            raise ValueError(f"config.json has {key} {value!r}; our network has {' or '.join(map(repr, values))}")


def read_dit(config: Mapping[str, Any]) -> DiTConfig:
    """Our configuration of a `DiTTransformer2DModel`."""
    fixed = {
        "attention_bias": (True,),
        "activation_fn": ("gelu-approximate",),
        "norm_type": ("ada_norm_zero",),
        "norm_elementwise_affine": (False,),
    }
    require(config, fixed)
    in_channels, heads = config.get("in_channels", 4), config.get("num_attention_heads", 16)
    return DiTConfig(
        image_size=config.get("sample_size", 32),
        in_channels=in_channels,
        out_channels=config.get("out_channels") or in_channels,
        num_classes=config.get("num_embeds_ada_norm", 1000),
        patch_size=config.get("patch_size", 2),
        embed_dim=heads * config.get("attention_head_dim", 72),
        num_layers=config.get("num_layers", 28),
        num_heads=heads,
        mlp_norm_eps=config.get("norm_eps", 1e-5),
    )


def write_dit(cfg: DiTConfig) -> dict[str, Any]:
    """The `config.json` of a `DiTTransformer2DModel`. Raises `ValueError` for what it cannot be."""
    if not cfg.num_classes:
        raise ValueError("num_classes is 0; DiTTransformer2DModel always has classes, write our own layout")
    if cfg.feed_forward != 4 * cfg.embed_dim:
        raise ValueError(
            f"mlp_dim is {cfg.feed_forward}; DiTTransformer2DModel has 4 embed_dim = {4 * cfg.embed_dim}, write our own"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": cfg.image_size,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "num_embeds_ada_norm": cfg.num_classes,
        "patch_size": cfg.patch_size,
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.embed_dim // cfg.num_heads,
        "num_layers": cfg.num_layers,
        "norm_eps": cfg.mlp_norm_eps,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


def dit_entries(cfg: DiTConfig) -> list[Entry]:
    """Every tensor of a DiT. Theirs has the embedding of time and class in every block, with the same numbers."""
    block = "transformer_blocks.{layers}"
    embedding = f"{block}.norm1.emb"
    heads = {"to_q": "query", "to_k": "key", "to_v": "value"}
    final = ("head.norm.shift", "head.norm.scale")
    return [
        *conv("pos_embed.proj", "patches.project"),
        *linear(f"{embedding}.timestep_embedder.linear_1", "condition.time.first", copies=cfg.num_layers),
        *linear(f"{embedding}.timestep_embedder.linear_2", "condition.time.second", copies=cfg.num_layers),
        Entry(f"{embedding}.class_embedder.embedding_table.weight", "condition.classes.table", copies=cfg.num_layers),
        *linear(f"{block}.norm1.linear", "layers.modulation.project", (1, 2)),
        *[
            entry
            for theirs, ours in heads.items()
            for entry in linear(f"{block}.attn1.{theirs}", f"layers.attention.{ours}", (1, 2))
        ],
        Entry(f"{block}.attn1.to_out.0.weight", "layers.attention.out.kernel", LINEAR, (2, 1)),
        Entry(f"{block}.attn1.to_out.0.bias", "layers.attention.out.bias"),
        *linear(f"{block}.ff.net.0.proj", "layers.mlp.up"),
        *linear(f"{block}.ff.net.2", "layers.mlp.down"),
        Entry("proj_out_1.weight", tuple(f"{path}.kernel" for path in final), LINEAR),
        Entry("proj_out_1.bias", tuple(f"{path}.bias" for path in final)),
        *linear("proj_out_2", "head.project", (1, 3)),
    ]


def read_unet(config: Mapping[str, Any]) -> UNetConfig:
    """Our configuration of a `UNet2DModel`."""
    fixed = {
        "center_input_sample": (False,),
        "time_embedding_type": ("positional",),
        "freq_shift": (0, 1),
        "mid_block_type": ("UNetMidBlock2D",),
        "mid_block_scale_factor": (1,),
        "downsample_padding": (1, 0),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "act_fn": ("silu", "swish"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None,),
    }
    require(config, fixed)
    down = tuple(config.get("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3)))
    up = tuple(config.get("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D")))
    levels = tuple(level for level, name in enumerate(down) if name == "AttnDownBlock2D")
    groups, scale_shift = config.get("norm_num_groups", 32), config.get("resnet_time_scale_shift") == "scale_shift"
    mid_attention, mid_groups = config.get("add_attention", True), config.get("attn_norm_num_groups")
    if (down, up) != block_types(len(down), levels):
        raise ValueError(
            f"config.json has down_block_types {down} and up_block_types {up}; our network has DownBlock2D or "
            "AttnDownBlock2D and the same levels with attention on the way up"
        )
    # diffusers leaves the group norm of the attention out where neither key says otherwise
    if mid_attention and (mid_groups or (None if scale_shift else groups)) != groups:
        raise ValueError(
            f"config.json has attn_norm_num_groups {mid_groups!r}; our network has norm_num_groups {groups}"
        )
    size, classes = config.get("sample_size"), config.get("num_class_embeds")
    channels = tuple(config.get("block_out_channels", (224, 448, 672, 896)))
    if not isinstance(size, int):
        raise ValueError(f"config.json has sample_size {size!r}; our network needs one number, the height and width")
    return UNetConfig(
        image_size=size,
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        num_classes=classes - 1 if classes else 0,
        block_channels=channels,
        layers_per_block=config.get("layers_per_block", 2),
        attention_levels=levels,
        mid_attention=mid_attention,
        head_dim=config.get("attention_head_dim", 8),
        groups=groups,
        norm_eps=config.get("norm_eps", 1e-5),
        scale_shift=scale_shift,
        downsample_padding=config.get("downsample_padding", 1),
        condition_dim=config.get("time_embedding_dim"),
        cosine_first=config.get("flip_sin_to_cos", True),
        frequency_shift=config.get("freq_shift", 0),
        dropout=config.get("dropout", 0.0),
    )


def block_types(count: int, attention_levels: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Their names of the levels on the way down and on the way up."""
    attends = [level in attention_levels for level in range(count)]
    down = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    return down, tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))


def write_unet(cfg: UNetConfig) -> dict[str, Any]:
    """The `config.json` of a `UNet2DModel`."""
    down, up = block_types(len(cfg.block_channels), cfg.attention_levels)
    return {
        "_class_name": "UNet2DModel",
        "sample_size": cfg.image_size,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "num_class_embeds": cfg.num_classes + 1 if cfg.num_classes else None,
        "block_out_channels": list(cfg.block_channels),
        "layers_per_block": cfg.layers_per_block,
        "down_block_types": list(down),
        "up_block_types": list(up),
        "add_attention": cfg.mid_attention,
        "attention_head_dim": cfg.head_dim,
        "norm_num_groups": cfg.groups,
        "attn_norm_num_groups": cfg.groups,
        "norm_eps": cfg.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if cfg.scale_shift else "default",
        "downsample_padding": cfg.downsample_padding,
        "time_embedding_dim": cfg.condition_dim,
        "flip_sin_to_cos": cfg.cosine_first,
        "freq_shift": cfg.frequency_shift,
        "dropout": cfg.dropout,
        "act_fn": "silu",
        "time_embedding_type": "positional",
        "center_input_sample": False,
    }


def unet_entries(cfg: UNetConfig) -> list[Entry]:
    """Every tensor of a UNet."""
    entries = [
        *linear("time_embedding.linear_1", "condition.time.first"),
        *linear("time_embedding.linear_2", "condition.time.second"),
        *conv("conv_in", "conv_in"),
        *resnet_entries("mid_block.resnets.0", "middle.resnet1", changes=False),
        *resnet_entries("mid_block.resnets.1", "middle.resnet2", changes=False),
        *norm("conv_norm_out", "norm_out"),
        *conv("conv_out", "conv_out"),
    ]
    if cfg.num_classes:
        entries.append(Entry("class_embedding.weight", "condition.classes.table"))
    if cfg.mid_attention:
        entries += attention_entries("mid_block.attentions.0", "middle.attention")
    count = len(cfg.block_channels)
    for level, channels in enumerate(cfg.block_channels):
        down, up = (
            (f"down_blocks.{level}", f"down.{level}"),
            (f"up_blocks.{count - 1 - level}", f"up.{count - 1 - level}"),
        )
        changes = level > 0 and channels != cfg.block_channels[level - 1]
        for i in range(cfg.layers_per_block):
            entries += stage_entries(cfg, level, i, *down, changes=i == 0 and changes)
        for i in range(cfg.layers_per_block + 1):
            entries += stage_entries(cfg, level, i, *up, changes=True)
        if level < count - 1:
            entries += conv(f"{down[0]}.downsamplers.0.conv", f"{down[1]}.downsample.conv")
        if level > 0:
            entries += conv(f"{up[0]}.upsamplers.0.conv", f"{up[1]}.upsample.conv")
    return entries


def stage_entries(cfg: UNetConfig, level: int, i: int, theirs: str, ours: str, *, changes: bool) -> list[Entry]:
    """The i-th residual block of a level and its attention, if it has any."""
    entries = resnet_entries(f"{theirs}.resnets.{i}", f"{ours}.stages.{i}.resnet", changes=changes)
    if level in cfg.attention_levels:
        entries += attention_entries(f"{theirs}.attentions.{i}", f"{ours}.stages.{i}.attention")
    return entries


def resnet_entries(theirs: str, ours: str, *, changes: bool) -> list[Entry]:
    """A residual block; one that changes the number of channels has a shortcut."""
    return [
        *norm(f"{theirs}.norm1", f"{ours}.norm1"),
        *conv(f"{theirs}.conv1", f"{ours}.conv1"),
        *linear(f"{theirs}.time_emb_proj", f"{ours}.condition"),
        *norm(f"{theirs}.norm2", f"{ours}.norm2"),
        *conv(f"{theirs}.conv2", f"{ours}.conv2"),
        *(conv(f"{theirs}.conv_shortcut", f"{ours}.shortcut") if changes else []),
    ]


def attention_entries(theirs: str, ours: str) -> list[Entry]:
    """Attention over pixels."""
    return [
        *norm(f"{theirs}.group_norm", f"{ours}.norm"),
        *linear(f"{theirs}.to_q", f"{ours}.query"),
        *linear(f"{theirs}.to_k", f"{ours}.key"),
        *linear(f"{theirs}.to_v", f"{ours}.value"),
        *linear(f"{theirs}.to_out.0", f"{ours}.out"),
    ]


LAYOUTS = [
    Layout("DiTTransformer2DModel", read_dit, write_dit, dit_entries, tensors=TENSORS),
    Layout("UNet2DModel", read_unet, write_unet, unet_entries, tensors=TENSORS),
]
