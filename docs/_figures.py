"""The figures of the pages: `python docs/_figures.py [RUNS]`, RUNS the folder that holds the runs of configs/.

Figures of formulas, layouts and schedules are drawn from the library's own functions, figures of samples from the
newest checkpoints under RUNS.
"""

import contextlib
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from artifex import visualize
from artifex.data.image_batches import all_images
from artifex.data.images import load_images
from artifex.evaluation.grids import save_grid
from artifex.models.attention.tiles import seen
from artifex.models.diffusion.process import DDPM, EDM, FlowMatching
from artifex.models.transformer.linear_attention import decays
from artifex.sample import load
from artifex.scaling.axes import resolve
from artifex.scaling.pictures import draw_schedule, draw_shards
from artifex.scaling.pipeline.schedules import Schedule
from artifex.scaling.splits import sharding_for
from artifex.scaling.strategies import combine, strategies_for

IMAGES = Path(__file__).parent / "images"
COLUMNS = 10  # a digit each
UP = ("layers", "embed", "mlp"), (8, 64, 128)  # the first projection of the feed-forward layers
STREAM = ("batch", "sequence", "hidden"), (8, 16, 8)
LAYOUTS = {  # page -> rows of (title, mesh, settings, table, tensor)
    "data": [
        ("weights, gradients, optimizer: data=8", {"data": 8}, {}, "params", UP),
        ("optimizer, zero=1 and 2; gradients, zero=2", {"data": 8}, {"zero": 2}, "optimizer", UP),
        ("the stream of a layer", {"data": 8}, {}, "activations", STREAM),
    ],
    "fsdp": [
        ("weights, gradients, optimizer: fsdp=8", {"fsdp": 8}, {}, "params", UP),
        ("the stream of a layer: fsdp=8", {"fsdp": 8}, {}, "activations", STREAM),
        ("hybrid, weights: data=2, fsdp=4", {"data": 2, "fsdp": 4}, {}, "params", UP),
    ],
    "tensor": [
        ("up, (embed, mlp): tensor=8", {"tensor": 8}, {}, "params", (("embed", "mlp"), (64, 64))),
        ("down, (mlp, embed)", {"tensor": 8}, {}, "params", (("mlp", "embed"), (64, 64))),
        (
            "inside a layer, (batch, sequence, act_mlp)",
            *({"tensor": 8}, {"sequence_parallel": True}, "activations"),
            (("batch", "sequence", "act_mlp"), (4, 16, 16)),
        ),
        (
            "between layers, (batch, sequence, hidden)",
            *({"tensor": 8}, {"sequence_parallel": True}, "activations"),
            (("batch", "sequence", "hidden"), (4, 16, 16)),
        ),
    ],
    "expert": [
        (
            "kernels of experts: expert=8",
            *({"expert": 8}, {}, "params"),
            (("layers", "experts", "embed", "expert_mlp"), (2, 8, 16, 8)),
        ),
        ("all other weights", {"expert": 8}, {}, "params", UP),
        ("the stream of a layer", {"expert": 8}, {}, "activations", STREAM),
    ],
    "context": [
        ("the stream of a layer: context=8", {"context": 8}, {}, "activations", STREAM),
        ("weights, gradients, optimizer", {"context": 8}, {}, "params", UP),
    ],
    "pipeline": [
        ("weights of the stack: pipeline=8", {"pipeline": 8}, {}, "params", UP),
        ("outside of the stack, (vocab, embed)", {"pipeline": 8}, {}, "params", (("vocab", "embed"), (64, 128))),
        ("weights of the stack: pipeline=2, tensor=4", {"pipeline": 2, "tensor": 4}, {}, "params", UP),
    ],
}


def attention() -> None:
    """Who sees whom: a query's row, a key's column, dark where the query reads the key."""
    length, at = 48, np.arange(48)
    causal = np.asarray(seen(at, at), float)
    local = np.asarray(seen(at, at, 12), float)
    age = at[:, None] - at[None]
    linear = np.where(age >= 0, decays(4)[1] ** np.maximum(age, 0), 0)
    hidden = np.random.default_rng(0).random(length) < 0.4
    masked = np.where(hidden[None], 0.25, np.ones((length, length)))
    panels = {
        "causal": causal,
        "local: a window of 12": local,
        "linear: second head of 4": linear,
        "masked diffusion, t = 0.4": masked,
    }
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    for axes, (title, weights) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axes.imshow(weights, cmap="Blues", vmin=0, vmax=1.2)
        axes.set_title(title, size="medium")
        axes.set(xlabel="key", ylabel="query", xticks=[0, length - 1], yticks=[0, length - 1])
    figure.savefig(IMAGES / "transformers.png", dpi=110)


