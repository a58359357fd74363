"""What kind of work an instruction of a compiled program does: the dearest that it, or what it calls, is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from artifex.profiling.trace import is_communication
from artifex.scaling.hlo import Instruction, Program

OTHERS = "elementwise and reductions"
CLASSES: Mapping[str, re.Pattern[str]] = {
    "communication": re.compile(r"$^"),  # by its opcode
    "attention kernels": re.compile(r"fmha|flash|splash|dot_product_attention"),
    "matrix products": re.compile(r"\bdot\b|ragged-dot|gemm|matmul"),
    "convolutions": re.compile(r"\bconvolution\b|conv(?:fwd|bwd|\b)"),
    "sorting and gathering": re.compile(r"\bsort\b|gather|scatter|topk"),
    "copies": re.compile(r"^(?:copy|transpose|concatenate|slice|dynamic-slice|dynamic-update-slice|bitcast|pad)$"),
}
"""Classes -> what marks them in opcodes and in the targets of calls, the first that is found; the rest is `OTHERS`:
elementwise work and sums, which compilers fuse."""


def class_of(program: Program, one: Instruction) -> str:
    """The class of an instruction."""
    marks = set(_marks(program, one))
    if any(is_communication(mark) for mark in marks):
        return "communication"
    for kind, pattern in CLASSES.items():
        if kind != "copies" and any(pattern.search(mark) for mark in marks):
            return kind
    moves = CLASSES["copies"]
    plain = {"parameter", "constant", "fusion", "tuple", "get-tuple-element", "call"}
    return "copies" if all(moves.match(mark) or mark in plain for mark in marks) else OTHERS


def _marks(program: Program, one: Instruction) -> Iterator[str]:
    """Opcodes, and targets of calls, of an instruction and all that it calls."""
    yield one.opcode
    if one.opcode == "custom-call" and (target := re.search(r'custom_call_target="([^"]*)"', one.rest)):
        yield target[1]
    if one.opcode in ("fusion", "call", "custom-call", "async-start") and one.called in program.computations:
        for inside in program.computations[one.called].values():
            yield from _marks(program, inside)
