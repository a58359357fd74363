"""Tokens a second of the text loader, at the quickstart's shape: `python benchmarks/data_loader.py --help`."""

import argparse
import itertools
import statistics
import time

import report

from artifex.data.batches import Batches
from artifex.data.text import load_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1_000, help="batches in each of five rounds")
    report.add_json(parser)
    args = parser.parse_args()

    start = time.perf_counter()
    corpus = load_text(args.source)
    print(f"read in {time.perf_counter() - start:.2f} s: {corpus.describe()}")

    batches = Batches(
        corpus.train,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        vocab_size=corpus.vocab_size,
    )
    stream = batches.stream()
    next(stream)  # starts the thread
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in itertools.islice(stream, args.steps):
            pass
        seconds.append((time.perf_counter() - start) / args.steps)
    stream.close()
    each = statistics.median(seconds)
    tokens = args.batch_size * args.sequence_length
    print(f"{1 / each:,.0f} batches/s of {args.batch_size} x {args.sequence_length}: {tokens / each:,.0f} tokens/s")
    report.finish(args, [report.record("data loading", {"ours": seconds}, work=tokens, unit="tokens")])


if __name__ == "__main__":
    main()
