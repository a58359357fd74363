"""What the devices of a compiled step send each other, from a file with its program.

    python benchmarks/target_memory.py h100:1x8 llama3.2-1b --mesh data=2,fsdp=4 --text step.txt
    python benchmarks/communication.py step.txt --mesh data=2,fsdp=4

A row for each collective that sends much, then the sums of `artifex.scaling.communication`.
"""

from __future__ import annotations

import argparse
import pathlib
from collections import Counter

from artifex.scaling.communication import collectives, communication
from artifex.scaling.mesh_utils import SIZE_AXES
from artifex.scaling.pipeline.schedules import Schedule
from artifex.scaling.placement import size_text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=pathlib.Path, help="a compiled program, as XLA writes it")
    options.add_argument("--mesh", required=True, help="axis=size,...")
    options.add_argument("--pipeline", default="", help="schedule,microbatches,stages of a device: 1f1b,8,1")
    args = options.parse_args()
    given = {axis: int(size) for axis, size in (part.split("=") for part in args.mesh.split(","))}
    sizes = {axis: given[axis] for axis in sorted(given, key=SIZE_AXES.index)}
    taken = {}
    if args.pipeline:
        kind, microbatches, stages = args.pipeline.split(",")
        taken = Schedule(kind, sizes["pipeline"], int(microbatches), int(stages)).taken
    text = args.text.read_text(encoding="utf-8")
    alike = Counter(collectives(text, sizes, taken))
    for one, count in sorted(alike.items(), key=lambda row: -row[0].sent * row[1]):
        if one.sent * count >= 2**20:
            times = f"{one.bound} {count} x {one.times}".strip()
            each = size_text(one.sent / one.times)
            print(f"{' x '.join(one.axes):14} {one.kind:18} of {one.devices:<4} {times:>16} times {each}")
    print(communication(text, sizes, taken))


if __name__ == "__main__":
    main()
