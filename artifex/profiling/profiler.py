"""Measuring a step: a context in which it is run, timed, traced and read."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from artifex.profiling import scopes, trace
from artifex.profiling.classes import class_of
from artifex.profiling.result import Memory, Operation, Profile, Wait
from artifex.scaling.axes import mesh_sizes
from artifex.scaling.communication import Communication, communication
from artifex.scaling.hlo import Program
from artifex.scaling.peak import Peak

if TYPE_CHECKING:
    from artifex.training.loop import Run
    from artifex.training.memory import CompiledStep

Item = TypeVar("Item")
WARM_UP, TRACED = 1, 2


def profile(
    what: Callable[..., Any] | Run | CompiledStep,
    *,
    profile_compute: bool = True,
    profile_communication: bool = True,
    profile_memory: bool = True,
    per_step: int | None = None,
    noun: str = "rows",
    model_flops: float | None = None,
    peak: Peak | None = None,
    name: str = "step",
) -> Profiler:
    """A context in which a step is measured: `with profile(step) as prof:`, then `prof.step(...)` in place of `step`.

    `what`: a function of `jax.jit`, what it was compiled to, or the step or the `Run` of a training run, of which model
    FLOPs, throughput and memory by part are known. A run is taken on by `prof.train(steps)`, which uses its state up
    and saves nothing. `profile_compute` traces two steps, `profile_communication` and `profile_memory` read the
    compiled program. `per_step` of `noun` ("tokens") make a throughput, `model_flops`, of a step and all devices, and
    `peak` a utilisation. Raises `TypeError` for a function that is not jitted.
    """
    wanted = {"compute": profile_compute, "communication": profile_communication, "memory": profile_memory}
    given = {"per_step": per_step, "noun": noun, "model_flops": model_flops, "peak": peak, "name": name}
    if hasattr(what, "blue"):
        from artifex.profiling.of_run import profiler_of

        return profiler_of(what, wanted, given)
    if not (hasattr(what, "lower") or hasattr(what, "as_text")):
        raise TypeError(f"{what!r} is no compiled step; give a function of jax.jit, or a run")
    return Profiler(what, wanted, **given)


class Profiler:
    """Measures the calls of `step`, all of them; the first is not timed, two more are traced."""

    def __init__(
        self,
        what: Any,
        wanted: dict[str, bool],
        *,
        per_step: int | None = None,
        noun: str = "rows",
        model_flops: float | None = None,
        peak: Peak | None = None,
        name: str = "step",
    ) -> None:
        self.what, self.wanted, self.name = what, wanted, name
        self.rate, self.flops, self.peak = (noun, per_step), model_flops, peak
        self.compiled: Any = None
        self.mesh: Mesh | None = None
        self.calls, self.times, self.traced_times, self.compile_seconds = 0, [], [], 0.0
        self.waits: dict[str, Wait] = {}
        self.folder = contextlib.ExitStack()
        self.at: str | None = None
        self.tracing = False
        self.found: Profile | None = None

    def __enter__(self) -> Profiler:
        self.at = self.folder.enter_context(tempfile.TemporaryDirectory(prefix="artifex-profile-"))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self.folder:
            self._end_trace()
            if error is None:
                self.found = self._read()
        self.at = None

    def step(self, *args: Any, **named: Any) -> Any:
        """What the step makes of its arguments, once it is there. Compiles it where it is called first."""
        if self.at is None:
            raise RuntimeError("step is called outside of its profile; call it inside of `with profile(...) as prof:`")
        if self.compiled is None:
            self._compile(args, named)
        assert self.compiled is not None
        traced = self.wanted["compute"] and WARM_UP <= self.calls < WARM_UP + TRACED
        if traced and not self.tracing:
            self._begin_trace()
        began = time.perf_counter()
        made = jax.block_until_ready(self.compiled(*args, **named))
        took = time.perf_counter() - began
        self.calls += 1
        if self.calls > WARM_UP:
            (self.traced_times if traced else self.times).append(took)
        if self.calls == WARM_UP + TRACED:
            self._end_trace()
        return made

    def data(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; the time that the loop waits for them is measured."""
        batches = iter(batches)
        while True:
            with self.waiting("data"):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @contextlib.contextmanager
    def waiting(self, what: str, every: int = 1) -> Iterator[None]:
        """What is done within it counts as `what`, beside the steps: "data", "checkpoint", once in so many steps."""
        began = time.perf_counter()
        yield
        have = self.waits.get(what, Wait(0.0, 0, every))
        if what != "data" or self.calls >= WARM_UP:  # the first batch starts what reads them
            self.waits[what] = Wait(have.seconds + time.perf_counter() - began, have.times + 1, every)

    @property
    def result(self) -> Profile:
        """What was found. Raises `RuntimeError` inside of the context, where it is not known yet."""
        if self.found is None:
            raise RuntimeError("the profile is not ended; read it after the `with` block")
        return self.found

    def summary(self) -> str:
        """`Profile.summary`."""
        return self.result.summary()

    def communication_by_dimension(self) -> dict[str, float]:
        """`Profile.communication_by_dimension`."""
        return self.result.communication_by_dimension()

    def communication_graph(self) -> dict[tuple[int, int], float]:
        """`Profile.communication_graph`."""
        return self.result.communication_graph()

    def device_utilization_map(self) -> dict[int, dict[str, float]]:
        """`Profile.device_utilization_map`."""
        return self.result.device_utilization_map()

    def save(self, folder: str | Path) -> list[Path]:
        """`Profile.save`."""
        return self.result.save(folder)

    def train(self, steps: int) -> None:
        """Take a run on by so many steps, with its own data. Raises `TypeError` where it was given no run."""
        raise TypeError("train is for the profile of a run; call step here")

    def _compile(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        leaves = jax.tree.leaves((args, named))
        placed = [leaf.sharding for leaf in leaves if isinstance(getattr(leaf, "sharding", None), NamedSharding)]
        self.mesh = placed[0].mesh if placed else None
        began = time.perf_counter()
        self.compiled = self.what if hasattr(self.what, "as_text") else self.what.lower(*args, **named).compile()
        self.compile_seconds = time.perf_counter() - began

    def _begin_trace(self) -> None:
        assert self.at is not None
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(self.at, profiler_options=options)
        self.tracing = True

    def _end_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    def _read(self) -> Profile:
        """Everything that was asked for, of what ran."""
        times = self.times or self.traced_times
        if not times:
            raise ValueError(
                f"the profile of {self.name!r} saw {self.calls} steps, of which the first is not timed; run some more"
            )
        text = self.compiled.as_text() if self.wanted["communication"] or self.traced_times else None
        program = Program.of(text) if text else None
        devices = jax.devices() if self.mesh is None else list(self.mesh.devices.flat)
        sizes = {} if self.mesh is None else dict(mesh_sizes(self.mesh))
        return Profile(
            name=self.name,
            device=devices[0].device_kind,
            mesh=sizes,
            devices=1 if self.mesh is None else len(devices),
            times=tuple(times),
            while_traced=not self.times,
            compile_seconds=self.compile_seconds,
            noun=self.rate[0],
            per_step=self.rate[1],
            model_flops=self.flops,
            peak=None if self.peak is None else self.peak.flops,
            peak_source="" if self.peak is None else self.peak.source,
            memory=self.memory() if self.wanted["memory"] else None,
            communication=self.sends(text) if self.wanted["communication"] else None,
            operations=self._operations(program),
            waits=dict(self.waits),
        )

    def memory(self) -> Memory | None:
        """What the step takes of a device, as XLA has it; None where the backend does not say."""
        used = self.compiled.memory_analysis()
        if used is None:
            return None
        parts = {"arguments": used.argument_size_in_bytes}
        parts["results"] = used.output_size_in_bytes - used.alias_size_in_bytes
        return Memory(parts, used.temp_size_in_bytes)

    def sends(self, text: str | None) -> Communication | None:
        """What a device sends in a step, by mesh axis and collective; None where nothing says."""
        if self.mesh is None:
            return Communication(())
        return communication(text, self.mesh) if text else None

    def _operations(self, program: Program | None) -> tuple[Operation, ...]:
        """What the traced steps spent their time on, by device and operation; a step's share."""
        if not self.traced_times or program is None or self.at is None:
            return ()
        known = {name: one for inside in program.computations.values() for name, one in inside.items()}
        loops = {name for name, one in known.items() if one.opcode in trace.CONTAINERS}
        where, steps = scopes.places(program), len(self.traced_times)
        spent: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for event in trace.read(self.at, loops):
            if event.operation in known:
                spent.setdefault((event.device, event.operation), []).append((event.begin, event.end))
        return tuple(
            Operation(
                device=device,
                name=name,
                opcode=known[name].opcode,
                place=where[name].path,
                during=where[name].during,
                times=len(spans) / steps,
                seconds=sum(end - begin for begin, end in spans) / steps,
                kind=class_of(program, known[name]),
            )
            for (device, name), spans in sorted(spent.items())
        )
