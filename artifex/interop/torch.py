"""A plan as PyTorch's DTensor placements, for the tensors of the same model as `transformers` or `diffusers` name them.

    layout = to_dtensor(plan, "llama3.2-1b")
    layout.placements["model.layers.0.mlp.up_proj.weight"]       # of mesh (fsdp, tensor): (Shard(dim=1), Shard(dim=0))
    tensors = layout.distribute(state_dict, layout.device_mesh("cuda"))

The process of rank r holds, byte for byte, what device `mesh.devices.flat[r]` of the plan's mesh does. Needs the extra
`torch`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from artifex import models
from artifex.models.layouts import Entry
from artifex.models.weights_config import chosen_layout
from artifex.scaling.axes import resolve
from artifex.scaling.placement import leaves_with_names, names_of, shapes_of
from artifex.scaling.plan import Plan

Shape = tuple[int, ...]
Atom = tuple[str | None, int]
"""A factor of a dim, which are listed slowest first: the mesh axis that takes it apart, or None, and its size."""

MISSING = "PyTorch is not installed; pip install 'artifex[torch]', the extra that DTensor placements need"


@dataclasses.dataclass(frozen=True)
class DTensorLayout:
    """A device mesh, and where on it each tensor of a state dict lies.

    `placements`: name -> for each mesh dim, in the mesh's order, `Shard`, `Replicate` or `_StridedShard`. The last is
    PyTorch's own for a dim that is not divided into one run of neighbours a device. `shapes` are those of the tensors.
    """

    mesh_shape: Shape
    mesh_dim_names: tuple[str, ...]
    placements: Mapping[str, tuple[Any, ...]]
    shapes: Mapping[str, Shape]

    def device_mesh(self, device_type: str) -> Any:
        """The mesh over all processes, which `torchrun` or `torch.distributed.init_process_group` made; each calls it.
        Raises `RuntimeError`, PyTorch's, where there are not as many."""
        from torch.distributed.device_mesh import init_device_mesh  # pyright: ignore[reportMissingImports]

        return init_device_mesh(device_type, self.mesh_shape, mesh_dim_names=self.mesh_dim_names)

    def distribute(self, state_dict: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
        """Each tensor as a DTensor. Every process gives all tensors whole, mapped from a file for example, and keeps
        its part of them; nothing is sent. Raises `ValueError` for tensors that are unknown or of another shape."""
        from torch.distributed.tensor import distribute_tensor  # pyright: ignore[reportMissingImports]

        for name, tensor in state_dict.items():
            if name not in self.shapes:
                raise ValueError(f"{name} is no tensor of this model; it has {len(self.shapes)}, see `shapes`")
            if tuple(tensor.shape) != self.shapes[name]:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {self.shapes[name]}; give each tensor whole, of "
                    "the configuration that the layout was made for"
                )
        return {
            name: distribute_tensor(tensor, mesh, self.placements[name], src_data_rank=None)
            for name, tensor in state_dict.items()
        }


def to_dtensor(plan: Plan, model: Any, *, layout: str = "huggingface") -> DTensorLayout:
    """Where `plan` puts each tensor of `model` as another library names it in its files.

    `model`: a preset's name, a configuration, or a model, abstract or not. `layout`: as for `save_pretrained`, the
    architecture of `transformers` or `diffusers`, or "huggingface" for the first that fits.

    A tensor that a state dict repeats (a tied head, an embedding in every block) is placed under each name. Raises
    `ImportError` without PyTorch, and `ValueError` where no layout holds the model, or where the plan divides layers or
    experts that are tensors of their own there: such a tensor lies on a part of the mesh, which no DTensor does.
    """
    try:
        from torch.distributed.tensor import Replicate, Shard  # pyright: ignore[reportMissingImports]
        from torch.distributed.tensor.placement_types import _StridedShard  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ImportError(MISSING) from error

    def placement(dim_and_factor: tuple[int, int] | None) -> Any:
        if dim_and_factor is None:
            return Replicate()
        dim, factor = dim_and_factor
        return Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)

    placements, shapes = {}, {}
    for name, dims in _tensors(plan, model, layout):
        shapes[name] = tuple(math.prod(size for _, size in atoms) for atoms in dims)
        placements[name] = tuple(placement(split) for split in _splits(dims, plan.axis_names))
    return DTensorLayout(plan.mesh_shape, plan.axis_names, placements, shapes)


