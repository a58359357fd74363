"""The figures of the pages on models: `python docs/_figures.py RUNS`, RUNS the folder that holds the runs of configs/.

Figures of formulas are drawn from the library's own functions, figures of samples from the newest checkpoints.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from artifex.data.image_batches import all_images
from artifex.data.images import load_images
from artifex.evaluation.grids import save_grid
from artifex.models.attention.tiles import seen
from artifex.models.diffusion.process import DDPM, EDM, FlowMatching
from artifex.models.transformer.linear_attention import decays
from artifex.sample import load

IMAGES = Path(__file__).parent / "images"
COLUMNS = 10  # a digit each


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
    attention()
    schedules()
    for figure in (autoencoders, latents, samples, guidance):
        figure(Path(sys.argv[1]))
