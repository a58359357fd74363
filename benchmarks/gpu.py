"""Training steps on one GPU in bfloat16, beside PyTorch with `torch.compile` and flash attention; or a dry run of them.

    python benchmarks/gpu.py                                    # decoders of 124M to 1.3B at 1,024 to 8,192; DiT-XL/2
    python benchmarks/gpu.py --only decoder-1.3b-2048 --rounds 20
    python benchmarks/gpu.py --dry-run                          # compiled for a GPU that is not there; nothing runs

The record of a case also has model FLOPs utilisation, memory and ours' kernel time by class. The dry run compiles our
step as `python -m artifex.train --dry-run --target` does (`pip install -e '.[gpu-targets]'`), and PyTorch's model is
made on its device "meta", which has shapes alone. Decoders have as many parameters there; DiT has more, since
`diffusers` embeds time and label in every block.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import image_step
import jax
import report
import setups
import train_step
import workers
from flax import nnx
from setups import ImageSetup, Setup
from workers import Built, Variant

from artifex.config import Config
from artifex.scaling.peak import peak
from artifex.scaling.targets import Target
from artifex.training.for_target import ask
from artifex.training.model_flops import model_flops

# "350M" and "1.3B" of Brown et al. 2020 (arXiv:2005.14165), table 2.1; tokens of a step
SIZES = {
    "124m": ({"embed_dim": 768, "num_layers": 12, "num_heads": 12}, 65_536),
    "350m": ({"embed_dim": 1_024, "num_layers": 24, "num_heads": 16}, 32_768),
    "1.3b": ({"embed_dim": 2_048, "num_layers": 24, "num_heads": 16}, 16_384),
}
SEQUENCES = (1_024, 2_048, 4_096, 8_192)
# what is no product is computed again where it is read: kept, a step takes 2.2 to 3.3 times the memory
HOW: dict[str, Any] = {"dtype": "bfloat16", "remat": "dots"}
CASES: dict[str, Setup | ImageSetup] = {
    f"decoder-{size}-{length}": Setup(
        "gpt2", {**widths, "head_dim": None, "sequence_length": length}, tokens // length, length, **HOW
    )
    for size, (widths, tokens) in SIZES.items()
    for length in SEQUENCES
}
CASES["dit-xl2"] = ImageSetup("dit-xl2", {"network": image_step.NO_VARIANCE}, 64, **HOW)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"any of {', '.join(CASES)}")
    options.add_argument("--rounds", type=int, default=15, help="times that each variant is timed")
    options.add_argument("--dry-run", action="store_true", help="compile for --target, run nothing")
    options.add_argument("--target", default="gpu:h100:1x1", help="default: gpu:h100:1x1")
    options.add_argument("--time-limit", type=float, default=900, help="seconds for a compilation of the dry run")
    setups.add_rivals(options)
    args = options.parse_args()
    if not args.dry_run and jax.default_backend() != "gpu":
        options.error(f"JAX has no GPU here but {jax.default_backend()}; --dry-run compiles for one that is not there")
    print(setups.machine())
    make = dry_run if args.dry_run else compare
    report.finish(args, (make(name, CASES[name], args) for name in args.only or CASES))


def config_of(setup: Setup | ImageSetup) -> Config:
    """Of our run."""
    if isinstance(setup, ImageSetup):
        return image_step.our_blueprint(setup).config
    return train_step.our_blueprint(setup, "auto").config


def work_of(setup: Setup | ImageSetup) -> tuple[int, str]:
    """What a step works on."""
    return (setup.batch, "images") if isinstance(setup, ImageSetup) else (setup.batch * setup.sequence, "tokens")


def compare(name: str, setup: Setup | ImageSetup, args: argparse.Namespace) -> report.Record:
    """Time ours and PyTorch's, and say how much of the device's peak each makes use of."""
    if isinstance(setup, ImageSetup):
        variants = {"ours": Variant(image_step.ours, (setup,))}
        variants |= setups.in_torch(args, image_step.pytorch, (setup, False))
    else:
        variants = {"ours": Variant(train_step.ours, (setup, "auto"))}
        variants |= setups.in_torch(args, train_step.pytorch, (setup,))
    work, unit = work_of(setup)
    made = report.compared(name, variants, args.rounds, work=work, unit=unit, tolerance=2e-2)
    needed, most = model_flops(config_of(setup)), peak(jax.devices()[:1], "bfloat16")
    for key, row in made["variants"].items():
        if "median" in row and most is not None:
            row["utilisation"] = needed / row["median"] / most.flops
            print(f"{key}: {100 * row['utilisation']:.1f} % of {most}, by the FLOPs that the model needs")
    return made


def dry_run(name: str, setup: Setup | ImageSetup, args: argparse.Namespace) -> report.Record:
    """Compile our step for the target, and count PyTorch's parameters."""
    print(f"\n{name}: {setup}", flush=True)
    rows: dict[str, report.Record] = {"ours": {}}
    config, (work, unit) = config_of(setup), work_of(setup)
    values = config.to_dict()
    values["device"] = {"data": 1}
    try:
        answer = ask(Config.from_dict(values), Target.parse(args.target), args.time_limit, remedy=False)
        print(answer.text)
        rows["ours"] = {"memory": answer.figures.get("bytes")} if answer.fits else {"failed": answer.verdict}
    except (ImportError, ValueError, RuntimeError) as error:
        rows["ours"] = {"failed": f"not compiled: {error}"}
    shapes = nnx.state(nnx.eval_shape(lambda: config.model.spec().build(nnx.Rngs(0))), nnx.Param)
    rows["ours"]["parameters"] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    rows["ours"]["model_flops"] = model_flops(config)
    if args.torch:
        failed: dict[str, str] = {}
        with workers.started({"PyTorch": Variant(shaped, (setup,), python=args.torch_python)}, failed) as found:
            rows["PyTorch"] = found[0].computed if found else {"failed": failed["PyTorch"]}
    for key, row in rows.items():
        print(f"{key}: {', '.join(f'{what} {value}' for what, value in row.items())}", flush=True)
    return {"name": name, "work": work, "unit": unit, "variants": rows, "ratios": [], "dry": args.target}


def shaped(setup: Setup | ImageSetup) -> Built:
    """PyTorch's model on the device "meta"."""
    import torch

    with torch.device("meta"):
        model: Any
        if isinstance(setup, ImageSetup):
            import pytorch_images

            model = pytorch_images.shaped(config_of(setup).model.spec().network)
        else:
            import pytorch

            model = pytorch.shaped(setup.decoder)
    return Built(int, {"parameters": sum(p.numel() for p in model.parameters())})


if __name__ == "__main__":
    main()
