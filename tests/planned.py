"""Tiny runs for the tests of the planner, each of whose steps is traced once."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from artifex.config import Config
from artifex.scaling.autodist import AutoDistConfig, plan
from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.estimate import Traced
from artifex.scaling.autodist.look import Candidate
from artifex.scaling.autodist.planned import Planned
from artifex.scaling.autodist.planner import predict
from artifex.scaling.autodist.spread import AXES, Spread
from artifex.training.planning import RunSubject

DEVICES = 8
CLUSTER = Cluster.parse(f"cpu:{DEVICES}")
GIB = 2**30
TEXT = {"embed_dim": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 128, "vocab_size": 256}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("llama-nano", {**TEXT, "tied_head": False}),
    "moe": ("moe-nano", {**TEXT, "expert_mlp_dim": 64}),
    "dit": ("dit-digits", {"network": {"num_layers": 2, "embed_dim": 64, "num_heads": 8, "patch_size": 1}}),
    "vae": ("vae-digits", {"block_channels": [16, 32]}),
    "vq": ("vq-digits", {"block_channels": [32]}),
    "unet": ("unet-digits", {"network": {"block_channels": [8, 16], "layers_per_block": 1, "groups": 4}}),
}
"""Name -> preset and the fields that make it small."""


class Remembered(RunSubject):
    """A run whose traced steps are kept."""

    def __init__(self, config: Config, *, trains: bool = True) -> None:
        super().__init__(config, trains=trains)
        self.steps: dict[Any, Traced] = {}

    def traced(self, spread: Spread, platform: Any) -> Traced:
        if (spread, platform) not in self.steps:
            self.steps[spread, platform] = super().traced(spread, platform)
        return self.steps[spread, platform]


def config_of(family: str, **training: Any) -> Config:
    """The run of a family: 16 rows of 64 tokens, or of 8 x 8 digits."""
    preset, fields = FAMILIES[family]
    text = "num_heads" in fields
    return Config.from_dict(
        {
            "model": {"name": preset, **fields},
            "data": {"sequence_length": 64} if text else {"source": "digits"},
            "optimizer": {"name": "adamw"},  # Muon brings whole matrices together: docs/training.md
            "training": {"batch_size": 16, **training},
        }
    )


@functools.cache
def subject(family: str = "decoder") -> Remembered:
    """The run of a family, one for all tests of a process."""
    return Remembered(config_of(family))


@functools.cache
def predicted(spread: Spread, family: str = "decoder") -> Candidate:
    """What a spread by hand is estimated to take."""
    return predict(subject(family), CLUSTER, spread)


def spread_of(mesh: str, **settings: Any) -> Spread:
    """Of the axes that "data 2 x fsdp 4" names."""
    sizes = {name: int(size) for name, size in (part.split() for part in mesh.split(" x "))}
    return Spread(tuple((axis, sizes[axis]) for axis in AXES if axis in sizes), **settings)


def options(**given: Any) -> AutoDistConfig:
    """For eight CPU devices by their published figures, whatever was measured on this machine."""
    return AutoDistConfig(**{"mesh_col": DEVICES, "device": "cpu", **given})


def planned(family: str = "decoder", **given: Any) -> Planned:
    """The planner's answer for a run of a family."""
    return plan(subject(family), options(**given))


def every(found: Planned) -> list[Candidate]:
    """What it returns, the best first."""
    return [found.best, *found.runners]


def first_config(found: Planned, folder: Path) -> Path:
    """The run that follows the plan, as a file."""
    path = folder / "run.yaml"
    path.write_text(subject().config_of(found.spread).to_yaml(), encoding="utf-8")
    return path


def one_line(error: BaseException) -> str:
    """Its text, which is one line."""
    text = str(error)
    assert text.isprintable(), text
    return text


def number(text: str, pattern: str) -> float:
    """The number in a text that a pattern says."""
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return float(found[1])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a step on eight simulated devices."""

    arguments: int
    whole: int


@functools.cache
def compiled(spread: Spread, family: str = "decoder") -> Compiled:
    """The step of a spread, compiled; nothing of it is allocated."""
    from artifex.training.memory import compile_step
    from artifex.training.state import blueprint
    from artifex.training.state import planned as plan_of
    from artifex.training.task import batch_shapes

    config = subject(family).config_of(spread)
    of = plan_of(config, DEVICES)
    step = compile_step(blueprint(config, of, of.make_mesh()), batch_shapes(config))
    used: Any = step.compiled.memory_analysis()
    return Compiled(used.argument_size_in_bytes, step.whole)
