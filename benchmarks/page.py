"""The tables of `docs/benchmarks.md`, made of the file that `peers.py` writes. Imports the standard library alone.

In the page a table stands between `<!-- peers: NAME -->` and `<!-- end -->`, with NAME a benchmark, or `machine`, or
`goals`; all else is written by hand and stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- peers: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Found = dict[str, Any]

# at most so many times a rival's median; beginnings of the rivals' names
RATIOS = {
    ("decoder step", "bare JAX"): 1.03,
    ("decoder step", "PyTorch"): 0.70,
    ("dit step", "bare JAX"): 1.05,
    ("dit step", "PyTorch"): 0.70,
    ("unet step", "bare JAX"): 1.05,
    ("unet step", "PyTorch"): 1.2,
    ("vae step", "bare JAX"): 1.05,
    ("vae step", "PyTorch"): 1.2,
    ("generation, 1 row", "bare JAX"): 1.05,
    ("generation, 1 row", "PyTorch"): 0.35,
    ("generation, 8 rows", "bare JAX"): 1.05,
    ("generation, 8 rows", "PyTorch"): 0.45,
}
# at most so many seconds
SECONDS = {
    ("first training step", "ours, cold"): 15.0,
    ("first training step", "ours, warm"): 6.0,
    ("imports", "import artifex.models"): 0.3,
}


def rewrite(file: Path, path: Path = PAGE) -> None:
    """Put the tables of a file of results into the page. Raises `ValueError` for a block that it has no table for."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["quick"]:
        raise ValueError(f"{file} was measured with --quick, which shows that it runs and no more; measure without")

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{table(found, match[2])}\n{match[3]}"

    path.write_text(BLOCK.sub(block, path.read_text(encoding="utf-8")), encoding="utf-8")


def tables(found: Found) -> str:
    """All tables of a file, one after the other."""
    names = dict.fromkeys(record["benchmark"] for record in found["records"])
    return "\n\n".join(f"## {name}\n\n{table(found, name)}" for name in ("machine", "goals", *names))


def table(found: Found, name: str) -> str:
    """One of them."""
    if name in ("machine", "goals"):
        return "\n".join((_machine if name == "machine" else _goals)(found))
    records = [record for record in found["records"] if record["benchmark"] == name]
    if not records:
        return "Not measured yet."
    return "\n\n".join("\n".join(_record(record)).strip() for record in records)


def _machine(found: Found) -> Iterator[str]:
    machine = found["machine"]
    cores = f"{machine['cores']} cores, {machine['memory_gib']:g} GiB, {machine['cpu']}"
    yield f"{found['when']}: {cores}{', ' + machine['vectors'] if machine['vectors'] else ''}, {machine['system']}."
    if found["conditions"]:
        yield f"{found['conditions']}"
    yield ""
    yield from _rows("environment", "versions")
    for name, one in found["environments"].items():
        versions = ", ".join(f"{key} {value}" for key, value in one.get("versions", {}).items())
        yield f"| {name} | {one.get('failed') or versions} |"


def _rows(*heads: str) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"


def _goals(found: Found) -> Iterator[str]:
    yield from _rows("goal", "measured", "")
    for (name, rival), most in RATIOS.items():
        pair = next((pair for pair in _pairs(found, name) if pair["to"].startswith(rival)), None)
        value = None if pair is None else pair["ratio"]
        shown = "" if pair is None else f"{value:.2f} ({_spread(pair['quartiles'])})"
        yield f"| {name}: at most {most:g} of {rival} | {shown} | {_verdict(value, most)} |"
    for (name, variant), most in SECONDS.items():
        row = next((record["variants"].get(variant, {}) for record in _named(found, name)), {})
        value = row.get("median")
        shown = "" if value is None else f"{value:.2f} s ({_spread(row['quartiles'])})"
        yield f"| {name}, {variant}: at most {most:g} s | {shown} | {_verdict(value, most)} |"


def _named(found: Found, name: str) -> list[Found]:
    return [record for record in found["records"] if record["name"] == name and "variants" in record]


def _pairs(found: Found, name: str) -> list[Found]:
    return [pair for record in _named(found, name) for pair in record["ratios"] if pair["of"] == "ours"]


def _verdict(value: float | None, most: float) -> str:
    return "not measured" if value is None else "met" if value <= most else "**missed**"


def _spread(pair: list[float], scale: float = 1, digits: int = 2) -> str:
    return " to ".join(f"{scale * value:,.{digits}f}" for value in pair)


def _record(record: Found) -> Iterator[str]:
    if "variants" not in record:
        yield f"`{record['name']}` failed: {record['failed']}."
        return
    rows, unit = record["variants"], record["unit"]
    if "dry" in record:
        yield from _dry(record)
        return
    yield from _variants(record, rows, unit) if rows else ()
    for pair in record["ratios"]:
        yield f"- {pair['of']} / {pair['to']} = **{pair['ratio']:.3f}** ({_spread(pair['quartiles'])})"


def _dry(record: Found) -> Iterator[str]:
    yield from _rows(f"{record['name']}, compiled for {record['dry']}", "parameters", "GiB", "TFLOPs of a step")
    for name, row in record["variants"].items():
        memory = row.get("failed") or (f"{row['memory'] / 2**30:.1f}" if row.get("memory") else "")
        flops = f"{row['model_flops'] / 1e12:.1f}" if "model_flops" in row else ""
        yield f"| {name} | {row.get('parameters', 0):,} | {memory} | {flops} |"


def _variants(record: Found, rows: Found, unit: str) -> Iterator[str]:
    slow = unit in ("starts", "layers")  # seconds, and no rate
    firsts = any("first" in row for row in rows.values())
    losses = any("loss" in row.get("computed", {}) for row in rows.values())
    heads = ["median, s" if slow else "median, ms", "half of the rounds", "" if slow else f"{unit}/s"]
    uses = any("utilisation" in row for row in rows.values())
    heads += ["of the peak", "GiB"] if uses else []
    heads += (["first call, s"] if firsts else []) + (["loss"] if losses else [])
    yield from _rows(record["name"], *filter(None, heads))
    for name, row in rows.items():
        if "median" not in row:
            yield f"| {name} | {row.get('failed', 'not timed')} |{' |' * (len([*filter(None, heads)]) - 1)}"
            continue
        scale = 1 if slow else 1e3
        digits = 2 if slow else 0 if row["median"] >= 0.1 else 1
        cells = [f"{scale * row['median']:,.{digits}f}"]
        cells.append(_spread(row["quartiles"], scale, digits) if "quartiles" in row else "")
        rate = record["work"] / row["median"]
        cells += [] if slow else [f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"]
        cells += [f"{100 * row.get('utilisation', 0):.1f} %", f"{(row['memory'] or 0) / 2**30:.1f}"] if uses else []
        cells += [f"{row['first']:.1f}" if "first" in row else ""] if firsts else []
        cells += [f"{row['computed']['loss']:.6g}" if "loss" in row.get("computed", {}) else ""] if losses else []
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for name, row in rows.items():
        kinds = row.get("computed", {}).get("kinds", {})
        if kinds:
            parts = sorted(kinds.items(), key=lambda part: -part[1])
            yield f"{name} by kinds of kernels: {', '.join(f'{kind} {1e3 * time:.1f} ms' for kind, time in parts)}."
            yield ""