def _tensors(plan: Plan, model: Any, layout: str) -> Iterator[tuple[str, list[list[Atom]]]]:
    """Each tensor of theirs, and the atoms of each of its dims."""
    cfg = models.preset(model) if isinstance(model, str) else getattr(model, "cfg", model)
    chosen, _ = chosen_layout(cfg, layout)
    state = nnx.state(model if isinstance(model, nnx.Module) else nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))))
    ours = {
        path.replace("/", "."): _divided(plan, path, tuple(leaf.shape), names)
        for path, leaf, names in leaves_with_names(shapes_of(state), names_of(state))
    }
    for entry in chosen.entries(cfg):
        count = len(entry.counted)
        for path in entry.paths:
            _check_whole(entry, path, ours[path][:count])
        dims = _theirs(entry, [ours[path][count:] for path in entry.paths])
        lead = [range(size) for ((_, size),) in ours[entry.paths[0]][:count]]
        for at in itertools.product(*lead):
            for name in entry.names(at):
                yield name, dims


def _divided(plan: Plan, path: str, shape: Shape, names: tuple[str, ...]) -> list[list[Atom]]:
    """The atoms of each dim of a parameter of ours: the mesh axes that divide it, and what each device has."""
    rules, sizes, dims = plan.rules.of_path(path), plan.sizes, []
    spec = resolve(names, shape, rules.params, sizes, rules.min_weight_size).spec
    for size, entry in zip(shape, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        ways = math.prod(sizes[axis] for axis in axes)
        dims.append([*((axis, sizes[axis]) for axis in axes), (None, size // ways)])
    return dims


def _check_whole(entry: Entry, path: str, lead: list[list[Atom]]) -> None:
    """Raise `ValueError` where the plan divides dims of which each index is a tensor of theirs."""
    for what, atoms in zip(entry.counted, lead, strict=True):
        if axes := [axis for axis, _ in atoms if axis is not None]:
            raise ValueError(
                f"{path}: the plan divides its {what[1:-1]} over mesh axis {'+'.join(axes)}, and {entry.theirs} is a "
                "tensor for each: no DTensor lies on a part of its mesh; leave that axis out of the plan"
            )


def _theirs(entry: Entry, parts: list[list[list[Atom]]]) -> list[list[Atom]]:
    """The atoms of each dim of a tensor of theirs that holds `parts`, ours without their leading dims."""
    merged = [_merged(entry, dims) for dims in parts]
    turned = merged[0]
    if len(merged) > 1:
        if any(dims != turned for dims in merged[1:]):
            raise ValueError(
                f"{entry.theirs} holds {', '.join(entry.paths)}, which the plan divides differently: {merged}; no "
                "DTensor placement says so"
            )
        turned = [*turned[:-1], [(None, len(merged)), *turned[-1]]]
    if entry.transpose is None:
        return turned
    return [turned[entry.transpose.index(dim)] for dim in range(len(turned))]


def _merged(entry: Entry, dims: list[list[Atom]]) -> list[list[Atom]]:
    """`dims` with neighbours put together as the entry says."""
    rest = iter(dims)
    return [
        [atom for dim in itertools.islice(rest, count) for atom in dim] for count in entry.merge or (1,) * len(dims)
    ]


def _splits(dims: list[list[Atom]], axis_names: tuple[str, ...]) -> Iterator[tuple[int, int] | None]:
    """For each mesh axis the dim it divides, and the size of what is slower in that dim; None: it divides none.

    DTensor takes the mesh's axes in turn, each dividing what those before left. Where something slower is left, runs of
    neighbours repeat that often, and a device has a piece of each: `_StridedShard` of that factor.
    """
    left = [list(atoms) for atoms in dims]
    for axis in axis_names:
        found = None
        for dim, atoms in enumerate(left):
            at = next((i for i, (name, _) in enumerate(atoms) if name == axis), None)
            if at is not None:
                found = dim, math.prod(size for _, size in atoms[:at])
                del atoms[at]
        yield found
