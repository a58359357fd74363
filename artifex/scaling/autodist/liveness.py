"""When each array of a step is made and last read, and so what a device must hold, loops and regions included.

Elementwise operations are no arrays: compilers fuse them into what reads them, so that what they read lives longer
instead. A fused result is written where something needs it as an array: a product, a collective, a loop, or several
readers where it is dear to compute. What only what enters a body decides, such as its weights gathered, is made at its
begin, and the sums of its gradients over devices are taken together at its end, as XLA's combiners have it.
"""

from __future__ import annotations

import dataclasses

from artifex.scaling.autodist.order import ALIASES, HABITS, PRODUCTS, Habits, flat, in_order, relaid
from artifex.scaling.autodist.program import Block, Op, Value
from artifex.scaling.execution import Platform

COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
OPAQUE = {
    *PRODUCTS,
    *COLLECTIVES,
    *("sort", "top_k", "scatter-add", "scatter", "scatter_add", "scan", "while", "cond", "cumsum", "cumlogsumexp"),
    *("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter"),
    *("reduce_window_sum", "random_bits", "threefry2x32", "dynamic_update_slice", "pallas_call", "custom_call"),
    *("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper", "take_part", "concatenate", "relaid"),
}
DEAR = {
    "exp",
    "exp2",
    "log",
    "log1p",
    "tanh",
    "logistic",
    "div",
    "rsqrt",
    "sqrt",
    "pow",
    "sin",
    "cos",
    "erf",
    "erf_inv",
}
DEAR |= {"rem", "expm1", "atan2", "erfc", "lgamma", "digamma"}
NOT_IN_PLACE = {*PRODUCTS, "sort", "all-gather", "gather", "relaid", "transpose", "collective-permute", "all-to-all"}


@dataclasses.dataclass(slots=True)
class Buffer:
    """An array of a device: bytes, and its first and last moment."""

    begin: int
    end: int
    size: float
    what: str


@dataclasses.dataclass(frozen=True)
class Live:
    """All arrays of a step besides its arguments and results."""

    buffers: tuple[Buffer, ...]
    peak: float
    at: str
    largest: tuple[float, ...] = ()  # bytes of the two largest at the busiest moment


def live(program: Block, sizes: dict[str, int], platform: Platform) -> Live:
    """Of a program with its collectives written in, on a mesh of `sizes`, as the compiler of a platform has it."""
    clock = _Clock()
    given = {id(value) for value in program.outs if value is not None}
    _Body(program, sizes, HABITS[platform]).play(clock, set(), given)
    changes: dict[int, float] = {}
    for one in clock.buffers:
        changes[one.begin] = changes.get(one.begin, 0.0) + one.size
        changes[one.end + 1] = changes.get(one.end + 1, 0.0) - one.size
    now = most = 0.0
    when = 0
    for moment in sorted(changes):
        now += changes[moment]
        if now > most:
            most, when = now, moment
    there = sorted((one.size for one in clock.buffers if one.begin <= when <= one.end), reverse=True)
    return Live(tuple(clock.buffers), most, clock.says.get(when, ""), tuple(there[:2]))


@dataclasses.dataclass
class _Clock:
    now: int = 0
    buffers: list[Buffer] = dataclasses.field(default_factory=list)
    says: dict[int, str] = dataclasses.field(default_factory=dict)
    path: str = ""

    def tick(self, name: str) -> int:
        self.now += 1
        self.says[self.now] = f"{self.path}{name}"
        return self.now


