"""One training step of a decoder (forward, backward, AdamW): ours, bare JAX, and `transformers` in PyTorch, in turn.

Before anything is timed, all must compute the same loss, and ours and bare JAX the same norm of the gradient.
"""

from __future__ import annotations

import argparse
from typing import Any

import bare
import jax
import numpy as np
import optax
import ours as package
import report
import setups
from workers import Built, Variant

from artifex.training.state import Blueprint

RATE = 1e-3


def main() -> None:
    options = setups.parser(__doc__)
    options.add_argument("models", nargs="*", help="any of decoder, moe; both without, on an accelerator decoder alone")
    options.add_argument("--peak", type=float, help="FLOP/s of the device, where it is not among the known ones")
    args = options.parse_args()
    setup = setups.chosen(args)
    known = {"decoder": setup} if args.setup == "gpu" else {"decoder": setup, "moe": setup.with_experts()}
    for name in args.models:
        if name not in known:
            options.error(f"{name!r} is unknown; choose any of {', '.join(known)}")
    report.finish(args, (compare(name, known[name], args) for name in args.models or known))


def compare(name: str, setup: setups.Setup, args: argparse.Namespace) -> report.Record:
    """Time all variants of one model."""
    variants = {"ours": Variant(ours, (setup, "auto")), "ours, scanned": Variant(ours, (setup, 1))}
    if not setup.decoder.num_experts:
        layouts = {"": {}, ", joined": {"join": True}, ", scanned": {"scan": True}}
        variants |= {f"bare JAX{key}": setups.bare(bare_jax, setup, layout) for key, layout in layouts.items()}
        if setup.flash:
            variants["bare JAX, cudnn"] = setups.bare(bare_jax, setup, {"join": True}, "cudnn")
    variants |= setups.in_torch(args, pytorch, (setup,))
    variants |= setups.against(args, variants["ours"])
    tolerance = 1e-5 if setup.dtype == "float32" else 2e-2
    work = setup.batch * setup.sequence
    how = {"work": work, "unit": "tokens", "tolerance": tolerance}
    made = report.compared(f"{name} step", variants, args.rounds, **how)
    show_rates(made, setup, args.peak or setups.known_peak())
    return made


def show_rates(record: report.Record, setup: setups.Setup, peak: float | None) -> None:
    """Print FLOP/s of ours and of its rivals, and as a part of the peak where that is known."""
    if setup.decoder.num_experts:
        return  # the count is that of a dense model
    for name in ("ours", *(pair["to"] for pair in record["ratios"])):
        if "median" in record["variants"][name]:
            rate = setup.flops_per_token() * record["work"] / record["variants"][name]["median"]
            part = f", {100 * rate / peak:.1f} % of the device's {peak / 1e12:.0f} TFLOP/s" if peak else ""
            print(f"{name}: {rate / 1e9:,.0f} GFLOP/s by the model's count{part}")


def batch(setup: setups.Setup) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and targets, int32 (batch, sequence)."""
    shape = (setup.batch, setup.sequence + 1)
    rows = np.random.default_rng(0).integers(0, setup.decoder.vocab_size, shape, dtype=np.int32)
    return rows[:, :-1], rows[:, 1:]


def our_blueprint(setup: setups.Setup, unroll: int | str) -> Blueprint:
    model, data = {"name": setup.preset, **setup.overrides}, {"sequence_length": setup.sequence}
    settings = {"batch_size": setup.batch, "compute_dtype": setup.dtype, "unroll": unroll, "remat": setup.remat}
    return package.build(model, data, settings, RATE)


def our_params(setup: setups.Setup) -> Any:
    """The parameters that every variant begins with, on the host."""
    return jax.device_get(our_blueprint(setup, "auto").init().params)


def ours(setup: setups.Setup, unroll: int | str) -> Built:
    blue = our_blueprint(setup, unroll)
    return package.training_step(blue, blue.init(), dict(zip(("tokens", "targets"), batch(setup), strict=True)))


def bare_jax(setup: setups.Setup, layout: dict[str, bool], attention: str | None = None) -> Built:
    cfg, params = setup.decoder, bare.from_model(our_params(setup), **layout)
    loss = bare.make_loss(cfg.num_heads, cfg.per_head, setup.dtype, attention)
    rows = jax.device_put(batch(setup))
    computed = package.measured(lambda params: loss(params, *rows), params)
    optimizer = optax.adamw(RATE, **package.ADAMW)
    step, state = bare.make_step(loss, optimizer), optimizer.init(params)

    def call() -> jax.Array:
        nonlocal params, state
        params, state, value = step(params, state, *rows)
        return value

    return Built(call, computed)


def pytorch(setup: setups.Setup, compiled: bool) -> Built:
    import pytorch

    params = our_params(setup)
    if setup.decoder.num_experts:
        model = pytorch.load(setup.decoder, params)
    else:
        model = pytorch.build(setup.decoder, bare.from_model(params, join=True))
    step, loss = pytorch.make_step(model, *batch(setup), setup.dtype, RATE, package.ADAMW, compiled=compiled)
    return Built(step, {"loss": loss()})


if __name__ == "__main__":
    main()
