"""What a run begins with instead of random weights: those of another run, or of a folder of ours or another library's.

What is there and what is asked for are compared by configuration, name and shape before anything is read; then every
array goes from its file straight into its shards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from artifex.cli import text_of
from artifex.config import Config
from artifex.data.tokenizers import ByteTokenizer, load_tokenizer
from artifex.models.weights import TOKENIZER, described_params, read_some
from artifex.models.weights_config import read_config
from artifex.scaling import manifest, placement
from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.leaves import nested
from artifex.training.frozen import fresh_state
from artifex.training.restore import SavedStep, find_step
from artifex.training.start_rows import Rows, check_ids, known_rows, put, told, whole
from artifex.training.state import Blueprint, TrainState, frozen_of, mark_whole, within

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # by path, "embed/table"

OF_THE_USE = (
    *("sequence_length", "dropout", "load_balance_weight", "router_z_weight", "z_loss_weight"),
    *("capacity_factor", "expert_buffer"),
    *("sampler", "sampling_steps", "guidance", "condition_dropout", "weighting", "training_times"),
    *("image_size", "autoencoder_weights", "beta", "kl_weight", "commitment", "ema_decay", "revive_below"),
)
"""Fields of a model that may differ from those its weights were made with: lengths, losses, how samples are drawn."""
SAID_BY_SHAPES = ("num_kv_heads", "head_dim", "mlp_dim", "expert_mlp_dim", "condition_dim")
"""Fields whose None stands for a size derived from others."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights in a folder: the configuration of their model, their arrays by path in our tree, and what reads some."""

    spec: Any
    arrays: Shapes
    read: Callable[[Shapes], dict[str, jax.Array]]
    tokenizer: Path


@dataclasses.dataclass(frozen=True)
class Match:
    """What of a source goes where. `taken` has our paths, `under` is what they have before those of the source."""

    source: Source
    under: str
    taken: frozenset[str]
    rows: Mapping[str, Rows]  # by our path: arrays of which a part is taken
    fresh: tuple[str, ...]  # why each of the other arrays of ours is not taken
    notes: tuple[str, ...]  # what else differs


def check(config: Config) -> None:
    """Raise what `start_state`, `training.freeze` and `device.whole` would, before any data is read: `ValueError` for
    what does not fit, by name, and `FileNotFoundError` where there are no weights."""
    if config.training.start_from is None and not config.training.freeze and not config.device.whole:
        return
    abstract = nnx.eval_shape(lambda: config.model.spec().build(nnx.Rngs(0)))
    mark_whole(abstract, config.device.whole or ())
    _, trained, rest = nnx.split(abstract, nnx.Param, ...)
    frozen_of(config, trained)
    if config.training.start_from is not None:
        params, buffers = nnx.to_pure_dict(trained), nnx.to_pure_dict(rest)
        match(config, by_path(params), by_path(buffers), _named(params, placement.names_of(trained)))


def start_state(blue: Blueprint) -> tuple[TrainState, list[str]]:
    """The state a run begins with, and what to tell the user about it.

    The weights of `training.start_from`, with a fresh optimizer, step 0 and, where the run keeps a running mean, a mean
    that begins with them; without it the random ones, and in either case the frozen part of the model that no source
    holds (see `artifex.training.frozen`).
    """
    start_from = blue.config.training.start_from
    if start_from is None:
        return fresh_state(blue), []
    params, buffers = by_path(blue.state.params), by_path(blue.state.buffers)
    found = match(blue.config, params, buffers, _named(blue.state.params, blue.names))
    state = blue.init() if found.taken.issuperset(buffers) else fresh_state(blue)
    wanted = {path.removeprefix(found.under): (params | buffers)[path] for path in sorted(found.taken)}
    arrays = {found.under + path: array for path, array in found.source.read(wanted).items()}
    random = by_path(state.params)
    for path, rows in found.rows.items():
        name = path.removeprefix(found.under)
        arrays[path] = put(random[path], found.source.read({name: whole(params[path], rows)})[name], rows)
    state.params, state.buffers = replaced(state.params, arrays), replaced(state.buffers, arrays)
    if state.ema is not None:
        shardings = (blue.shardings.ema, blue.shardings.ema_buffers)
        copy = jax.jit(lambda trees: jax.tree.map(jnp.copy, trees), out_shardings=shardings)
        state.ema, state.ema_buffers = copy((state.params, within(state.buffers, state.ema_buffers)))
    numbers = sum(math.prod(leaf.shape) for leaf in wanted.values())
    lines = [f"started from {start_from}: {len(wanted)} arrays, {numbers:,} numbers", *found.notes]
    if blue.config.training.start_from_partial:
        lines.append(f"taken of {start_from}: {', '.join(f'{path}{list(wanted[path].shape)}' for path in wanted)}")
    lines += [f"taken in part: {told(path, params[path].shape, rows)}" for path, rows in found.rows.items()]
    return state, [*lines, *(f"fresh, not from {start_from}: {line}" for line in found.fresh)]


