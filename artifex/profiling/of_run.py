"""The profile of a training run: its own data, what its state takes by part, and what the planner had predicted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax

from artifex.profiling.kept import kept_bytes
from artifex.profiling.profiler import Profiler
from artifex.profiling.result import Memory
from artifex.scaling import peak as peaks
from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.communication import Communication
from artifex.scaling.placement import bytes_on_device
from artifex.training.memory import CompiledStep, device_bytes, fitting_step, placed_batch
from artifex.training.model_flops import model_flops


def profiler_of(what: Any, wanted: dict[str, bool], given: dict[str, Any]) -> Profiler:
    """Of a run, or of the compiled step of one."""
    return StepProfiler(what, wanted, given) if isinstance(what, CompiledStep) else RunProfiler(what, wanted, given)


class StepProfiler(Profiler):
    """The compiled step of a run: calls are those of `CompiledStep`."""

    def __init__(self, step: CompiledStep, wanted: dict[str, bool], given: dict[str, Any]) -> None:
        config = step.blue.config
        noun, per_row = ("tokens", config.data.sequence_length) if config.model.reads == "text" else ("images", 1)
        known: dict[str, Any] = {"noun": noun, "per_step": config.training.batch_size * per_row}
        known["name"] = config.model.name if given["name"] == "step" else given["name"]
        devices = list(step.blue.mesh.devices.flat)
        known["model_flops"] = given["model_flops"] or model_flops(config)
        known["peak"] = given["peak"] or peaks.peak(devices, config.training.compute_dtype, measured=True)
        super().__init__(step.compiled, wanted, **(given | known))
        self.of_run, self.mesh = step, step.blue.mesh

    def _compile(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.compiled = self.what

    def memory(self) -> Memory | None:
        """By part, as the run's state and batch have it, and the step's own; with what the planner predicts."""
        return memory_of(self.of_run)

    def sends(self, text: str | None) -> Communication | None:
        """By mesh axis and collective; of a pipeline by the turns that it takes."""
        return self.of_run.sends(text)


class RunProfiler(StepProfiler):
    """A run that was opened and has steps left."""

    def __init__(self, run: Any, wanted: dict[str, bool], given: dict[str, Any]) -> None:
        batches = run.task.batches(run.start, run.blue.part)
        shapes = {name: (x.shape, x.dtype) for name, x in run.blue.placed(next(batches)).items()}
        batches.close()
        super().__init__(fitting_step(run.blue, shapes, device_bytes()), wanted, given)
        self.run, self.state, self.done = run, run.state, run.start

    def train(self, steps: int) -> None:
        """Take the run on by so many steps, with its own data; then save once, aside, to see how long that holds it."""
        batches = self.run.task.batches(self.done, self.run.blue.part)
        for _ in range(steps):
            with self.waiting("data"):
                batch = self.run.blue.placed(next(batches))
            self.state, _ = self.step(self.state, batch)
            self.done += 1
        batches.close()
        if every := self.run.config.checkpoint.every:
            with tempfile.TemporaryDirectory(prefix="artifex-profile-") as folder:
                checkpoints = Checkpoints(Path(folder) / "checkpoints")
                with self.waiting("checkpoint", every):
                    checkpoints.save(self.done, self.state, {})
                checkpoints.wait()


def memory_of(step: CompiledStep) -> Memory:
    """Bytes of a device by part: of the arguments by their shardings, what is kept between the passes by the trace,
    gradients as the step adds them up, and what XLA needs besides."""
    blue, state = step.blue, step.blue.state
    parts = {"parameters": state.params, "optimizer": state.optimizer, "average": (state.ema, state.ema_buffers)}
    parts |= {"buffers": state.buffers, "batch": placed_batch(blue, step.shapes)}
    held = {name: bytes_on_device(part) for name, part in parts.items() if jax.tree.leaves(part)}
    return Memory(held, step.own, kept_bytes(step), gradient_bytes(step), device_bytes(), predicted(step))


def gradient_bytes(step: CompiledStep) -> int:
    """Bytes of the gradients of what is trained, as they are laid out and added up."""
    blue = step.blue
    trained = blue.split(blue.state.params)[0]
    dtype = blue.config.training.gradient_dtype
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), trained)
    where = blue.gradient_shardings(like)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, where)
    return bytes_on_device(placed)


def predicted(step: CompiledStep) -> dict[str, int]:
    """The planner's prediction for this run on these devices, by part; empty where it cannot look."""
    from artifex.scaling.autodist.config import AutoDistConfig
    from artifex.scaling.autodist.planner import cluster_of, predict
    from artifex.scaling.autodist.spread import Spread
    from artifex.training.planning import RunSubject

    config, count = step.blue.config, step.blue.mesh.size
    how = config.training
    spread = Spread.of_sections(
        config.device, count, remat=how.remat, accumulation=how.gradient_accumulation, rows=how.batch_size
    )
    subject: Any = RunSubject(config)
    found = predict(subject, cluster_of(AutoDistConfig(mesh_col=count)), spread).estimate
    return {**found.held, "the step besides": round(found.own)}
