"""A saved run opened again, in one call: its model and its state, under any mesh and any strategy.

restored = artifex.restore("runs/quickstart", mesh={"fsdp": 4, "tensor": 2})
restored.state.params  # every array in its shards
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from artifex.config import Config
from artifex.models.weights import from_pretrained, holds_weights
from artifex.models.weights_config import spec_of
from artifex.scaling import manifest, placement, processes
from artifex.scaling.axes import Rules
from artifex.scaling.checkpoints import CheckpointError, Checkpoints
from artifex.scaling.execution import Execution
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.plan import Plan
from artifex.scaling.strategies import combine, strategies_for
from artifex.training.freezing import join
from artifex.training.runner import Result, Runner
from artifex.training.state import Blueprint, TrainState, blueprint


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run at one of its steps. `model` and `state` hold the same arrays, so a training step that takes the state's
    buffers takes the model's as well."""

    model: Any  # a live module of the weights that validation and samples use, or of the raw ones
    state: TrainState
    config: Config
    step: int
    mesh: Mesh
    blueprint: Blueprint

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(model, *args)` by the mesh and the strategy it was restored to, in the run's compute dtype:

        `restored.run(lambda model: model.sample(key, count=64))`. A method of `model` called alone is not laid out:
        every device would do all of its work.
        """
        _, *trees = nnx.split(self.model, nnx.Param, ...)
        return self.blueprint.runner(*map(nnx.to_pure_dict, trees)).run(function, *args)


def restore(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    strategy: Any = None,
    average: bool = True,
) -> Restored:
    """The model and the training state of a run, every array bit-equal to what was saved and straight in its shards.

    `path` is the folder of a run, its `checkpoints`, or one step of them, which alone is enough. `step` None is the
    newest step that is whole. `mesh` is a mesh or its sizes, `{"fsdp": 4, "tensor": 2}`. `strategy` is a strategy, a
    mapping of several by name, `Rules` or a `Plan`; None: what the axes of the mesh are named after, as in training.
    Without a mesh, a `Plan` makes its own, a single strategy takes all devices, and without either everything goes to
    the first device. The model has the running mean of the weights where the run keeps one; `average=False`: the raw
    parameters.

    Raises `FileNotFoundError` and `ValueError` where `path` holds no such step or the mesh does not fit, and
    `CheckpointError` where files are damaged.
    """
    saved = find_step(path, step)
    blue = _blueprint(saved, mesh, strategy)
    with Checkpoints(saved.folder) as checkpoints:
        state = checkpoints.restore(saved.step, blue.state)
    weights = (state.weights, state.weights_buffers) if average else (state.params, state.buffers)
    model = nnx.merge(blue.graphdef, *weights)
    return Restored(model, state, saved.config, saved.step, blue.mesh, blue)


def restore_model(
    path: str | os.PathLike[str], step: int | None = None, *, mesh: Mapping[str, int] | None = None
) -> Runner:
    """The model alone, with the weights that validation and samples use, on one device or on the `mesh` of such sizes.
    Raises as `restore`."""
    saved = find_step(path, step)
    blue = _blueprint(saved, mesh, None)
    return blue.runner(*_weights(saved, blue, saved.weights))


def restore_weights(
    path: str | os.PathLike[str], step: int | None = None, *, average: bool = True
) -> tuple[SavedStep, dict[str, Any]]:
    """The weights alone, bit-equal to what was saved, in one nested dict of parameters and buffers on one device: what
    `artifex.models.weights.save_pretrained` writes. Raises as `restore`."""
    saved = find_step(path, step)
    blue = _blueprint(saved, None, None)
    weights, buffers = _weights(saved, blue, saved.weights if average else "params")
    return saved, nnx.to_pure_dict(nnx.state(nnx.merge(blue.graphdef, weights, buffers)))


def _weights(saved: SavedStep, blue: Blueprint, part: str) -> tuple[Any, Any]:
    """The parameters at `part` of the saved state, and the buffers that go with them."""
    with Checkpoints(saved.folder) as checkpoints:
        weights = checkpoints.restore(saved.step, blue.state.weights, under=part)
        buffers = blue.state.buffers and checkpoints.restore(saved.step, blue.state.buffers, under="buffers")
        if blue.state.ema_buffers and part == saved.weights:
            buffers = join(buffers, checkpoints.restore(saved.step, blue.state.ema_buffers, under="ema_buffers"))
    return weights, buffers


def pretrained_model(path: str | Path, *, mesh: Mapping[str, int] | None = None) -> Runner:
    """The model of a folder of weights, in float32, on one device or on the `mesh` of such sizes, spread by what its
    axes are named after. Raises as `artifex.models.weights.from_pretrained`."""
    if mesh is None:
        return Runner(from_pretrained(path), Execution())
    plan = Plan(tuple(mesh.values()), tuple(mesh), combine(strategies_for(tuple(mesh))))
    made = plan.make_mesh()

    def where(state: nnx.State) -> Any:
        place = functools.partial(placement.layout, table=plan.running.params, rules=plan.running, mesh=made)
        shapes, names = placement.shapes_of(state), placement.names_of(state)
        return jax.tree.map(lambda leaf, axes: place(leaf.shape, axes), shapes, names)

    return Runner(from_pretrained(path, shardings=where), plan.execution(made, rules=plan.running))


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """A step of a run on disk: the folder of the checkpoints it is one of, and the configuration it was saved with."""

    folder: Path
    step: int
    config: Config

    @property
    def weights(self) -> str:
        """Where in the saved state the weights are that validation and samples use."""
        return "params" if self.config.training.ema_decay is None else "ema"


def find_step(path: str | os.PathLike[str], step: int | None = None) -> SavedStep:
    """The step that `restore` reads of `path`. Reads no array but to verify it, and changes nothing.

    A newer step that is damaged is named on stderr.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; expected a run, its checkpoints, or one step of them")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (path / manifest.NAME).is_file():
        folder, step = path.absolute().parent, _only_step(path, step)
    with Checkpoints(folder) as checkpoints:
        if step is None:
            step, skipped = checkpoints.newest_restorable()
            if step is None and skipped:
                weights = folder.parent / "weights"
                instead = f"; {weights} has the weights alone" if holds_weights(weights) else ""
                raise CheckpointError(f"no step of {path} can be restored: {'; '.join(skipped)}{instead}")
            if step is None:
                raise FileNotFoundError(f"{path} holds no checkpoint yet; train it further first")
            for problem in skipped if processes.is_first() else ():
                print(f"{problem}; step {step} is taken", file=sys.stderr)
        elif step not in checkpoints.steps():
            raise ValueError(f"{path} holds no checkpoint of step {step}; it has {checkpoints.steps()}")
        return SavedStep(folder, step, _config_of(folder, step, checkpoints.metadata(step)))


def _only_step(path: Path, step: int | None) -> int:
    saved = manifest.read(path)["step"]
    if path.absolute().name != str(saved):
        raise ValueError(f"{path} holds step {saved}; a step's folder has its number as name, rename it to {saved}")
    if step not in (None, saved):
        raise ValueError(f"{path} holds step {saved} alone, so there is no step {step}; give the run folder instead")
    return saved


def _config_of(folder: Path, step: int, metadata: Mapping[str, Any]) -> Config:
    """The configuration in a checkpoint's metadata; of one written before it was kept there, the run's."""
    if "config" not in metadata:
        file = folder.parent / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"step {step} in {folder} keeps no configuration and there is no {file}; restore it"
            )
        return Config.from_file(file)
    config = Config.from_dict(metadata["config"], source=f"step {step} in {folder}")
    spec, saved = config.model.spec(), spec_of(metadata["model"])
    if spec != saved:
        raise ValueError(
            f"step {step} in {folder} is of a {config.model.name!r} whose preset had other values: {saved}; now it has "
            f"{spec}"
        )
    return config


def _blueprint(saved: SavedStep, mesh: Mesh | Mapping[str, int] | None, strategy: Any) -> Blueprint:
    plan = strategy if isinstance(strategy, Plan) else None
    if mesh is None:
        devices = None
        sizes = plan.sizes if plan else {}
        if plan is None and strategy is not None:
            sizes = {_axis_of(strategy): jax.device_count()}
        if not sizes:
            sizes, devices = {"data": 1}, jax.devices()[:1]
        mesh = create_device_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)
    elif not isinstance(mesh, Mesh):
        mesh = create_device_mesh(tuple(mesh.values()), tuple(mesh))
    sizes = dict(mesh.shape)
    if plan is None:
        plan = Plan(tuple(sizes.values()), tuple(sizes), _rules(strategy, mesh))
    elif plan.sizes != sizes:
        raise ValueError(f"the plan is for mesh {plan.sizes}, the mesh given is {sizes}; leave out one of them")
    return blueprint(saved.config, plan, mesh)


def _axis_of(strategy: Any) -> str:
    axis = getattr(strategy, "axis_name", None)
    if axis is None:
        raise ValueError(f"strategy {strategy!r} needs a mesh; give mesh=, such as {{'data': {jax.device_count()}}}")
    return axis


def _rules(strategy: Any, mesh: Mesh) -> Rules:
    if strategy is None:
        return combine(strategies_for(mesh.axis_names))
    if isinstance(strategy, Rules):
        return strategy
    if isinstance(strategy, Mapping):
        return combine({name: one.on(mesh) for name, one in strategy.items()})
    strategy = strategy.on(mesh) if hasattr(strategy, "on") else strategy
    return strategy.rules