class _Body:
    """A block, its operations in the order in which they run."""

    def __init__(self, block: Block, sizes: dict[str, int], habits: Habits, carried: int = 0) -> None:
        self.block, self.sizes, self.habits = block, sizes, habits
        self.alias: dict[int, Value] = {}
        ops = list(flat(block, self.alias))
        if habits.copies_operands:
            ops = list(relaid(ops))
        for op in ops:
            if op.name in ALIASES:
                for out, value in zip(op.outs, op.ins, strict=False):
                    if value is not None and value.bytes(sizes) == out.bytes(sizes):
                        self.alias[id(out)] = value
        self.ops = in_order(ops, block, self.root, habits, carried)
        self.made: dict[int, Op] = {}
        self.readers: dict[int, list[Op]] = {}
        self.of_id: dict[int, Value] = {}
        for op in self.ops:
            for out in op.outs:
                if id(out) not in self.alias:
                    self.made[id(out)] = op
            for value in (*op.ins, *op.outs):
                if value is not None:
                    root = self.root(value)
                    self.of_id[id(root)] = root
            if op.name in ALIASES and all(id(out) in self.alias for out in op.outs):
                continue
            for value in op.ins:
                if value is not None:
                    self.readers.setdefault(id(self.root(value)), []).append(op)
        self.out_ids = {id(self.root(value)) for value in block.outs if value is not None}
        self._written: dict[int, bool] = {}
        self._reads: dict[int, dict[int, None]] = {}

    def root(self, value: Value) -> Value:
        while id(value) in self.alias:
            value = self.alias[id(value)]
        return value

    def written(self, value: Value) -> bool:
        """Whether an array exists for it, or readers compute it."""
        value = self.root(value)
        key = id(value)
        if key not in self._written:
            self._written[key] = self._is_written(value)
        return self._written[key]

    def _is_written(self, value: Value) -> bool:
        op = self.made.get(id(value))
        if op is None or op.name in OPAQUE or op.name.startswith(("reduce_", "arg")) or op.name == "gather":
            return True
        if id(value) in self.out_ids:
            return True
        readers = self.readers.get(id(value), [])
        if any(reader.name in OPAQUE for reader in readers):
            return True
        several = len({id(reader) for reader in readers}) > 1
        return several and (op.name in DEAR or any(reader.name.startswith("reduce_") for reader in readers))

    def reads(self, op: Op) -> dict[int, None]:
        """The arrays that an operation reads, through those that are fused into it. Not a set, whose order would be
        another one, and so the answer, each time."""
        if id(op) in self._reads:
            return self._reads[id(op)]
        found: dict[int, None] = {}
        for value in op.ins:
            if value is None:
                continue
            value = self.root(value)
            if self.written(value):
                found[id(value)] = None
            else:
                found |= self.reads(self.made[id(value)])
        self._reads[id(op)] = found
        return found

    def play(
        self, clock: _Clock, owned: set[int], given: set[int], lent: frozenset[int] | set[int] = frozenset()
    ) -> None:
        """Let the clock tick through it. Arrays that nothing here makes are somebody else's, but for `owned`; the place
        of those `lent` is free once they are read for the last time; room for those of `given` is there already."""
        given = {id(self.root(value)) for value in self.block.outs if value is not None and id(value) in given}
        writers = [op for op in self.ops if any(id(out) not in self.alias and self.written(out) for out in op.outs)]
        last: dict[int, int] = {}
        for index, op in enumerate(writers):
            for key in self.reads(op):
                last[key] = index
        last |= dict.fromkeys(self.out_ids, len(writers))
        held: dict[int, Buffer] = {}
        ending: dict[int, list[Buffer]] = {}
        for index, op in enumerate(writers):
            now = clock.tick(op.name)
            if op.name in OPAQUE:  # a part of a stack is cut out when it is first read as an array
                for key in self.reads(op):
                    if key in owned and key not in held:
                        value = self.of_id[key]
                        held[key] = Buffer(now, now, value.bytes(self.sizes), "part of a stack")
                        clock.buffers.append(held[key])
                        ending.setdefault(last[key], []).append(held[key])
            dying = {key: held[key] for key in self.reads(op) if key in held and last.get(key) == index}
            free = [
                self.of_id[key].bytes(self.sizes) for key in self.reads(op) if key in lent and last.get(key) == index
            ]
            outs = [out for out in op.outs if id(out) not in self.alias and self.written(out)]
            for out in sorted(outs, key=lambda out: -out.bytes(self.sizes)):
                if id(out) in given:
                    continue
                size = out.bytes(self.sizes)
                place = next((key for key, one in dying.items() if one.size == size), None)
                if op.name not in NOT_IN_PLACE and size in free:
                    free.remove(size)
                    continue
                if place is not None and op.name not in NOT_IN_PLACE:
                    buffer = dying.pop(place)
                    ending[index].remove(buffer)
                else:
                    buffer = Buffer(now, now, size, op.name)
                    clock.buffers.append(buffer)
                held[id(out)] = buffer
                ending.setdefault(max(last.get(id(out), index), index), []).append(buffer)
            self.inside(op, clock)
            for buffer in ending.pop(index, ()):
                buffer.end = clock.now
        clock.tick("end")
        for buffers in ending.values():
            for buffer in buffers:
                buffer.end = clock.now

    def inside(self, op: Op, clock: _Clock) -> None:
        """What an operation holds while it runs besides operands and results."""
        if not op.blocks:
            return
        path, clock.path = clock.path, f"{clock.path}{op.name} > "
        for block in op.blocks:
            body = _Body(block, self.sizes, self.habits, op.params["num_carry"] if op.name == "scan" else 0)
            owned: set[int] = set()
            lent: set[int] = set()
            stacked = {id(value) for value in block.outs if value is not None} if op.name == "cond" else set()
            if op.name == "while":
                lent = {id(body.root(value)) for value in block.ins[op.params["body_nconsts"] :]}
            if op.name == "scan":
                consts, carried = op.params["num_consts"], op.params["num_carry"]
                owned = {id(body.root(value)) for value in block.ins[consts + carried :]}
                lent = {id(body.root(value)) for value in block.ins[consts : consts + carried]}
                for value in block.outs[carried:]:
                    if value is None:
                        continue
                    maker = body.made.get(id(body.root(value)))
                    opaque = maker is None or maker.name in OPAQUE
                    read = any(reader.name in OPAQUE for reader in body.readers.get(id(body.root(value)), []))
                    if not opaque and not read:
                        stacked.add(id(value))
            body.play(clock, owned, stacked, lent)
        clock.path = path