def schedules() -> None:
    """alpha and sigma over t, and the signal-to-noise ratio they make."""
    t = np.linspace(0, 1, 400, dtype=np.float32)
    processes = {
        "flow": (FlowMatching(), "#1f77b4"),
        "ddpm_linear": (DDPM("linear"), "#d62728"),
        "ddpm_cosine": (DDPM("cosine"), "#ff7f0e"),
        "edm": (EDM(), "#2ca02c"),
    }
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (process, colour) in processes.items():
        alpha, sigma = (np.asarray(each(jnp.asarray(t)), float) for each in (process.alpha, process.sigma))
        if name != "edm":  # whose sigma goes to 80
            left.plot(t, alpha, color=colour, label=name)
            left.plot(t, sigma, color=colour, ls="--")
        inside = (sigma > 0) & (alpha > 0)
        right.plot(t[inside], 20 * np.log10(alpha[inside] / sigma[inside]), color=colour, label=name)
    left.set(xlabel="t", title="alpha (solid) and sigma (dashed)")
    right.set(xlabel="t", title="signal-to-noise ratio in dB", ylim=(-60, 60))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(IMAGES / "diffusion_schedules.png", dpi=110)


def layouts() -> None:
    """How weights and activations lie on eight devices, a figure for each page of docs/scaling."""
    for page, rows in LAYOUTS.items():
        high = [1.0 + 0.5 * (len(sizes) > 1) for _, sizes, *_ in rows]
        figure = Figure(figsize=(9, 1.6 * sum(high)), layout=ConstrainedLayoutEngine(h_pad=0.12))
        for axes, (title, sizes, settings, table, (names, shape)) in zip(
            figure.subplots(len(rows), 1, height_ratios=high), rows, strict=True
        ):
            rules = combine(strategies_for(list(sizes), **settings))
            spec = resolve(names, shape, getattr(rules, table), sizes).spec
            draw_shards(axes, spec, shape, sizes, names)
            axes.set_title(title, loc="left", size="medium")
        figure.savefig(IMAGES / f"layout_{page}.png", dpi=110)


def splits() -> None:
    """How a tensor of (128, 64) lies on four devices under pairs of device_mesh and tensor_split."""
    pairs = [
        *(((4,), None), ((4,), (1,)), ((2, 2), None)),
        *(((2, 2), (1, None)), ((2, 1), (0, None)), ((1, 2), (None, 0))),
    ]
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    for axes, (device_mesh, tensor_split) in zip(figure.subplots(2, 3).flat, pairs, strict=True):
        sizes = {f"axis{i}": 4 // len(device_mesh) for i in range(len(device_mesh))}
        with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(sizes.values()), tuple(sizes))):
            sharding = sharding_for((128, 64), device_mesh, tensor_split)
        assert sharding is not None, "a mesh is at hand"
        draw_shards(axes, sharding.spec, (128, 64), sizes, (None, None))
        axes.set_title(f"device_mesh={device_mesh}\ntensor_split={tensor_split}", loc="left", size="medium")
    figure.savefig(IMAGES / "arrays.png", dpi=110)


def pipelines() -> None:
    """What four devices do with eight microbatches under each schedule, drawn from its table."""
    schedules = [Schedule("gpipe", 4, 8), Schedule("1f1b", 4, 8), Schedule("interleaved", 4, 8, 2)]
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    for axes, schedule in zip(figure.subplots(3, 1), schedules, strict=True):
        V = schedule.stages_per_device
        draw_schedule(axes, schedule, 1 / V, 3 / V)  # backwards it is computed again; half the layers take half
        title = f"{schedule}: idle {schedule.bubble():.0%}"
        axes.set_title(title, loc="left", size="medium")
    wide = max(axes.get_xlim()[1] for axes in figure.axes)
    for axes in figure.axes:
        axes.set_xlim(0, wide)
    figure.savefig(IMAGES / "pipeline_schedules.png", dpi=110)