def match(config: Config, params: Shapes, buffers: Shapes, names: Mapping[str, tuple[str, ...]]) -> Match:
    """What of `training.start_from` fits our arrays, where `names` are the logical axes of `params`.

    Raises `ValueError` with what does not fit, by name; where the start is partial, only if nothing fits.
    """
    where, partial = config.training.start_from, config.training.start_from_partial
    assert where is not None
    source = open_source(where)
    under, part = _part(config, source.spec, where)
    settings, notes = _differences(source.spec, part, f"model.{under.replace('/', '.')}")
    notes += _tokenizer_differs(config, source)
    theirs = {under + path: leaf for path, leaf in source.arrays.items()}
    # a part that the model freezes comes from its own folder, where the source lacks it
    ours = dict(params) | {path: leaf for path, leaf in buffers.items() if path.startswith(under)}
    rows = known_rows(config, names, params, theirs)
    if rows:
        check_ids(config, source.tokenizer)
    fresh = [
        f"{path}{list(leaf.shape)}" + (f", there {list(theirs[path].shape)}" if path in theirs else ", there nothing")
        for path, leaf in ours.items()
        if (path not in theirs or theirs[path].shape != leaf.shape) and path not in rows
    ]
    unused = [f"{path}{list(leaf.shape)}" for path, leaf in theirs.items() if path not in ours]
    taken = frozenset(path for path in ours if path in theirs and theirs[path].shape == ours[path].shape)
    if not taken and not rows:
        raise ValueError(f"training.start_from {where} holds nothing that fits {config.model.name!r}: {_some(fresh)}")
    if partial:
        notes += [f"{key} was {there}, is {here}" for key, there, here in settings]
        notes += [f"not used of {where}: {', '.join(unused)}"] if unused else []
        return Match(source, under, taken, rows, tuple(fresh), tuple(notes))
    wrong = [f"{key} is {there} there and {here} here" for key, there, here in settings]
    wrong += fresh + [f"{path}, here nothing" for path in unused]
    if wrong:
        flags = " ".join(f"--{key.replace('_', '-')}={there}" for key, there, _ in settings)
        remedy = f"set {flags}, or " if flags else ""
        raise ValueError(
            f"training.start_from {where} does not fit {config.model.name!r}: {_some(wrong)}; {remedy}leave what does "
            "not fit fresh: --training.start-from-partial=true"
        )
    return Match(source, under, taken, {}, (), tuple(notes))


def open_source(where: str) -> Source:
    """The weights that `where` names: a run's newest checkpoint or its weights, one step of it, or a folder of weights.

    Of a run the average of weights is taken where it keeps one. Raises `FileNotFoundError` where there are none, and
    `ValueError` for a configuration that our models cannot compute.
    """
    path = Path(where).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"training.start_from {where} is no folder; expected a run, a step of one, or weights")
    if (path / "checkpoints").is_dir() or (path / manifest.NAME).is_file() or path.name == "checkpoints":
        return _of_run(find_step(path))
    path = path / "weights" if (path / "weights").is_dir() else path
    arrays = {name.replace(".", "/"): leaf for name, leaf in described_params(path).items()}

    def read(wanted: Shapes) -> dict[str, jax.Array]:
        got = read_some(path, {name.replace("/", "."): leaf for name, leaf in wanted.items()})
        return {name.replace(".", "/"): array for name, array in got.items()}

    return Source(read_config(path), arrays, read, path / TOKENIZER)


