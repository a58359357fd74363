"""Writes docs/scaling/matrix.md: every family by every strategy on eight simulated devices, beside one device.

python docs/_generate_matrix.py run [FAMILY ...]    # trains the cells that the record lacks
python docs/_generate_matrix.py                     # writes the page from the record
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs/scaling/matrix.md", ROOT / "docs/scaling/matrix.jsonl"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cells  # noqa: E402

INTRODUCTION = """\
# The matrix

Every family by every strategy and union of strategies, each on eight simulated devices beside one device that computes
the same microbatches. A cell is a run of {steps} steps by AdamW in float32, on the family's own data in the run's own
order, {rows} rows a step, with dropout where the family has it, on models of width 32. Mixtures of
experts read a text that is the same under every Python: where two experts suit a token equally well to the last digit,
rounding chooses between them.

A pair that does not go together is refused before anything is compiled; the notes below the first table say why. All
others must have the loss of one device at each step within 1e-5 of it and the first gradient within 1e-4 by norm.

```bash
pytest -m slow tests/test_matrix.py       # all cells as tests
python docs/_generate_matrix.py run       # trains the cells that the record lacks
python docs/_generate_matrix.py           # writes this page from it
```

The numbers below are of {versions}.{missing}
"""

EQUAL = """\
## Equal to one device

The largest relative difference of a step's loss, and the norm of the difference of the first gradient, of the norm of
that gradient.
"""

SHARED = """\
## The work and the memory of each device

FLOPs of one of the eight devices, in eighths of what one device alone computes, so that 1 is a perfect division; and
its temporary memory in percent of that of one device alone. FLOPs are those of all matrix products and convolutions of
the compiled program, loops as often as they run. Bytes of state and batch are, in every cell, to the byte those of the
plan's shardings.

What is above 1: attention on several devices computes its scores a second time going backwards, which XLA leaves out on
one; a stage of a pipeline goes forwards a second time, 4/3, and S - 1 of V M + S - 1 turns are idle, in which a device
computes for nobody; parts of fewer than 8 positions are filled up to 8; experts that take as many tokens as come count
as if all came to one device; a head of 257 words, as masked diffusion has, does not divide over tensor devices; and of
a latent model several devices encode the same image where a microbatch has fewer rows than there are devices.
"""


def record() -> dict[tuple[str, str], dict[str, Any]]:
    """(family, strategy) -> what the newest run of the cell found."""
    lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []
    return {(cell["family"], cell["strategy"]): cell for cell in map(json.loads, lines)}


def run(families: list[str]) -> None:
    """Train the cells that the record lacks, a process for each family: where XLA aborts one, the next begins behind
    the cell that it fell over."""
    for family in families or cells.FAMILIES:
        known = {strategy for of, strategy in record() if of == family}
        pending = [strategy for strategy in cells.STRATEGIES if strategy not in known]
        while pending:
            command = [sys.executable, str(ROOT / "tests/cells.py"), family, *pending]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
                for line in process.stdout or ():
                    note(json.loads(line))
                    pending.pop(0)
            if process.returncode and pending:
                failed = f"the process ended with {process.returncode}"
                note({"family": family, "strategy": pending.pop(0), "failed": failed})


def note(cell: dict[str, Any]) -> None:
    """Add a cell to the record."""
    print(cell, flush=True)
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")


def page() -> str:
    """The page as Markdown."""
    known = record()
    names = ("jax", "jaxlib", "flax", "optax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    every = len(cells.STRATEGIES) * len(cells.FAMILIES)
    missing = f" {every - len(known)} of the {every} cells are empty: they have not been run." * (len(known) < every)
    why: dict[str, int] = {}

    def reason(cell: dict[str, Any]) -> str:
        text = plain(cell["refused"])
        return f"refused [{why.setdefault(text, len(why) + 1)}]"

    equal = table(known, lambda cell: f"{short(cell['loss'])}<br>{short(cell['gradient'])}", reason)
    shared = table(known, lambda cell: f"{8 * cell['work']:.2f}, {cell['temporary']:.0%}", lambda cell: "")
    notes = "\n".join(f"{number}. {text}" for text, number in why.items())
    head = INTRODUCTION.format(steps=cells.STEPS, rows=cells.ROWS, versions=versions, missing=missing)
    return "\n".join([head, EQUAL, equal, f"\nRefused:\n\n{notes}\n", SHARED, shared]) + "\n"


def short(share: float) -> str:
    """3.2e-07 as 3e-7; a hyphen at which no line breaks."""
    return f"{share:.0e}".replace("e-0", "e-").replace("-", "\N{NON-BREAKING HYPHEN}")


def table(
    known: dict[tuple[str, str], dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
    refused: Callable[[dict[str, Any]], str],
) -> str:
    """Strategies down, families across."""

    def text(family: str, strategy: str) -> str:
        cell = known.get((family, strategy))
        if cell is None:
            return ""
        if "failed" in cell:
            return "**fails**"
        return refused(cell) if cell["refused"] else told(cell)

    rows = [["", *cells.FAMILIES], ["---"] * (len(cells.FAMILIES) + 1)]
    rows += [[strategy, *(text(family, strategy) for family in cells.FAMILIES)] for strategy in cells.STRATEGIES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain(message: str) -> str:
    """An error without the numbers and names of one cell, so that cells with one reason share a note."""
    if "no stack of repeated blocks" in message:
        return "the model has no stack of repeated blocks that stages could divide"
    if "devices for experts" in message:
        return "the model has no experts"
    if "devices for parts of a sequence" in message:
        return "the model is made of convolutions, which have no sequence"
    return message


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2:])
    else:
        PAGE.write_text(page(), encoding="utf-8")
