"""What a training step needs of a device's memory, what the device has, and, by compiling it, what would fit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax

from artifex.scaling.communication import Communication, communication
from artifex.scaling.compiler_log import laid_out_anew
from artifex.scaling.placement import bytes_on_device, size_text
from artifex.training.compile_cache import said
from artifex.training.state import Blueprint, TrainState, blueprint, planned
from artifex.training.step import Batch, Metrics, make_step

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TRIED = 2  # counts of microbatches that are compiled to see whether they fit, each twice the one before
OTHERWISE = "take a smaller model or shorter rows, or divide it over more devices by --device.fsdp"

Shapes = Mapping[str, tuple[tuple[int, ...], Any]]  # of a global batch: name -> shape, dtype


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A training step, compiled for batches of `shapes`, and the bytes it takes of each device."""

    compiled: Any  # `jax.stages.Compiled`, or what is compiled when it is called
    blue: Blueprint
    shapes: Shapes
    own: int  # gradients and activations
    whole: int  # with state and batch; 0 on a backend that does not say
    anew: tuple[str, ...] = ()  # shapes that are laid out anew through all of it on every device

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step, as of `make_step`. Raises `MemoryError` where it finds less memory than there should be."""
        try:
            with explained("out of memory"):
                return self.compiled(state, batch)
        except MemoryError as error:
            have = device_bytes()
            there = "" if have is None else f", which has {size_text(have)}, perhaps with other programs in it"
            less = what_fits(self, int(0.8 * self.whole))
            raise MemoryError(f"{error}: {needs(self)}{there}; {less}") from error

    def sends(self, text: str | None = None) -> Communication | None:
        """What it sends; None where the compiler cannot write its program down, and did not on its way, as `text`."""
        try:
            text = self.compiled.as_text() if text is None else text
        except jax.errors.JaxRuntimeError:  # for the largest slices
            return None
        if not text:
            return None
        return communication(text, self.blue.mesh, self.blue.plan.pipeline and self.blue.plan.pipeline.taken)


def placed_batch(blue: Blueprint, shapes: Shapes) -> Batch:
    """A global batch of such shapes, abstract, where the plan has it."""
    batch = {name: jax.ShapeDtypeStruct(*kind) for name, kind in shapes.items()}
    where = blue.batch_sharding(batch)
    placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in batch.items()}
    return cast(Batch, placed)


def compile_step(blue: Blueprint, shapes: Shapes, *, lowered: Any = None, options: Any = None) -> CompiledStep:
    """Trace and compile the step of a blueprint for such batches; none of its memory is allocated.

    `lowered`: the step where it is traced and lowered already. `options`: the compiler's own.
    Raises `MemoryError` where the compiler finds that it does not fit: a TPU's places all memory.
    """
    lowered = make_step(blue).lower(blue.state, placed_batch(blue, shapes)) if lowered is None else lowered
    with explained("the training step does not compile into a device's memory"), laid_out_anew() as anew:
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if unknown := re.search(r"No such compile option: ('\w+')", str(error)):
                says = f"this XLA has no option {unknown[1]}, which `collectives` sets (jax {jax.__version__})"
                raise ValueError(f"{says}; leave the wish out") from error
            raise
    used, told = compiled.memory_analysis(), said(anew)
    if used is None:
        return CompiledStep(compiled, blue, shapes, 0, 0, told)
    if blue.execution.platform == "tpu":  # whose temporaries are with its arguments in libtpu 0.0.42, not in 0.0.51
        whole = used.peak_memory_in_bytes
        return CompiledStep(compiled, blue, shapes, whole - used.argument_size_in_bytes, whole, told)
    # not `peak_memory_in_bytes`, which leaves out temporaries on a CPU
    whole = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    return CompiledStep(compiled, blue, shapes, used.temp_size_in_bytes, whole, told)


def fitting_step(blue: Blueprint, shapes: Shapes, have: int | None) -> CompiledStep:
    """The compiled step. Raises `MemoryError` where it needs more than the `have` bytes of a device (None: unknown), in
    one line on what it needs, what there is, and which change of settings fits, found by compiling it."""
    try:
        step = compile_step(blue, shapes)
    except MemoryError as error:
        unknown = CompiledStep(make_step(blue), blue, shapes, 0, 0)
        raise MemoryError(f"{error}; {what_fits(unknown, have)}") from error
    if have is not None and step.whole > have:
        raise MemoryError(f"out of memory: {needs(step)}, which has {size_text(have)}; {what_fits(step, have)}")
    return step


def check_state(blue: Blueprint, have: int | None) -> None:
    """Raise `MemoryError` where the state alone is more than the `have` bytes of a device (None: unknown).

    By the sizes of its arrays, so that it costs nothing and comes before anything is allocated.
    """
    need = bytes_on_device(blue.state)
    if have is None or need <= have:
        return
    divided = _changed(blue, {"device.fsdp": -1})
    left = bytes_on_device(divided.state) if divided else need
    remedy = f"--device.fsdp=-1 leaves {size_text(left)} of it on each" if left <= have else OTHERWISE
    raise MemoryError(
        f"out of memory: parameters and optimizer state take {size_text(need)} on each device, which has "
        f"{size_text(have)}; {remedy}"
    )


def device_bytes() -> int | None:
    """What a device has: what its allocator may take; of a CPU an equal share of the machine's memory, or of what this
    process may use of it. None where nothing says."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(name).read_text()))
    return min(limits) // jax.local_device_count()


