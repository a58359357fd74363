"""Whether a run fits a machine that is not there: its step compiled for it, in a process of its own with a time limit.

XLA can abort the process that it compiles in, and no `except` catches that: an abort, a refusal and a time-out are
answers like any other. What is known by then is part of the answer. Imports no JAX in the process that asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.config import Config
from artifex.scaling.targets import GiB, Target

if TYPE_CHECKING:
    from artifex.training.memory import CompiledStep
    from artifex.training.state import Blueprint

CHILD = "from artifex.training.for_target import child; child()"
FOUND = ("layout", "machine", "flops", "memory", "program", "took", "verdict", "remedy")  # in the order of the answer
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the process said, and whether the run fits; False too where that did not turn out. `figures`: `bytes` of a
    device in all, `sent` bytes by mesh axes, `compiler`, as far as they were found; `verdict` in words."""

    text: str
    fits: bool
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verdict: str = ""


def ask(config: Config, target: Target, seconds: float, *, remedy: bool = True) -> Answer:
    """Compile the step of `config` for `target`, for at most so many seconds; with `remedy` look for settings that fit
    where it does not. Raises `ValueError` where the settings do
    not fit the number of its devices, and `ImportError` where its compiler is missing."""
    target.check_compiler()
    request = json.dumps({"config": config.to_dict(), "target": target.name, "remedy": remedy})
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+", encoding="utf-8") as log:
        said = Path(folder) / "said"
        said.touch()
        command, env = [sys.executable, "-c", CHILD, str(said), str(os.getpid())], os.environ | target.environment()
        # a session of its own, so that whatever its compiler starts ends with it
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, text=True, start_new_session=True
        )
        try:
            process.communicate(request, timeout=seconds)
            end = "" if process.returncode == 0 else f"the compiler ended its process{_why(process.returncode)}"
        except subprocess.TimeoutExpired:
            end = f"not done within {seconds:g} s; --time-limit allows more"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = _parts(said.read_text(encoding="utf-8").splitlines())
        log.seek(0)
        last = [line.strip() for line in log.read().splitlines() if line.strip()][-1:]
    if "error" in found:
        raise ValueError(found["error"])
    if process.returncode == 1:  # no answer but a mistake of ours
        raise RuntimeError(f"the process that compiles for {target.name} failed: {last}")
    if end and "verdict" not in found:
        found["verdict"] = f"no answer: {end}" + (f" ({last[0][:300]})" if last and "ended" in end else "")
    elif end:
        found["remedy"] = f"settings that fit were looked for: {end}"
    text = "\n".join(str(found[part]) for part in FOUND if part in found)
    return Answer(text, bool(found.get("fits")), found.get("figures", {}), str(found.get("verdict", "")))


def child() -> None:
    """The process that compiles: reads configuration and target from its input, and writes what it finds to the file
    that it is given, a JSON line each, as soon as it is known."""
    threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
    asked = json.load(sys.stdin)
    with Path(sys.argv[1]).open("a", encoding="utf-8") as file:

        def say(**parts: Any) -> None:
            print(json.dumps(parts), file=file, flush=True)

        try:
            examine(Config.from_dict(asked["config"]), Target.parse(asked["target"]), say, remedy=asked["remedy"])
        except (ValueError, ImportError, MemoryError) as error:
            say(error=str(error))


