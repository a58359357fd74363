"""A profile as one page of HTML that needs nothing else: no network, no script, no file beside it."""

from __future__ import annotations

import html
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax

import artifex
from artifex.profiling.scopes import PASSES
from artifex.scaling.autodist.planned import seconds_text, share_text
from artifex.scaling.placement import size_text

if TYPE_CHECKING:
    from artifex.profiling.result import Operation, Profile

MODULES, OPERATIONS = 25, 30  # that are listed
LONG = ("operation", "module")  # columns whose words may break anywhere
STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --bar: #3b6ea8; --back: #f6f7f9 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.5rem 4rem; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
p { margin: .3rem 0; color: var(--soft) }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: 1.2rem }
.card { flex: 1 1 11rem; background: var(--back); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .9rem }
.card b { display: block; font-size: 1.35rem } .card span { color: var(--soft); font-size: .85rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line) }
td, th { padding: .22rem .5rem .22rem 0; vertical-align: top } .number { text-align: right; white-space: nowrap }
td.name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .82rem }
td.long { overflow-wrap: anywhere }
.bar { width: 34%; min-width: 8rem; padding-top: .5rem }
.bar i { display: block; height: .65rem; background: var(--bar); border-radius: 2px; min-width: 1px }
svg { max-width: 100%; height: auto }
@media print { body { max-width: none; padding: 0 } .bar i { print-color-adjust: exact } }
"""


def page(found: Profile) -> str:
    """The page."""
    sections = (_head, _steps, _run, _memory, _communication, _time, _modules, _operations, _foot)
    body = "\n".join(line for section in sections for line in section(found))
    title = html.escape(f"Profile of {found.name}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>"
    )


def _head(found: Profile) -> Iterator[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1)
    where = f"{found.devices} {found.device} device{'s' * (found.devices != 1)}{f' as {mesh}' if mesh else ''}"
    yield f"<h1>Profile of {html.escape(found.name)}</h1>\n<p>{html.escape(where)}</p>"
    cards = [(seconds_text(found.median), "a step, median")]
    if found.rate is not None:
        cards.append((f"{found.rate:,.0f}", f"{found.noun} a second"))
    if found.utilisation is not None:
        cards.append((f"{found.utilisation:.1%}", "model FLOPs utilisation"))
    if found.memory is not None:
        cards.append((size_text(found.memory.whole), "memory of a device"))
    if found.devices > 1 and found.communication is not None:
        cards.append((size_text(found.communication.sent()), "sent by a device in a step"))
    yield '<div class="cards">'
    yield from (f'<div class="card"><b>{html.escape(text)}</b><span>{what}</span></div>' for text, what in cards)
    yield "</div>"


def _steps(found: Profile) -> Iterator[str]:
    """The time of each step, as points on a line."""
    low, high = found.quartiles
    yield "<h2>Steps</h2>"
    traced = "; they were traced, which takes time" if found.while_traced else ""
    yield f"<p>{len(found.times)} steps, half of them between {seconds_text(low)} and {seconds_text(high)}{traced}.</p>"
    if found.utilisation is not None:
        reached = f"{(found.peak or 0) / 1e12:,.4g} TFLOP/s: {html.escape(found.peak_source)}"
        yield f"<p>A step needs {found.model_flops:.4g} FLOPs; the devices reach {reached}.</p>"
    top = max(found.times)
    width, height = 960, 90
    yield f'<svg viewBox="0 0 {width} {height + 22}" role="img" aria-label="time of each step">'
    yield f'<line x1="0" y1="{height}" x2="{width}" y2="{height}" stroke="#d9dee5"/>'
    each = width / len(found.times)
    for number, seconds in enumerate(found.times):
        tall = seconds / top * (height - 8)
        at = number * each
        yield (
            f'<rect x="{at + 0.12 * each:.1f}" y="{height - tall:.1f}" width="{0.76 * each:.1f}" height="{tall:.1f}" '
            f'fill="#3b6ea8"><title>step {number + 1}: {seconds_text(seconds)}</title></rect>'
        )
    y = height - found.median / top * (height - 8)
    yield f'<line x1="0" y1="{y:.1f}" x2="{width}" y2="{y:.1f}" stroke="#1c2430" stroke-dasharray="5 4"/>'
    yield f'<text x="0" y="{height + 16}" font-size="13" fill="#5b6675">each bar a step, the dashed line their median, '
    yield f"the tallest {seconds_text(top)}</text></svg>"


def _run(found: Profile) -> Iterator[str]:
    if not found.waits:
        return
    each = {"compiled step": found.median, **{name: wait.each_step for name, wait in found.waits.items()}}
    yield "<h2>A step of the run</h2>"
    often = {name: f"once in {wait.every} steps" for name, wait in found.waits.items() if wait.every > 1}
    yield from _bars(each, seconds_text, often)


def _memory(found: Profile) -> Iterator[str]:
    memory = found.memory
    if memory is None:
        return
    limit = "" if memory.limit is None else f" of {size_text(memory.limit)}: {share_text(memory.whole / memory.limit)}"
    yield f"<h2>Memory of a device</h2>\n<p>{size_text(memory.whole)}{limit}, by XLA.</p>"
    yield from _bars(memory.parts, lambda size: size_text(round(size)))
    if memory.predicted:
        whole = sum(memory.predicted.values())
        yield f"<p>The planner predicts {size_text(whole)}: "
        yield ", ".join(f"{html.escape(name)} {size_text(size)}" for name, size in memory.predicted.items()) + ".</p>"


def _communication(found: Profile) -> Iterator[str]:
    if found.communication is None or found.devices == 1:
        return
    yield "<h2>Communication of a device in a step</h2>"
    head = ("mesh axes", "collective", "devices", "times", "sends")
    rows = [
        (" x ".join(row.axes), row.kind, str(row.devices), f"{row.bound} {row.times:,}".strip(), size_text(row.sent))
        for row in found.communication.rows
    ]
    yield from _table(head, rows, numbers=3)
    yield "<p>By dimension of the mesh:</p>"
    yield from _bars(found.communication_by_dimension(), lambda size: size_text(round(size)))


def _time(found: Profile) -> Iterator[str]:
    if not found.operations:
        return
    yield "<h2>Time of operations</h2>\n<p>Added up over devices, in a step of those that were traced.</p>"
    passes = found.time_by("during")
    yield from _bars({name: passes[name] for name in PASSES if name in passes}, seconds_text)
    yield "<p>By what they do:</p>"
    yield from _bars(found.time_by("kind"), seconds_text)


def _modules(found: Profile) -> Iterator[str]:
    times = found.time_by("place")
    if not times:
        return
    yield "<h2>Time by module</h2>"
    listed = dict(list(times.items())[:MODULES])
    yield from _bars(listed, seconds_text, whole=sum(times.values()))
    if len(times) > MODULES:
        yield f"<p>{len(times) - MODULES} others take {seconds_text(sum(times.values()) - sum(listed.values()))}.</p>"


def _operations(found: Profile) -> Iterator[str]:
    by_name: dict[str, list[Operation]] = {}
    for one in found.operations:
        by_name.setdefault(one.name, []).append(one)
    if not by_name:
        return
    dearest = sorted(by_name.values(), key=lambda some: -sum(one.seconds for one in some))
    yield f"<h2>Operations</h2>\n<p>The {min(OPERATIONS, len(dearest))} of {len(dearest)} that take the most time.</p>"
    whole = sum(one.seconds for one in found.operations)
    rows = []
    for some in dearest[:OPERATIONS]:
        one, seconds = some[0], sum(each.seconds for each in some)
        times = f"{sum(each.times for each in some):,.0f}"
        rows.append(
            (one.name, one.kind, one.place, one.during, times, seconds_text(seconds), share_text(seconds / whole))
        )
    yield from _table(("operation", "what it does", "module", "pass", "times", "a step", "share"), rows, numbers=3)


def _foot(found: Profile) -> Iterator[str]:
    versions = f"artifex {artifex.__version__}, jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}"
    compiling = f"; compiled in {seconds_text(found.compile_seconds)}" if found.compile_seconds else ""
    yield f"<h2>Made by</h2>\n<p>{versions}{compiling}</p>"


def _bars(
    values: Mapping[str, float], text: object, notes: Mapping[str, str] | None = None, whole: float | None = None
) -> Iterator[str]:
    """A table of names, figures, shares and bars."""
    assert callable(text)
    whole, most = whole or sum(values.values()) or 1.0, max(values.values(), default=0.0) or 1.0
    yield "<table>"
    for name, value in values.items():
        said = html.escape(str(text(value)))
        note = f" <span>({html.escape(notes[name])})</span>" if notes and name in notes else ""
        yield (
            f'<tr><td class="name long">{html.escape(name)}{note}</td><td class="number">{said}</td>'
            f'<td class="number">{share_text(value / whole)}</td>'
            f'<td class="bar"><i style="width:{100 * value / most:.1f}%"></i></td></tr>'
        )
    yield "</table>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> Iterator[str]:
    """A table, the last columns of which are numbers."""
    kinds = ['class="name"'] * (len(head) - numbers) + ['class="number"'] * numbers
    kinds = [kind.replace("name", "name long") if of in LONG else kind for kind, of in zip(kinds, head, strict=True)]
    cells = "".join(
        f"<th{' class=number' if 'number' in kind else ''}>{html.escape(text)}</th>"
        for kind, text in zip(kinds, head, strict=True)
    )
    yield f"<table>\n<tr>{cells}</tr>"
    for row in rows:
        cells = "".join(f"<td {kind}>{html.escape(text)}</td>" for kind, text in zip(kinds, row, strict=True))
        yield f"<tr>{cells}</tr>"
    yield "</table>"
