"""What each strategy's step may send: the formulas of the pages under docs/scaling, and the programs they are of.

A page has tables with the columns `setting` (where it has several), `axis`, `collective` and `bytes`, the last of which
is computed here, with the symbols of docs/scaling/communication.md. A number of bytes is that of one device and step.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

from artifex.config import Config
from artifex.scaling.communication import KINDS, Communication, communication
from artifex.scaling.plan import Plan
from artifex.train import plan_of
from artifex.training.memory import compile_step
from artifex.training.state import blueprint
from artifex.training.task import batch_shapes

PAGES = Path(__file__).parents[1] / "docs" / "scaling"
# wide enough for what is not in the formulas, such as a norm's scale, to be less than one in a hundred
ROWS, TOKENS = 32, 128
DENSE = {"embed_dim": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 512, "vocab_size": 1_024}
DECODER = {**DENSE, "name": "llama-nano", "tied_head": False}
MIXTURE = {**DECODER, "name": "moe-nano", "expert_mlp_dim": 256}


@dataclasses.dataclass(frozen=True)
class Budget:
    """A page's setting, and the run whose step it is held against: its model and its `device` section."""

    page: str
    setting: str
    device: tuple[tuple[str, Any], ...]
    mixture: bool = False

    def __str__(self) -> str:
        return f"{self.page}, {self.setting}" if self.setting else self.page


def budget(page: str, setting: str = "", *, mixture: bool = False, **device: Any) -> Budget:
    """A row of the table below."""
    return Budget(page, setting, tuple(device.items()), mixture)


BUDGETS = (
    budget("data", "zero: 0", data=8),
    budget("data", "zero: 1", data=8, zero=1),
    budget("data", "zero: 2", data=8, zero=2),
    budget("fsdp", "fsdp", fsdp=8),
    budget("fsdp", "hybrid", data=2, fsdp=4),
    budget("tensor", "stream split", data=2, tensor=4),
    budget("tensor", "stream whole", data=2, tensor=4, sequence_parallel=False),
    budget("expert", mixture=True, fsdp=2, expert=4),
    budget("context", "ring", data=2, context=4),
    budget("context", "exchange", data=2, context=4, context_attention="ulysses"),
    budget("pipeline", pipeline=4, data=2, microbatches=4),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step's program."""

    sends: Communication
    plan: Plan
    anew: tuple[str, ...]  # what XLA warned that it lays out anew by giving every device all of it


@functools.cache
def compiled(of: Budget) -> Compiled:
    """The step of a budget's run, compiled for eight simulated devices; nothing of it is allocated."""
    config = config_of(of)
    plan = plan_of(config, 8)
    blue = blueprint(config, plan, plan.make_mesh())
    step = compile_step(blue, batch_shapes(config))
    sends = communication(step.compiled.as_text(), blue.mesh, plan.pipeline and plan.pipeline.taken)
    return Compiled(sends, plan, step.anew)


def config_of(of: Budget) -> Config:
    """Its run."""
    return Config.from_dict(
        {
            "model": {**(MIXTURE if of.mixture else DECODER), "sequence_length": TOKENS},
            "data": {"sequence_length": TOKENS},
            "optimizer": {"name": "adamw"},  # Muon brings whole matrices together: docs/training.md
            "training": {"batch_size": ROWS},
            "device": dict(of.device),
        }
    )


def formulas(page: str, setting: str) -> list[tuple[tuple[str, ...], str, str]]:
    """(mesh axes, collective, bytes) of each row of the page's tables that is of this setting or of all."""
    rows = []
    for line in (PAGES / f"{page}.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        where = next((index for index, cell in enumerate(cells) if cell in KINDS), None)
        if where is None or not re.fullmatch("`[^`]+`", cells[-1]):
            continue
        of = {name for cell in cells[: where - 1] for name in re.findall("`([^`]+)`", cell)}
        if not of or setting in of:
            rows.append((tuple(re.findall(r"`(\w+)`", cells[where - 1])), cells[where], cells[-1].strip("`")))
    assert rows, f"{page}.md has no formula for {setting!r}"
    return rows


def allowed(of: Budget, sizes: dict[str, int], symbols: dict[str, float], *, cpu: bool) -> dict[tuple, float]:
    """Bytes by (mesh axes, collective) as the page has it. A CPU's program sums where another one's scatters."""
    total: dict[tuple, float] = {}
    for axes, kind, formula in formulas(of.page, of.setting):
        n = math.prod(sizes[axis] for axis in axes)
        found = eval(formula, {"__builtins__": {}}, {**symbols, **sizes, "n": n})
        if cpu and kind == "reduce-scatter":
            kind, found = "all-reduce", 2 * found
        total[axes, kind] = total.get((axes, kind), 0.0) + found
    return total


def symbols_of(model: dict[str, Any], plan: Plan, rows: int, tokens: int, w: int, b: int) -> dict[str, float]:
    """What the pages' letters stand for, by hand, from the sizes of a model. `b`: see docs/scaling/tensor.md."""
    D, L, F, V = (model[name] for name in ("embed_dim", "num_layers", "mlp_dim", "vocab_size"))
    heads, kv, E = model["num_heads"], model["num_kv_heads"], 8
    kv_width = D // heads * kv
    X = 0 if "expert_mlp_dim" not in model else L * 3 * E * D * model["expert_mlp_dim"]
    layer = 2 * D + 2 * D * D + 2 * D * kv_width + (D * E if X else 3 * D * F)
    sizes = plan.sizes
    here = rows * tokens // math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert", "context"))
    known = {"P": L * layer + X, "X": X, "H": V * D + D, "W": V * D, "L": L, "D": D, "w": w, "k": 4, "b": b}
    known["N"] = known["P"] + known["H"] + known["W"]
    known |= {
        "S": here * D * w,
        "Q": here * D * w,
        "K": here * kv_width * w,
        "R": here * min(2, E // sizes.get("expert", 1)),
    }
    if (schedule := plan.pipeline) is not None:
        M = schedule.microbatches
        known |= {"M": M, "A": here // M * D * w, "T": M + 2 * schedule.devices - 2, "f": M + schedule.devices - 1}
    return known