def needs(step: CompiledStep) -> str:
    """One clause on what the step takes."""
    state, own = size_text(bytes_on_device(step.blue.state)), size_text(step.own)
    return f"the step needs {size_text(step.whole)} on each device ({state} of state, {own} of its own)"


def table(step: CompiledStep, have: int | None) -> list[str]:
    """What a device holds, a line each, and the `have` bytes that it has (None: unknown)."""
    state = step.blue.state
    parts = [("parameters", state.params), ("optimizer state", state.optimizer)]
    parts += [("buffers", state.buffers), ("average", (state.ema, state.ema_buffers))]
    parts += [("batch", placed_batch(step.blue, step.shapes))]
    lines = [f"  {name:<17} {size_text(bytes_on_device(part))}" for name, part in parts if jax.tree.leaves(part)]
    lines.append(f"  the step's own    {size_text(step.own)}  (gradients and activations, by XLA)")
    lines.append(f"  in all            {size_text(step.whole)}")
    return lines if have is None else [*lines, f"  of                {size_text(have)}"]


def communication_table(step: CompiledStep, text: str | None = None) -> list[str]:
    """What a device sends in a step, a line for each axis and kind; nothing on one device. `text`: see `sends`."""
    if step.blue.mesh.size == 1:
        return []
    sends = step.sends(text)
    if sends is None:
        return ["what it sends is not known: the compiler cannot write this program down"]
    lines = [f"  {line}" for line in str(sends).splitlines()]
    lines += [f"  {line}" for line in notes(step)]
    sums = "; a CPU sums where a GPU or a TPU scatters" if step.blue.execution.platform == "cpu" else ""
    return [f"communication per device and step{sums}:", *lines]


def notes(step: CompiledStep) -> list[str]:
    """What the user should know of how it was compiled."""
    if not step.anew:
        return []
    return [f"laid out anew through all of it on every device, which costs time and memory: {', '.join(step.anew)}"]


def what_fits(step: CompiledStep, have: int | None) -> str:
    """A clause that names the first change of settings whose step, compiled, takes at most `have` bytes of a device.

    More microbatches first, for they cost the least time, then remat, then both, then FSDP over the devices that are
    there. Where none is enough, those that were tried are listed.
    """
    tried = []
    for change in _changes(step, have):
        other = _changed(step.blue, change)
        if other is None:
            continue
        typed = " ".join(f"--{key.replace('_', '-')}={value}" for key, value in change.items())
        try:
            need = compile_step(other, step.shapes).whole
        except MemoryError:
            tried.append(f"{typed} needs more as well")
            continue
        if have is None or need <= have:
            return f"{typed} fits: its step, compiled, needs {size_text(need)}"
        tried.append(f"{typed} needs {size_text(need)}")
    return "; ".join([*tried, OTHERWISE])


def _changes(step: CompiledStep, have: int | None) -> Iterator[dict[str, Any]]:
    """Settings that may need less memory, those that cost the least time first."""
    blue, least = step.blue, 2.0
    if step.whole and have is not None:  # what is the step's own is divided by the microbatches, more or less
        room = have - (step.whole - step.own)
        least = max(least, step.own / room) if room > 0 else float("inf")
    rows, counts = blue.config.training.batch_size, []
    count = blue.plan.microbatches * 2
    while rows % count == 0 and len(counts) < TRIED:  # each is twice the one before
        if count >= least * blue.plan.microbatches:
            counts.append(count)
        count *= 2
    parts = [{"training.gradient_accumulation": count} for count in counts]
    remat = [] if blue.plan.remat == "full" else [{"training.remat": "full"}]
    yield from parts
    yield from remat
    if parts and remat:
        yield {**parts[-1], **remat[0]}
    if blue.plan.device_count > 1:
        yield {"device.fsdp": -1}
        for change in remat:
            yield {"device.fsdp": -1, **change}
    if blue.execution.platform != "cpu" and blue.config.training.spill_threshold_mb is None:
        yield {"training.spill_threshold_mb": 0.0}


def _changed(blue: Blueprint, change: Mapping[str, Any]) -> Blueprint | None:
    """The blueprint of a run with some settings changed; None where they do not fit the model, batch or devices, or are
    what the run has."""
    config = blue.config.model_copy(deep=True)
    if "device.fsdp" in change:
        config.device = type(config.device)()
    for key, value in change.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    try:
        plan = planned(config, blue.plan.device_count)
        return (
            None if plan == blue.plan else blueprint(config, plan, plan.make_mesh(blue.mesh.devices.ravel().tolist()))
        )
    except ValueError:
        return None


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn XLA's error about memory, whenever it comes, into a `MemoryError` of one line: `what`, and its first words.

    Other errors pass.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if not re.search("RESOURCE_EXHAUSTED|HbmOom", text):
            raise
        said = text.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
        raise MemoryError(f"{what} ({said})") from error
