"""Seconds to compile a training step of a decoder of 2 to 32 layers: ours, scanned and unrolled, and `torch.compile`.

Every time is that of a fresh process without any cache of compiled programs. Ours is traced, lowered and compiled;
PyTorch's is its first step less the one after it.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import report
import setups
import workers
from train_step import batch, our_blueprint
from workers import Built, Variant, timed

from artifex.training import step as training

DEPTHS = (2, 4, 8, 16, 32)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3, help="times that each is timed")
    options.add_argument("--depths", type=int, nargs="*", default=DEPTHS, help="layers")
    options.add_argument("--small", action="store_true", help="narrow, 2 and 3 layers, to see that it runs")
    options.add_argument("--torch-depth", type=int, default=8, help="layers up to which PyTorch is compiled too")
    setups.add_rivals(options)
    args = options.parse_args()
    print(setups.machine())
    base = setups.SETUPS["small" if args.small else "mini"]
    depths = (2, 3) if args.small else args.depths
    report.finish(args, (compare(at_depth(base, depth), args) for depth in depths))


def at_depth(setup: setups.Setup, layers: int) -> setups.Setup:
    """So many layers, and so little to read that a step takes no time."""
    return dataclasses.replace(setup, overrides=setup.overrides | {"num_layers": layers}, batch=1, sequence=64)


def compare(setup: setups.Setup, args: argparse.Namespace) -> report.Record:
    """Compile all variants of one depth in each round."""
    layers = setup.decoder.num_layers
    variants = {"ours, scanned": Variant(ours, (setup, 1)), "ours, unrolled": Variant(ours, (setup, layers))}
    if args.torch and args.compile and layers <= args.torch_depth:
        variants["PyTorch, compiled"] = Variant(pytorch, (setup,), python=args.torch_python)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for name, variant in variants.items():
            with workers.started({name: variant}, failed) as alone:
                seconds[name] += [worker.computed["seconds"] for worker in alone]
    kept = {name: times for name, times in seconds.items() if name not in failed}
    pairs = [(name, "PyTorch, compiled") for name in kept if name.startswith("ours")]
    name = f"compilation, {layers} layers"
    print(f"\n{name}")
    made = report.record(name, kept, work=layers, unit="layers", ratios=pairs, failed=failed)
    report.show(made)
    return made


def ours(setup: setups.Setup, unroll: int) -> Built:
    blue = our_blueprint(setup, unroll)
    rows: dict[str, Any] = dict(zip(("tokens", "targets"), batch(setup), strict=True))
    rows = jax.device_put(rows, blue.batch_sharding(rows))
    step = training.make_step(blue)
    return Built(int, {"seconds": timed(lambda: step.lower(blue.state, rows).compile())})


def pytorch(setup: setups.Setup) -> Built:
    import bare
    import ours as package
    import pytorch
    from train_step import RATE, our_params

    model = pytorch.build(setup.decoder, bare.from_model(our_params(setup), join=True))
    step, _ = pytorch.make_step(model, *batch(setup), setup.dtype, RATE, package.ADAMW, compiled=True)
    first = timed(step)
    return Built(int, {"seconds": first - timed(step)})


if __name__ == "__main__":
    main()