def page_of_pictures() -> None:
    """The pictures of docs/visualize.md: what its own blocks draw, the last of each kind that they do not write."""
    text = (IMAGES.parent / "visualize.md").read_text()
    drawn = {}

    def kept(name: str, plot: Callable) -> Callable:
        def call(*arguments, path=None, **how):
            figure = plot(*arguments, **how)
            if path is None:
                drawn[name.removeprefix("plot_").removeprefix("device_").removeprefix("communication_")] = figure
            return figure

        return call

    plots = {name: getattr(visualize, name) for name in visualize.__all__ if name.startswith("plot_")}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            for name, plot in plots.items():
                setattr(visualize, name, kept(name, plot))
            names: dict = {}
            for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
                exec(block, names)
        finally:
            for name, plot in plots.items():
                setattr(visualize, name, plot)
    for name, figure in drawn.items():
        file = IMAGES / f"visualize_{name}.png"
        figure.savefig(file, dpi=85, bbox_inches="tight")
        with Image.open(file) as image:  # 64 colours: hatches are many bytes otherwise
            few = image.convert("RGB").quantize(64)
        few.save(file, optimize=True)


def autoencoders(runs: Path) -> None:
    """Held-out digits, one of each class, and what is left of them behind each latent."""
    originals = held_out()
    rows = {"held out": originals}
    for title, name in {"VAE": "vae_digits", "VQ-VAE": "vq_digits", "KL": "kl_digits"}.items():
        rows[title] = np.asarray(load(runs / name).reconstruct(originals))
    _rows(rows, "vae.png")


def latents(runs: Path) -> None:
    """The VAE's posterior means of all held-out digits, along their two largest principal axes."""
    corpus = load_images("digits", image_size=8, channels=1, validation_fraction=0.3)
    images, labels = all_images(corpus.validation, corpus.levels)
    assert labels is not None, "the digits have labels"
    means = np.asarray(load(runs / "vae_digits").encode(images)[0])
    centred = means - means.mean(axis=0)
    places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    ten = ListedColormap([f"C{index}" for index in range(COLUMNS)])
    drawn = axes.scatter(*places.T, c=labels, cmap=ten, vmin=-0.5, vmax=9.5, s=8)
    figure.colorbar(drawn, ticks=range(COLUMNS), label="class")
    axes.set(xlabel="first principal axis", ylabel="second")
    figure.savefig(IMAGES / "vae_latents.png", dpi=110)


def samples(runs: Path) -> None:
    """What the image models draw: a row a model, a column a class where it has classes."""
    rows = {"VAE": drawn(runs / "vae_digits")}
    for title, name in {"UNet": "diffusion_digits", "DiT": "dit_digits", "latent": "latent_diffusion_digits"}.items():
        rows[title] = drawn(runs / name)
    _rows(rows, "zoo.png")


def guidance(runs: Path) -> None:
    """One noise, drawn under four scales."""
    model, rows = load(runs / "diffusion_digits"), {}
    for scale in (0, 1, 2, 4):
        rows[f"guidance {scale}"] = np.asarray(
            model.sample(jax.random.key(1), count=COLUMNS, labels=np.arange(COLUMNS), guidance=scale)
        )
    _rows(rows, "diffusion_guidance.png")


def drawn(run: Path) -> np.ndarray:
    """Ten samples of a run, a class each where it has classes."""
    return np.asarray(load(run).sample(jax.random.key(0), count=COLUMNS))


def held_out() -> np.ndarray:
    """The first held-out image of each class."""
    corpus = load_images("digits", image_size=8, channels=1, validation_fraction=0.3)
    images, labels = all_images(corpus.validation, corpus.levels)
    return images[[int(np.argmax(labels == label)) for label in range(COLUMNS)]]


def _rows(rows: dict[str, np.ndarray], name: str) -> None:
    save_grid(np.concatenate(list(rows.values())), IMAGES / name, columns=COLUMNS, row_labels=list(rows))


if __name__ == "__main__":
    for figure in (attention, schedules, layouts, splits, pipelines, page_of_pictures):
        figure()
    if len(sys.argv) == 1:
        sys.exit()
    for figure in (autoencoders, latents, samples, guidance):
        figure(Path(sys.argv[1]))