def _of_run(saved: SavedStep) -> Source:
    parts = (saved.weights, "buffers", "ema_buffers")  # where the last has an array, it is the one to take
    with Checkpoints(saved.folder) as checkpoints:
        stored = checkpoints.arrays(saved.step)
    where = {path.partition("/")[2]: path for part in parts for path in stored if path.partition("/")[0] == part}

    def read(wanted: Shapes) -> dict[str, jax.Array]:
        got: dict[str, jax.Array] = {}
        with Checkpoints(saved.folder) as checkpoints:
            for part in parts:
                own = {path: leaf for path, leaf in wanted.items() if where[path] == f"{part}/{path}"}
                if own:
                    tree = checkpoints.restore(saved.step, nested(own), under=part, part=True)
                    got |= by_path(tree)
        return got

    shapes = {path: stored[full] for path, full in where.items()}
    return Source(saved.config.model.spec(), shapes, read, saved.folder.parent / TOKENIZER)


def _part(config: Config, there: Any, where: str) -> tuple[str, Any]:
    """The path and the configuration of the part of our model that is of the kind of the source's: all, or a field."""
    spec = config.model.spec()
    if type(spec) is type(there):
        return "", spec
    for field in dataclasses.fields(spec):
        if type(part := getattr(spec, field.name)) is type(there):
            return f"{field.name}/", part
    raise ValueError(
        f"training.start_from {where} holds a model of {type(there).__name__}, but {config.model.name!r} is one of "
        f"{type(spec).__name__}; choose a preset of that family"
    )


def _differences(there: Any, here: Any, key: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Fields that differ, as (key, there, here): those by which the two compute otherwise, and lines on the rest.

    Raises `ValueError` for a part of another kind, as a UNet where the other has a transformer.
    """
    settings, notes = [], []
    for field in dataclasses.fields(here):
        theirs, ours = getattr(there, field.name), getattr(here, field.name)
        if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
            inner = _differences(theirs, ours, f"{key}{field.name}.")
            settings, notes = settings + inner[0], notes + inner[1]
        elif dataclasses.is_dataclass(ours) and theirs is not None:
            kinds = f"{type(theirs).__name__} there and {type(ours).__name__} here"
            raise ValueError(f"{key}{field.name} is a {kinds}; choose a preset that has one like the weights")
        elif theirs != ours and not (field.name in SAID_BY_SHAPES and None in (theirs, ours)):
            if field.name in OF_THE_USE:
                notes.append(f"{key}{field.name} was {text_of(theirs)}, is {text_of(ours)}")
            else:
                settings.append((f"{key}{field.name}", text_of(theirs), text_of(ours)))
    return settings, notes


def _tokenizer_differs(config: Config, source: Source) -> list[str]:
    """A line where the source's tokens are not those of the data; raises `ValueError` unless the start is partial."""
    chosen = config.data.tokenizer
    if config.model.reads != "text" or not source.tokenizer.is_file():
        return []
    theirs = load_tokenizer(source.tokenizer)
    if chosen != "bpe":  # which is trained anew
        ours = ByteTokenizer() if chosen == "bytes" else load_tokenizer(Path(chosen).expanduser())
        if ours.to_json() == theirs.to_json():
            return []
    says = f"{source.tokenizer} is {theirs.name}, data.tokenizer {chosen!r} is another"
    if not config.training.start_from_partial:
        raise ValueError(f"{says}; take theirs along: --data.tokenizer={source.tokenizer}")
    return [says]


def _named(tree: Any, names: Any) -> dict[str, tuple[str, ...]]:
    """The logical axes of each array, by its path."""
    return {path: axes for path, _, axes in placement.leaves_with_names(tree, names)}


def by_path(tree: Any) -> dict[str, Any]:
    """Path -> leaf of nested dicts."""
    return {"/".join(str(key.key) for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def replaced(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """`tree` with the leaves at the paths in `arrays` replaced."""
    leaves = by_path(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays.get(path, leaf) for path, leaf in leaves.items()])


def _some(lines: list[str]) -> str:
    return "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
