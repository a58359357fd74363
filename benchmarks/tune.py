"""Whether what a tune chooses is as fast as it says: chosen against configured, measured again, in other processes.

    python benchmarks/tune.py configs/quickstart.yaml configs/dit_digits.yaml --budget 5 --rounds 15
    python benchmarks/tune.py --all --budget 10

Each run is tuned; then the run as configured, the same once more, and the run as chosen are built again and take turns
(`workers.py`), which the tune had no part in. The second ratio, of the run as configured to itself, is what noise is.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import setups
import workers
from workers import Built, Variant

import artifex
from artifex.config import Config
from artifex.training.memory import compile_step
from artifex.training.state import blueprint, planned
from artifex.tuning.child import batches
from artifex.tuning.standing import Spanned
from artifex.tuning.ways import Way

SECONDS = 0.5  # of a call, about
CONFIGS = Path(__file__).parents[1] / "configs"
ALL = (
    "quickstart linear_stdlib masked_diffusion_stdlib moe_stdlib vae_digits vq_digits kl_digits diffusion_digits "
    "dit_digits latent_diffusion_digits"
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("configs", nargs="*", help="files of runs, or presets")
    options.add_argument("--all", action="store_true", help="every run of configs/ that trains a model from its start")
    options.add_argument("--budget", type=float, default=5.0, help="minutes of each tune")
    options.add_argument("--rounds", type=int, default=15, help="times that each is timed again")
    options.add_argument("--out", help="folder of the tunes, which go on there; by default they are made anew")
    args = options.parse_args()
    names = args.configs + [str(CONFIGS / f"{name}.yaml") for name in ALL.split() if args.all]
    if not names:
        options.error("name some configurations, or give --all")
    print(setups.machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        lines = [compared(name, Path(args.out or temporary), args.budget, args.rounds) for name in names]
    head = f"{'run':32} {'again':>24} {'to itself':>24} {'by the tune':>11}  chosen"
    print("\n".join(["", head, *lines]))


def compared(name: str, folder: Path, budget: float, rounds: int) -> str:
    """A line for a run: tuned, and what was chosen measured again."""
    how: dict[str, Any] = {"out": folder / Path(name).stem, "profile_dir": folder / "profile"}
    found = artifex.auto_tune(name, budget=budget, say=lambda line: print(line, flush=True), **how)
    print(f"\n{found}\n", flush=True)
    if (step := next((row.seconds.median for row in found.rows if row.way == Way() and row.seconds), None)) is None:
        return f"{Path(name).stem:32} {'not measured':>24} {'':>24} {'':>11}  {found.verdict}"
    steps = max(1, round(SECONDS / step))
    wanted = {"configured": found.run, "configured again": found.run}
    wanted |= {} if found.is_default else {"chosen": found.config}
    variants = {name: Variant(stepped, (run.to_dict(), str(how["out"]), steps)) for name, run in wanted.items()}
    with workers.started(variants) as all_workers:
        seconds = workers.in_turn(all_workers, rounds)
    work = found.config.training.batch_size / found.run.training.batch_size  # of a step, where batches may differ
    itself = ratio(seconds["configured again"], seconds["configured"])
    again = "1, the same" if found.is_default else ratio(seconds["chosen"], seconds["configured"], work)
    told = "" if found.ratio is None else f"{found.ratio.median:.3f}"
    return f"{Path(name).stem:32} {again:>24} {itself:>24} {told:>11}  {found.best}"


def ratio(mine: list[float], other: list[float], work: float = 1.0) -> str:
    """Of times, round by round: its median and quartiles."""
    spanned = Spanned.of([a / b / work for a, b in zip(mine, other, strict=True)])
    return f"{spanned.median:.3f} ({spanned.low:.3f} to {spanned.high:.3f})"


def stepped(values: dict[str, Any], folder: str, steps: int) -> Built:
    """A call that takes so many steps of a run."""
    config = Config.from_dict(values)
    plan = planned(config, jax.device_count())
    blue = blueprint(config, plan, plan.make_mesh())
    placed = [blue.placed(row) for row in batches(config, folder)[0]]
    shapes: Any = {name: (value.shape, value.dtype) for name, value in placed[0].items()}
    rows = itertools.cycle(placed)
    step, state = compile_step(blue, shapes), blue.init()

    def call() -> Any:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, next(rows))
        return jax.block_until_ready((state, metrics["loss"]))

    return Built(call, {"loss": float(call()[1])})


if __name__ == "__main__":
    main()
