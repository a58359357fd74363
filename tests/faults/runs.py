"""A small run as a command line, for tests that start real processes."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "model": {"name": "llama-nano", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16},
    "data": {"source": "source", "sequence_length": 32},
    "training": {"steps": 40, "batch_size": 8, "validate_every": 0, "validation_batches": 1, "sample_tokens": 0},
    "optimizer": {"name": "adamw", "warmup_steps": 1},
    "checkpoint": {"every": 10},
    "logging": {"every": 10, "progress": False},
}


def write_source(folder: Path) -> Path:
    """`folder` with a configuration, `c.json`, and the text it reads."""
    (folder / "source").mkdir()
    for index in range(4):
        lines = (f"It was day {day} in harbour {index}, and the boats lay still.\n" for day in range(60))
        (folder / "source" / f"{index}.txt").write_text("".join(lines))
    (folder / "c.json").write_text(json.dumps(SECTIONS))
    return folder


def command(*words: str, program: str | None = None) -> list[str]:
    """`python -m artifex.train c.json`, or the `program` that calls it, with more words."""
    begin = ["-m", "artifex.train"] if program is None else ["-c", program]
    return [sys.executable, *begin, "c.json", *words]


def environment(**more: str) -> dict[str, str]:
    """One device, and programs that compile fast."""
    settings = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | settings | {"PYTHONPATH": str(ROOT)} | more
