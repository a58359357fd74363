"""Where an operation of a compiled program belongs: which module, in which pass.

XLA keeps for each operation how it came about, as in `jit(step)/transpose(jvp(Decoder))/while/body/Block/Linear/mul`:
the functions that were transformed, loops, the scopes of modules (`artifex.models.module`), and last the operation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from artifex.scaling.hlo import Program

Pass = Literal["forward", "backward", "recomputed", "optimizer", "other"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "recomputed", "optimizer", "other")
OTHER = "other"

_FRAMES = re.compile(
    r"while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|remat\d*|pjit|core_call|shard_map"
    r"|custom_(?:jvp|vjp)_call(?:_jaxpr)?|scan|shmap_body|main|named_call|pipeline_call"
)
_INSIDE = re.compile(r"^(?:\w+\()+(.*?)\)+$")
_TRANSFORMED = re.compile(r"^(?:jvp|transpose|vmap|linearize|partial_eval|mul)\(")
_JOINED = re.compile(r"/\([^()]*:.*$")  # what XLA made of several: `Block/(Attention/dot_general:GatedMLP/dot_general)`
_NAME = re.compile(r"[A-Za-z_][\w.]*")


@dataclasses.dataclass(frozen=True)
class Place:
    """The modules around an operation, outermost first, and its pass."""

    modules: tuple[str, ...]
    during: Pass

    @property
    def path(self) -> str:
        """Modules as text, `Decoder/Block/Attention`; "other" where there is none."""
        return "/".join(self.modules) or OTHER


def place_of(op_name: str) -> Place:
    """The place that an `op_name` of XLA's metadata says. What no scope is about is "other", also its pass, unless a
    transformation tells that."""
    op_name = _JOINED.sub("/joined", op_name)
    *frames, _ = op_name.split("/")
    during, modules = _pass(op_name), []
    for frame in frames:
        name = frame
        if frame.startswith("jit("):
            continue
        if _TRANSFORMED.match(frame) and (found := _INSIDE.match(frame)):
            name = found[1]
        if not _NAME.fullmatch(name) or _FRAMES.fullmatch(name):
            continue
        if not modules or modules[-1] != name:  # a method that calls another of its module
            modules.append(name)
    return Place(tuple(modules), during)


def _pass(op_name: str) -> Pass:
    frames = op_name.split("/")
    if "optimizer" in frames:
        return "optimizer"
    if "rematted_computation" in frames:
        return "recomputed"
    if any(frame.startswith("transpose(") for frame in frames):
        return "backward"
    return "forward" if any(frame.startswith("jvp(") for frame in frames) else "other"


def places(program: Program) -> Mapping[str, Place]:
    """The place of each instruction of a compiled program, by its name: of a fusion that of its root, where it says
    none itself."""
    found: dict[str, Place] = {}
    for computation in program.computations.values():
        for one in computation.values():
            found[one.name] = place_of(_op_name(program, one.name, one.rest, one.called))
    return found


def _op_name(program: Program, name: str, rest: str, called: str | None) -> str:
    if known := re.search(r'op_name="([^"]*)"', rest):
        return known[1]
    if called and called in program.computations:
        inside = program.computations[called].values()
        own = next((one for one in inside if one.root), None)
        if own is not None and own.name != name and (known := re.search(r'op_name="([^"]*)"', own.rest)):
            return known[1]
        named = (re.search(r'op_name="([^"]*)"', one.rest) for one in inside)
        return next((one[1] for one in named if one), "")
    return ""
