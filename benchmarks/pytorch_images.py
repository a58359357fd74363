"""The image models in PyTorch, by `diffusers` where it has them, with our parameters. Needs the extra `parity`."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import torch

from artifex.models.weights import save_pretrained
from artifex.models.weights_config import chosen_layout

Tree = Any
F = torch.nn.functional


class Diffusion(torch.nn.Module):
    """The noise in x_t, learned by least squares: `forward(image, label, time, eps)` is the loss."""

    def __init__(self, ours: Any):
        super().__init__()
        kind = type(ours.network).__name__
        theirs = getattr(diffusers, {"DiT": "DiTTransformer2DModel", "UNet": "UNet2DModel"}[kind])
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(folder, ours.network, layout="huggingface")
            self.network = theirs.from_pretrained(folder, low_cpu_mem_usage=False)
        self.labelled = kind == "DiT"
        log_a = torch.cumsum(torch.log1p(-torch.linspace(1e-4, 0.02, 1_000, dtype=torch.float64)), 0)
        self.register_buffer("signal", torch.exp(0.5 * log_a).float())
        self.register_buffer("noise", torch.sqrt(-torch.expm1(log_a)).float())

    def draw(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """The random numbers of a step."""
        time = torch.randint(1_000, image.shape[:1], device=image.device)
        return {"time": time, "eps": torch.randn_like(image)}

    def forward(self, image: torch.Tensor, label: Any, time: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        signal, noise = (self.get_buffer(name)[time][:, None, None, None] for name in ("signal", "noise"))
        condition = {"class_labels": label} if self.labelled else {}
        y = self.network(signal * image + noise * eps, timestep=time, **condition).sample
        return F.mse_loss(y[:, : image.shape[1]].float(), eps)


class VAE(torch.nn.Module):
    """The convolutional VAE of the same layers: `forward(image, label, eps)` is the loss."""

    def __init__(self, ours: Any, params: Tree):
        super().__init__()
        cfg = ours.cfg
        widths, side = cfg.block_channels, cfg.image_size >> len(cfg.block_channels)
        self.shape, self.levels = (widths[-1], side, side), cfg.levels
        down = zip((cfg.channels, *widths[:-1]), widths, strict=True)
        self.down = torch.nn.ModuleList([torch.nn.Conv2d(i, o, 4, 2, 1) for i, o in down])
        size = math.prod(self.shape)
        self.latent = torch.nn.Linear(size, 2 * cfg.latent_dim)
        self.expand = torch.nn.Linear(cfg.latent_dim, size)
        up = zip(widths[::-1], (*widths[-2::-1], cfg.channels), strict=True)
        self.up = torch.nn.ModuleList([torch.nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in up])
        self.log_std = torch.nn.Parameter(torch.zeros(cfg.channels))
        self.load_state_dict(_vae_weights(params))

    def draw(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """The random numbers of a step."""
        return {"eps": torch.randn(image.shape[0], self.expand.in_features, device=image.device)}

    def forward(self, image: torch.Tensor, label: Any, eps: torch.Tensor) -> torch.Tensor:
        h = image
        for conv in self.down:
            h = F.silu(conv(h))
        mean, logvar = self.latent(h.flatten(1)).float().chunk(2, -1)
        logvar = logvar.clamp(-30, 20)
        h = self.expand(mean + torch.exp(0.5 * logvar) * eps).unflatten(1, self.shape)
        h = h.contiguous(memory_format=torch.channels_last) if _is_channels_last(image) else h
        for conv in self.up:
            h = conv(F.silu(h))
        std = torch.exp(self.log_std)[None, :, None, None]
        log_p = _log_probability(image, h.float(), std, self.levels).sum() / len(image)
        kl = 0.5 * (mean.square() + torch.exp(logvar) - 1 - logvar).sum() / len(image)
        return kl - log_p


def _is_channels_last(image: torch.Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def _log_probability(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, levels: int) -> torch.Tensor:
    """log of what N(mean, std) gives the bin of x, one of `levels` evenly from -1 to 1, the outer ones open."""
    half = 1 / (levels - 1)
    low, high = x < -1 + half, x > 1 - half
    c, d = (x - mean).abs() / std, half / std
    upper = torch.special.log_ndtr(torch.where((low & (mean < x)) | (high & (mean > x)), c, -c) + d)
    closed = upper + torch.log1p(-torch.exp((torch.special.log_ndtr(-c - d) - upper).clamp(max=-1e-6)))
    density = torch.log(2 * d) - 0.5 * (c.square() + math.log(2 * math.pi))
    return torch.where(low | high, upper, torch.where(d * c.clamp(min=1) < 0.01, density, closed))


def _vae_weights(params: Tree) -> dict[str, torch.Tensor]:
    def conv(kernel: np.ndarray, *, transposed: bool) -> np.ndarray:
        # theirs of a transposed convolution is (in, out, height, width) and not flipped
        return kernel[::-1, ::-1].transpose(2, 3, 0, 1) if transposed else kernel.transpose(3, 2, 0, 1)

    weights = {"log_std": params["likelihood"]["log_std"]}
    for ours, theirs in (("encoder", "down"), ("decoder", "up")):
        for index, p in params[ours]["convs"].items():
            weights[f"{theirs}.{index}.weight"] = conv(np.asarray(p["kernel"]), transposed=theirs == "up")
            weights[f"{theirs}.{index}.bias"] = p["bias"]
    both = [
        params["mean"],
        params["logvar"],
    ]  # kernels (height, width, channels, latent); images here have channels first
    flat = [np.asarray(p["kernel"]).transpose(3, 2, 0, 1).reshape(p["bias"].size, -1) for p in both]
    weights |= {"latent.weight": np.concatenate(flat), "latent.bias": np.concatenate([p["bias"] for p in both])}
    expand = {name: np.asarray(value) for name, value in params["expand"].items()}
    weights["expand.weight"] = expand["kernel"].transpose(3, 1, 2, 0).reshape(-1, expand["kernel"].shape[0])
    weights["expand.bias"] = expand["bias"].transpose(2, 0, 1).reshape(-1)
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in weights.items()}


def build(ours: Any, params: Tree) -> torch.nn.Module:
    """The module of our `Diffusion` or `VAE`, whose parameters are `params`, on the GPU where there is one."""
    # PyTorch's own choice is the physical cores; XLA takes all those that the process may run on
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    module = VAE(ours, params) if type(ours).__name__ == "VAE" else Diffusion(ours)
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def shaped(network: Any) -> torch.nn.Module:
    """The class of `diffusers` for the network of this configuration, on the default device."""
    values = chosen_layout(network, "huggingface")[1]
    return getattr(diffusers, values["_class_name"]).from_config(values)


def make_step(
    module: Any,
    batch: Mapping[str, Any],
    dtype: str,
    rate: float,
    adamw: dict[str, float],
    *,
    channels_last: bool,
    compiled: bool,
) -> tuple[Callable[[], float], Callable[[Mapping[str, Any]], float]]:
    """One training step as a call that returns the loss, and the loss for given random numbers, without a step and
    never compiled."""
    device, layout = next(module.parameters()).device, torch.channels_last if channels_last else torch.contiguous_format
    module = module.to(memory_format=layout)

    def tensor(value: Any) -> torch.Tensor:
        value = torch.from_numpy(np.array(value)).to(device)
        if value.ndim == 4:
            return value.movedim(-1, 1).contiguous(memory_format=layout)
        return value if value.is_floating_point() else value.long()

    image, label = (None if name not in batch else tensor(batch[name]) for name in ("image", "label"))
    betas, eps, decay = (adamw["b1"], adamw["b2"]), adamw["eps"], adamw["weight_decay"]
    optimizer = torch.optim.AdamW(module.parameters(), rate, betas, eps, decay, fused=True)
    faster = torch.compile(module) if compiled else module

    def loss(forward: Any, drawn: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            return forward(image, label, **drawn)

    def step() -> float:
        module.train()
        value = loss(faster, module.draw(image))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.item()

    def given(drawn: Mapping[str, Any]) -> float:
        module.eval()
        with torch.no_grad():
            return loss(module, {name: tensor(value) for name, value in drawn.items() if name != "label"}).item()

    return step, given
