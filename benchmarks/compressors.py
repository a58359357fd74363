"""Bits per byte of gzip, bz2 and xz on the quickstart's held-out files, for the Python it runs on.

`python benchmarks/compressors.py --run runs/quickstart` adds what a run reached there. Each compressor at its highest
setting (`gzip -9`, `bzip2 -9`, `xz -9e`) takes all held-out files as one stream, in the order and with the separators
that a model of bytes is validated on.
"""

import argparse
import bz2
import gzip
import json
import lzma
import platform
from pathlib import Path

from artifex.data.text import load_text

COMPRESSORS = {
    "gzip -9": lambda content: gzip.compress(content, 9),
    "bz2": lambda content: bz2.compress(content, 9),
    "xz -9e": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--run", type=Path, help="the folder of a run, whose last validation is shown beside")
    args = parser.parse_args()

    corpus = load_text(args.source)
    content = corpus.validation.tobytes()
    print(f"Python {platform.python_version()}: {len(corpus.validation_files)} held-out files, {len(content):,} bytes")
    for name, compress in COMPRESSORS.items():
        print(f"{name:8} {8 * len(compress(content)) / len(content):.3f} bits per byte")
    if args.run:
        records = map(json.loads, (args.run / "metrics.jsonl").read_text().splitlines())
        last = [record for record in records if record["split"] == "validation"][-1]
        where = f"step {last['step']:,}, over {last['targets']:,} targets"
        print(f"{'the run':8} {last['bits_per_byte']:.3f} bits per byte at {where}")


if __name__ == "__main__":
    main()