def end_with(asking: int) -> None:
    """End this process, and what it started, when the one that asks has ended, however that was: by a signal that it
    could not answer it left a compiler behind."""
    while os.getppid() == asking:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def examine(config: Config, target: Target, say: Callable[..., None], *, remedy: bool = True) -> None:
    """Compile the step of `config` for `target` and `say` what it takes: first what is known without compiling."""
    import jax

    from artifex.models.attention import recording
    from artifex.scaling.placement import size_text
    from artifex.training.memory import (
        CompiledStep,
        check_state,
        communication_table,
        compile_step,
        device_bytes,
        placed_batch,
        table,
        what_fits,
    )
    from artifex.training.state import blueprint, planned
    from artifex.training.step import make_step
    from artifex.training.task import batch_shapes

    devices = target.devices()
    plan = planned(config, len(devices))
    blue = blueprint(config, plan, plan.make_mesh(devices))
    have, shapes = target.memory or device_bytes(), batch_shapes(config)
    say(layout=_layout(blue), machine="\n".join([_machine(target, have), *blue.collectives.lines]))
    say(memory="\n".join(["memory per device, by the sizes of its arrays:", *state_table(blue, shapes, have)]))
    if target.chip is not None:  # what a CPU simulates is asked for the figures
        try:
            check_state(blue, have)
        except MemoryError as error:
            say(verdict=f"does not fit: {str(error).removeprefix('out of memory: ')}")
            return
    start = time.perf_counter()
    with recording() as attention:
        traced = make_step(blue).trace(blue.state, placed_batch(blue, shapes))
        lowered = traced.lower()
    lowering, start = time.perf_counter() - start, time.perf_counter()
    say(flops=flops_line(traced.jaxpr, target) + (f"; attention: {', '.join(sorted(attention))}" if attention else ""))
    unknown = CompiledStep(make_step(blue), blue, shapes, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            step = compile_step(blue, shapes, lowered=lowered, options=dump_options(target, folder))
        except MemoryError as error:
            say(verdict=refused(error, target), took=_took(target, lowering, time.perf_counter() - start))
            if remedy:
                say(remedy=what_fits(unknown, have))
            return
        except jax.errors.JaxRuntimeError as error:
            say(verdict=f"does not compile: {str(error).splitlines()[0]}")
            return
        took = _took(target, lowering, time.perf_counter() - start)
        say(memory="\n".join(["memory per device:", *table(step, have)]), took=took)
        text = program_text(step.compiled, target, folder)
        if sends := communication_table(step, text):
            say(program="\n".join(sends))
        say(figures=_figures(step, text, target))
    if have is None or step.whole <= have:
        share = "" if have is None else f" of {size_text(have)}, {step.whole / have:.0%}"
        say(verdict=f"fits: {size_text(step.whole)}{share}" + _simulated(target), fits=True)
        return
    short = f"needs {size_text(step.whole)}, a device has {size_text(have)}"
    say(verdict=f"does not fit: {short}" + _simulated(target))
    if remedy:
        say(remedy=what_fits(step, have))


def _figures(step: CompiledStep, text: str, target: Target) -> dict[str, Any]:
    sends = step.sends(text)
    sent: dict[str, float] = {}
    for row in sends.rows if sends is not None else ():
        sent["+".join(row.axes)] = sent.get("+".join(row.axes), 0.0) + row.sent
    return {"bytes": step.whole, "sent": sent, "compiler": target.compiler()}


def state_table(blue: Blueprint, shapes: Any, have: int | None) -> list[str]:
    """State and batch alone, a line each: all that is known where the compiler does not come to an end."""
    from artifex.scaling.placement import bytes_on_device, size_text
    from artifex.training.memory import placed_batch

    lines = [f"  state             {size_text(bytes_on_device(blue.state))}"]
    lines.append(f"  batch             {size_text(bytes_on_device(placed_batch(blue, shapes)))}")
    return lines if have is None else [*lines, f"  of                {size_text(have)}"]


def flops_line(jaxpr: Any, target: Target) -> str:
    """FLOPs of a device, as if all had as much to do."""
    from artifex.scaling.flops import flops

    count = flops(jaxpr)
    open_loops = f", {count.open_loops} loops of unknown length counted once" if count.open_loops else ""
    each = count.total / target.device_count
    return f"FLOPs per device and step: {each:.3g} (matrix products and convolutions{open_loops})"


def dump_options(target: Target, folder: str) -> dict[str, str] | None:
    """The compiler's options, by which it writes down on the way what it cannot say at the end: its program."""
    return None if target.chip is None or target.chip.text else {"xla_dump_to": folder}


def program_text(compiled: Any, target: Target, folder: str) -> str:
    """The program of a device, as XLA writes it; empty where it did not."""
    if dump_options(target, folder) is None:
        return compiled.as_text()
    written = sorted(Path(folder).glob("*jit_step*.after_optimizations.txt"))
    return written[-1].read_text(encoding="utf-8") if written else ""


def refused(error: MemoryError, target: Target) -> str:
    """What a compiler says that finds no room."""
    figures = re.findall(r"([\d.]+)([KMGT])\)? (?:of [\d.]+[KMGT] hbm|exceeds available)", str(error))
    if not figures:
        return f"does not fit: {error}"
    number, unit = figures[0]
    assert target.memory is not None
    need = float(number) * _SIZES[unit] / GiB
    return f"does not fit: needs {need:.2f} GiB, a device has {target.memory / GiB:.2f}"


def _layout(blue: Blueprint) -> str:
    from flax import nnx

    from artifex.scaling.placement import explain

    abstract = nnx.eval_shape(lambda: blue.config.model.spec().build(nnx.Rngs(0)))
    return f"{explain(abstract, blue.plan, blue.plan.sizes)}\n\nplan: {blue.plan}"


def _machine(target: Target, have: int | None) -> str:
    count = f"target: {target.name}, {target.device_count} devices"
    if target.chip is None:
        share = "" if have is None else f", each an equal share of this machine's memory, {have / GiB:.2f} GiB"
        return f"{count} that a CPU simulates{share}"
    assert have is not None
    return f"{count} of {have / GiB:.2f} GiB ({target.memory_source})"


def _simulated(target: Target) -> str:
    if target.chip is not None:
        return ""
    return " (an estimate: the program is that of CPUs, which holds and sends other arrays than that of accelerators)"


def _took(target: Target, lowering: float, compiling: float) -> str:
    return f"traced and lowered in {lowering:.1f} s, compiled in {compiling:.1f} s ({target.compiler()})"


def _why(code: int) -> str:
    return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"


def _parts(lines: list[str]) -> dict[str, Any]:
    """What was said; a line that a process did not finish is left out."""
    found: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found |= json.loads(line)
    return found
