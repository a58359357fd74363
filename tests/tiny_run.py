"""A run that takes a second: what it reads, and its configuration."""

from pathlib import Path

from artifex.config import Config

PROSE = "It was a quiet day in the harbour, and the boats lay still.\n"
BASE = {
    "model": {"name": "llama-nano", "embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 16},
    "data": {"sequence_length": 32},
    "training": {"steps": 4, "batch_size": 8, "validate_every": 2, "validation_batches": 1, "sample_tokens": 4},
    "optimizer": {"name": "adamw", "warmup_steps": 1},
    "checkpoint": {"every": 2},
    "logging": {"every": 1, "progress": False},
}


def tiny(source, **sections) -> Config:
    """The run on `source`, with some fields of its sections replaced."""
    base = BASE | {"data": {"source": str(source), "sequence_length": 32}}
    return Config.from_dict({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


def written(folder: Path) -> Path:
    """The folder, with four files of prose in it."""
    for index in range(4):
        (folder / f"{index}.txt").write_text(PROSE * 40)
    return folder
