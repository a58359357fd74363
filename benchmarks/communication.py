"""What the devices of a compiled step send each other: its collectives, how often they run, and the bytes one sends.

    python benchmarks/target_memory.py h100:1x8 llama3.2-1b --mesh fsdp=8 --text step.txt
    python benchmarks/communication.py step.txt

Read from XLA's text, loops by their trip counts. Of W bytes, whole, a device of n sends W (n - 1) / n in an all-gather,
a reduce-scatter or an all-to-all, twice that in an all-reduce, and what it has in a permutation. What stands under a
conditional, as the turns of a pipeline do, runs at most as often as is said: it is marked so.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
from collections import defaultdict
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}
OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(OPS)})(-start)?\(.*")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", re.MULTILINE)
WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{(.*?)\}")
CALLS = re.compile(r" (?:fusion|call|async-start)\(.*(?:calls|to_apply)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One collective of the program; `times` it runs in a step, at most so if it is `conditional`."""

    op: str
    devices: int
    whole: float
    times: int
    conditional: bool

    @property
    def sent(self) -> float:
        """Bytes that one device sends, each time."""
        if self.op == "collective-permute":
            return self.whole
        return self.whole * (self.devices - 1) / self.devices * (2 if self.op == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program by XLA's text of it."""
    bodies, entry = _computations(text)
    found: list[Collective] = []

    def walk(name: str, times: int, conditional: bool) -> None:
        for line in bodies[name]:
            if (match := COLLECTIVE.search(line)) is not None:
                found.append(_collective(line, match, times, conditional))
            elif (loop := WHILE.search(line)) is not None:
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                assert trips is not None, f"a loop without a count: {line.strip()[:120]}"
                walk(loop[1], times * int(trips[1]), conditional)
            elif " conditional(" in line:
                for one, several in BRANCHES.findall(line):
                    for branch in [one] if one else several.replace("%", "").split(", "):
                        walk(branch, times, True)
            elif (call := CALLS.search(line)) is not None:
                walk(call[1], times, conditional)

    walk(entry, 1, False)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    heads = list(COMPUTATION.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    bodies = {head[2]: text[head.end() : end].splitlines() for head, end in zip(heads, ends, strict=True)}
    return bodies, next(head[2] for head in heads if head[1])


def _collective(line: str, match: re.Match, times: int, conditional: bool) -> Collective:
    kinds, op, start = match[1], match[2], match[3]
    shapes = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", kinds)
    there = float(sum(BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes))
    devices = _devices(line)
    if start and op in ("all-gather", "reduce-scatter"):  # both what goes in and what comes out are named
        there *= devices / (devices + 1)
    elif start and op in ("all-to-all", "collective-permute"):
        there /= 2
    elif op == "reduce-scatter":
        there *= devices
    return Collective(op, devices, there, times, conditional)


def _devices(line: str) -> int:
    """How many devices take part together."""
    if (groups := re.search(r"replica_groups=\[\d+,(\d+)\]", line)) is not None:
        return int(groups[1])
    if (groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return groups[1].count(",") + 1
    if (groups := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2]))
    return 1


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=pathlib.Path, help="a compiled program, as XLA writes it")
    rows: dict[Collective, list[int]] = defaultdict(list)
    for each in collectives(options.parse_args().text.read_text(encoding="utf-8")):
        rows[each._replace(times=0)].append(each.times)
    total = 0.0
    for each, times in sorted(rows.items(), key=lambda row: -row[0].sent * sum(row[1])):
        sent = each.sent * sum(times)
        total += sent
        most = "at most " if each.conditional else ""
        if sent >= 2**20:
            how = f"{each.op:18} of {each.devices}  {each.whole / 2**20:9.1f} MiB"
            print(f"{how}  {most + str(sum(times)):>12} times  {sent / 2**20:9.0f} MiB sent")
    print(f"a device sends {total / 2**30:.2f} GiB in a step")


if __name__ == "__main__":
    main()
