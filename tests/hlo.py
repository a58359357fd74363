"""FLOPs of a compiled program by its text: of all matrix products and convolutions, a loop's as often as it runs.

XLA's own count takes the body of a loop once. The text is that of one device.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence

from artifex.scaling.hlo import SHAPE, Instruction, Program, dims


def flops(text: str, taken: Mapping[int, Sequence[int]] | None = None) -> float:
    """FLOPs of dots and convolutions, 2 for a multiply and add; of a conditional its dearest branch.

    `taken` says for loops of so many turns in how many of these each conditional of their body, in the order of the
    program, takes that branch.
    """
    return _Flops(text, taken or {}).flops()


class _Flops:
    def __init__(self, text: str, taken: Mapping[int, Sequence[int]]) -> None:
        self.taken = taken
        self.program = Program.of(text)
        self.computations = self.program.computations

    def flops(self) -> float:
        return self._of(self.program.entry)

    @functools.cache  # noqa: B019 - a program lives as long as its count
    def _of(self, computation: str) -> float:
        return sum(self._one(computation, instruction) for instruction in self.computations[computation].values())

    def _one(self, computation: str, one: Instruction) -> float:
        if one.opcode == "dot":
            return self._dot(computation, one)
        if one.opcode == "convolution":
            return self._convolution(computation, one)
        if one.opcode == "while":
            body = one.attribute("body")
            assert body, one
            return self._loop(self._turns(computation, one), body)
        if one.opcode == "conditional":
            return max(map(self._of, one.branches))
        if one.opcode in ("fusion", "call", "async-start", "custom-call"):
            if one.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', one.rest)
                assert target and not re.search("dot|matmul|conv", target[1], re.IGNORECASE), one
            return self._of(one.called) if one.called else 0.0
        assert one.opcode != "ragged-dot", one
        return 0.0

    def _loop(self, turns: int, body: str) -> float:
        branches = [one for one in self.computations[body].values() if one.opcode == "conditional"]
        each = turns * self._of(body)
        if len(self.taken.get(turns, ())) != len(branches):
            return each
        left_out = zip(self.taken[turns], branches, strict=True) if branches else ()
        return each - sum((turns - times) * self._one(body, one) for times, one in left_out)

    def _dims(self, computation: str, name: str) -> list[int]:
        return dims(self.computations[computation][name].shape)

    def _dot(self, computation: str, one: Instruction) -> float:
        left = self._dims(computation, one.operands[0])
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        ways = math.prod(left[int(dim)] for dim in summed[1].split(",") if dim) if summed else 1
        return 2.0 * math.prod(dims(one.shape)) * ways

    def _convolution(self, computation: str, one: Instruction) -> float:
        """Without what is multiplied by padding, as XLA counts."""
        left, right = (self._dims(computation, name) for name in one.operands)
        out = dims(one.shape)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
        assert labels
        of_left, of_right, of_out = labels.groups()
        window = dict(re.findall(r"(\w+)=([\w-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or [""] * 2)[1]))
        groups, batches = (
            int((re.search(rf"{kind}_group_count=(\d+)", one.rest) or [0, 1])[1]) for kind in ("feature", "batch")
        )
        met = 1
        for place, label in enumerate(sorted(label for label in of_out if label.isdigit())):
            of_dim = {key: values.split("x")[place] for key, values in window.items()}
            low = int(of_dim.get("pad", "0_0").split("_")[0])
            stride, dilate, spread = (int(of_dim.get(key, 1)) for key in ("stride", "rhs_dilate", "lhs_dilate"))
            size = left[of_left.index(label)]
            positions = (
                o * stride + k * dilate - low
                for o in range(out[of_out.index(label)])
                for k in range(right[of_right.index(label)])
            )
            met *= sum(0 <= at <= (size - 1) * spread and at % spread == 0 for at in positions)
        rows, features = left[of_left.index("b")] // batches, left[of_left.index("f")] // groups
        return 2.0 * met * rows * features * out[of_out.index("f")]

    def _turns(self, computation: str, loop: Instruction) -> int:
        """How often a loop runs. One whose end depends on data counts as running to the end of the longest array that
        it goes along."""
        turns = self.program.turns(computation, loop)
        if turns is not None:
            return turns
        return max(int(dims.split(",")[0]) for _, dims in SHAPE.findall(loop.shape) if dims)
