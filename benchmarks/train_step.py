"""One training step of a decoder (forward, backward, AdamW): ours, bare JAX, and `transformers` in PyTorch, in turn.

Before anything is timed, all must compute the same loss, and ours and bare JAX the same norm of the gradient.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import bare
import interleave
import jax
import numpy as np
import optax
import setups

from artifex.config import Config
from artifex.scaling.plan import Plan
from artifex.training.state import Blueprint, blueprint
from artifex.training.step import make_loss, make_step

ADAMW: dict[str, Any] = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
RATE = 1e-3


class Variant(NamedTuple):
    """A call that makes a step, and what it computed at the common parameters."""

    call: Callable[[], Any]
    loss: float
    gradient_norm: float | None = None


def main() -> None:
    options = setups.parser(__doc__)
    options.add_argument("--peak", type=float, help="FLOP/s of the device, where it is not among the known ones")
    args = options.parse_args()
    setup = setups.chosen(args)
    tokens, targets = batch(setup)

    default = our_blueprint(setup, "auto")
    params = jax.device_get(default.init().params)
    variants = {
        "ours": ours(default, tokens, targets),
        "ours, scanned": ours(our_blueprint(setup, 1), tokens, targets),
        "bare JAX": bare_jax(setup, bare.from_model(params), tokens, targets),
        "bare JAX, joined": bare_jax(setup, bare.from_model(params, join=True), tokens, targets),
        "bare JAX, scanned": bare_jax(setup, bare.from_model(params, scan=True), tokens, targets),
    }
    if setup.flash:
        variants["bare JAX, cudnn"] = bare_jax(setup, bare.from_model(params, join=True), tokens, targets, "cudnn")
    if args.torch:
        variants["PyTorch"] = pytorch(setup, bare.from_model(params, join=True), tokens, targets)
    check_equal(variants, 1e-5 if setup.dtype == "float32" else 2e-2)

    seconds = interleave.interleave({name: variant.call for name, variant in variants.items()}, args.rounds)
    print(interleave.table(seconds, tokens.size, "tokens"))
    fastest = interleave.best(seconds, "bare JAX")
    rivals = [fastest, *(["PyTorch"] if args.torch else [])]
    for rival in rivals:
        print(interleave.ratio(seconds, "ours", rival))
    peak = args.peak or setups.known_peak()
    for name in ("ours", *rivals):
        rate = setup.flops_per_token() * tokens.size / statistics.median(seconds[name])
        part = f", {100 * rate / peak:.1f} % of the device's {peak / 1e12:.0f} TFLOP/s" if peak else ""
        print(f"{name}: {rate / 1e9:,.0f} GFLOP/s by the model's count{part}")


def batch(setup: setups.Setup) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and targets, int32 (batch, sequence)."""
    shape = (setup.batch, setup.sequence + 1)
    rows = np.random.default_rng(0).integers(0, setup.decoder.vocab_size, shape, dtype=np.int32)
    return rows[:, :-1], rows[:, 1:]


def our_blueprint(setup: setups.Setup, unroll: int | str) -> Blueprint:
    """A run of the package on one device: constant learning rate, no clipping."""
    optimizer = {
        "name": "adamw",
        "beta1": ADAMW["b1"],
        "beta2": ADAMW["b2"],
        "eps": ADAMW["eps"],
        "weight_decay": ADAMW["weight_decay"],
    }
    constant = {"learning_rate": RATE, "schedule": "constant", "warmup_steps": 0, "clip_norm": None}
    config = Config.from_dict(
        {
            "model": {"name": setup.preset, **setup.overrides},
            "data": {"sequence_length": setup.sequence},
            "training": {"batch_size": setup.batch, "compute_dtype": setup.dtype, "unroll": unroll},
            "optimizer": optimizer | constant,
        }
    )
    plan = Plan.from_device(config.device, 1)
    return blueprint(config, plan, plan.make_mesh(jax.devices()[:1]))


def ours(blue: Blueprint, tokens: np.ndarray, targets: np.ndarray) -> Variant:
    rows = {"tokens": tokens, "targets": targets}
    rows = jax.device_put(rows, blue.batch_sharding(rows))
    step, state, loss = make_step(blue), blue.init(), make_loss(blue)
    found = measured(lambda params: loss(params, state.buffers, rows, None)[0], state.params)

    def call() -> jax.Array:
        nonlocal state
        state, metrics = step(state, rows)
        return metrics["loss"]

    return Variant(call, *found)


def bare_jax(
    setup: setups.Setup, params: Any, tokens: np.ndarray, targets: np.ndarray, attention: str | None = None
) -> Variant:
    cfg = setup.decoder
    loss = bare.make_loss(cfg.num_heads, cfg.per_head, setup.dtype, attention)
    rows = jax.device_put((tokens, targets))
    found = measured(lambda params: loss(params, *rows), params)
    optimizer = optax.adamw(RATE, **ADAMW)
    step, state = bare.make_step(loss, optimizer), optimizer.init(params)

    def call() -> jax.Array:
        nonlocal params, state
        params, state, value = step(params, state, *rows)
        return value

    return Variant(call, *found)


def pytorch(setup: setups.Setup, params: Any, tokens: np.ndarray, targets: np.ndarray) -> Variant:
    import pytorch

    call = pytorch.make_step(pytorch.build(setup.decoder, params), tokens, targets, setup.dtype, RATE, ADAMW)
    return Variant(call, call())


def measured(loss: Callable[[Any], jax.Array], params: Any) -> tuple[float, float]:
    """The loss and the norm of its gradient."""
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), float(optax.global_norm(grads))


def check_equal(variants: dict[str, Variant], tolerance: float) -> None:
    """Print what each variant computed. Raises `ValueError` where it differs from ours by more than `tolerance`."""
    wanted = variants["ours"]
    for name, got in variants.items():
        norm = "" if got.gradient_norm is None else f", norm of its gradient {got.gradient_norm:.6f}"
        print(f"{name}: loss {got.loss:.6f}{norm}")
        for quantity in ("loss", "gradient_norm"):
            mine, theirs = getattr(wanted, quantity), getattr(got, quantity)
            if theirs is not None and not abs(theirs - mine) <= tolerance * mine:
                raise ValueError(f"{quantity} of {name} is {theirs}, ours is {mine}; they do not compute the same")


if __name__ == "__main__":
    main()
