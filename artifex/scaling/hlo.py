"""XLA's text of a compiled program, read: its computations, their instructions, and how often a loop runs."""

from __future__ import annotations

import dataclasses
import re

SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; of a constant its value
    root: bool

    def attribute(self, key: str) -> str | None:
        """The name or number that stands behind `key=`."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """The computation that a fusion, a call, or the start of an asynchronous operation runs."""
        return self.attribute("calls") or self.attribute("to_apply")

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional, by what it asks: of a truth value false comes first."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        names = (self.attribute("false_computation"), self.attribute("true_computation"))
        return tuple(name for name in names if name)


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of each computation by their names, in the order in which they run, and where it begins."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @classmethod
    def of(cls, text: str) -> Program:
        """Read `compiled.as_text()`, or a file that XLA wrote. Raises `ValueError` for what is no such text."""
        computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        entry = None
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line)
            if line.endswith("{") and " -> " in line:
                name = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
                current = computations.setdefault(name, {})
                entry = name if line.startswith("ENTRY") else entry
            elif found := _INSTRUCTION.match(line):
                one = _instruction(*found.groups(), root=line.lstrip().startswith("ROOT"))
                current[one.name] = one
        if entry is None:
            raise ValueError("this is no program as XLA writes it: none of its lines begins with ENTRY")
        return cls(computations, entry)

    def turns(self, computation: str, loop: Instruction) -> int | None:
        """How often the body of a `while` in `computation` runs; None where its end depends on data.

        As XLA says it, where it does (`known_trip_count`: not on a TPU), else as the loop counts up from a constant to
        a constant, by a constant.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = loop.attribute("condition")
        assert condition is not None, loop
        compare, sides = self._whole(condition, self._root(condition))
        if compare.opcode != "compare":
            return None
        direction = compare.attribute("direction")
        counted, end = (self._at_start(computation, loop, *side) for side in sides[:2])
        step = self._step(loop, *sides[0])
        if counted is None or end is None or not step or direction not in ("LT", "LE", "NE"):
            return None
        return max(0, -(-(end - counted + (direction == "LE")) // step))

    def _root(self, computation: str) -> Instruction:
        return next(one for one in self.computations[computation].values() if one.root)

    def _whole(self, computation: str, one: Instruction) -> tuple[Instruction, list[tuple[str, str]]]:
        """An instruction, or what a fusion of one computes, with its operands and the computations that have them."""
        if one.opcode != "fusion" or (inner := one.called) is None:
            return one, [(computation, name) for name in one.operands]
        root, inside = self._root(inner), self.computations[inner]
        places = {each.name: int(each.rest) for each in inside.values() if each.opcode == "parameter"}
        given = [
            (computation, one.operands[places[name]]) if name in places else (inner, name) for name in root.operands
        ]
        return root, given

    def _step(self, loop: Instruction, condition: str, name: str) -> int | None:
        """What a loop adds to its counter in a turn."""
        counter, body = self.computations[condition][name], loop.attribute("body")
        index, root = counter.attribute("index"), self._root(body or "")
        if counter.opcode != "get-tuple-element" or index is None or root.opcode != "tuple" or body is None:
            return None
        added, sides = self._whole(body, self._through(body, root.operands[int(index)]))
        constants = [number for side in sides if (number := self._constant(*side)) is not None]
        return constants[0] if added.opcode == "add" and len(constants) == 1 else None

    def _at_start(self, computation: str, loop: Instruction, within: str, name: str) -> int | None:
        """The number that an instruction of a loop's condition is before the first turn, where the text says it."""
        one = self.computations[within][name]
        if one.opcode != "get-tuple-element":
            return self._constant(within, name)
        start, index = self.computations[computation][loop.operands[0]], one.attribute("index")
        assert index is not None, one
        return self._constant(computation, start.operands[int(index)]) if start.opcode == "tuple" else None

    def _through(self, computation: str, name: str) -> Instruction:
        """The instruction whose value a copy has."""
        one = self.computations[computation][name]
        while one.opcode in ("copy", "bitcast", "convert"):
            one = self.computations[computation][one.operands[0]]
        return one

    def _constant(self, computation: str, name: str) -> int | None:
        one = self._through(computation, name)
        if one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.rest.strip()):
            return None
        return int(one.rest)


def dims(shape: str) -> list[int]:
    """The dims of the first array in a shape."""
    found = SHAPE.search(shape)
    assert found, shape
    return [int(dim) for dim in found[2].split(",") if dim]


def _instruction(name: str, shape: str, opcode: str, after: str, *, root: bool) -> Instruction:
    inside, rest = _closed(after)
    if opcode in ("constant", "parameter"):
        return Instruction(name, shape, opcode, (), inside, root)
    return Instruction(name, shape, opcode, tuple(_names(inside)), rest, root)


def _names(inside: str) -> list[str]:
    """The operands' names: the last word of each, for some texts say its shape before it, and some no `%`."""
    names, depth, begin = [], 0, 0
    for at, letter in enumerate(inside + ","):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            if word := inside[begin:at].split():
                names.append(word[-1].lstrip("%"))
            begin = at + 1
    return names


def _closed(after: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and behind it."""
    depth = 1
    for at, letter in enumerate(after):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return after[:at], after[at + 1 :]
    return after, ""
