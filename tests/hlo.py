"""FLOPs of a compiled program by its text: of all matrix products and convolutions, a loop's as often as it runs.

XLA's own count takes the body of a loop once. The text is that of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; of a constant its value
    root: bool


def flops(text: str, taken: Mapping[int, Sequence[int]] | None = None) -> float:
    """FLOPs of dots and convolutions, 2 for a multiply and add; of a conditional its dearest branch.

    `taken` says for loops of so many turns in how many of these each conditional of their body, in the order of the
    program, takes that branch.
    """
    return _Program(text, taken or {}).flops()


class _Program:
    def __init__(self, text: str, taken: Mapping[int, Sequence[int]]) -> None:
        self.taken = taken
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line)
            if line.endswith("{") and " -> " in line:
                name = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
                current = self.computations.setdefault(name, {})
                if line.startswith("ENTRY"):
                    self.entry = name
            elif found := INSTRUCTION.match(line):
                name, shape, opcode, after = found.groups()
                inside, rest = _closed(after)
                operands = tuple(re.findall(r"%([\w.-]+)", inside)) if opcode != "constant" else ()
                rest = inside if opcode in ("constant", "parameter") else rest
                current[name] = Instruction(name, shape, opcode, operands, rest, line.lstrip().startswith("ROOT"))

    def flops(self) -> float:
        return self._of(self.entry)

    @functools.cache  # noqa: B019 - a program lives as long as its count
    def _of(self, computation: str) -> float:
        return sum(self._one(computation, instruction) for instruction in self.computations[computation].values())

    def _one(self, computation: str, one: Instruction) -> float:
        if one.opcode == "dot":
            return self._dot(computation, one)
        if one.opcode == "convolution":
            return self._convolution(computation, one)
        if one.opcode == "while":
            return self._loop(self._turns(computation, one), _attribute(one, "body"))
        if one.opcode == "conditional":
            branches = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", one.rest)
            listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
            branches += [name.strip().lstrip("%") for name in listed[1].split(",")] if listed else []
            return max(map(self._of, branches))
        if one.opcode in ("fusion", "call", "async-start", "custom-call"):
            inner = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", one.rest)
            if one.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', one.rest)
                assert target and not re.search("dot|matmul|conv", target[1], re.IGNORECASE), one
            return self._of(inner[1]) if inner else 0.0
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
        return _dims(self.computations[computation][name].shape)

    def _dot(self, computation: str, one: Instruction) -> float:
        left = self._dims(computation, one.operands[0])
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        ways = math.prod(left[int(dim)] for dim in summed[1].split(",") if dim) if summed else 1
        return 2.0 * math.prod(_dims(one.shape)) * ways

    def _convolution(self, computation: str, one: Instruction) -> float:
        """Without what is multiplied by padding, as XLA counts."""
        left, right = (self._dims(computation, name) for name in one.operands)
        out = _dims(one.shape)
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
        """How often a loop that counts up runs. One whose end depends on data counts as running to the end of the
        longest array that it goes along."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = _attribute(loop, "condition")
        root = next(one for one in self.computations[condition].values() if one.root)
        counted, end = (self._at_start(computation, loop, condition, name) for name in root.operands[:2])
        if counted is not None and end is not None:
            return end - counted
        lengths = [int(dims.split(",")[0]) for _, dims in SHAPE.findall(loop.shape) if dims]
        return max(lengths)

    def _at_start(self, computation: str, loop: Instruction, condition: str, name: str) -> int | None:
        """The number that an instruction of a loop's condition is before the first turn, where the text says it."""
        one = self.computations[condition][name]
        if one.opcode == "get-tuple-element":
            index = int(_attribute(one, "index"))
            start = self.computations[computation][loop.operands[0]]
            if start.opcode != "tuple":
                return None
            return self._constant(computation, start.operands[index])
        return self._constant(condition, name)

    def _constant(self, computation: str, name: str) -> int | None:
        one = self.computations[computation][name]
        while one.opcode in ("copy", "bitcast", "convert"):
            one = self.computations[computation][one.operands[0]]
        if one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.rest.strip()):
            return None
        return int(one.rest)


def _attribute(one: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.-]+)", one.rest)
    assert found, one
    return found[1]


def _closed(after: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and behind it."""
    depth = 1
    for at, letter in enumerate(after):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return after[:at], after[at + 1 :]
    raise AssertionError(after)


def _dims(shape: str) -> list[int]:
    found = SHAPE.search(shape)
    assert found, shape
    return [int(dim) for dim in found[2].split(",") if dim]
