"""Weights in and out: a folder with `config.json` and safetensors, in our own layout or in another library's.

In our own, a tensor's name is its path in the model's canonical tree with dots, `layers.attention.query.kernel`, and
its shape is the one the model has: repeated blocks stay stacked. Other libraries' are tables: `artifex.models.LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifex.models.layouts import Entry, Layout, Shape
from artifex.models.safetensors_io import (
    CODES,
    SHARD_BYTES,
    Stored,
    Tensor,
    index_of,
    open_tensors,
    shown,
    verify,
    write_tensors,
)
from artifex.models.weights_config import (
    CONFIG,
    chosen_layout,
    described,
    preset_like,
    read_config,
    section_of,
)
from artifex.scaling import processes

TENSORS, TOKENIZER = "model.safetensors", "tokenizer.json"
FLOATS = ("F32", "BF16", "F16")  # what a parameter may be stored in
PIECE = 2**25  # bytes compared or written at once
MOST_TENSORS = 10**7  # of a model; a config.json that describes more is no model's

Slices = tuple[slice, ...]


def holds_weights(folder: str | Path) -> bool:
    """Whether `folder` holds weights in our own layout."""
    return any((Path(folder) / name).is_file() for name in (TENSORS, index_of(TENSORS)))


def from_pretrained(folder: str | Path, *, shardings: Any = None, dtype: Any = None) -> Any:
    """The model in a folder written by `save_pretrained`, by `transformers` or by `diffusers`.

    Parameters become float32, or `dtype`, whatever of float32, bfloat16 and float16 the file has. Each is read straight
    into its shards, from the file's own pages, one shard at a time. `shardings` is a tree like the parameters', or a
    function that makes one of the abstract `nnx.State`, in whose metadata every dim has its name; None: one device.

    Tensors are verified first where their file carries checksums, as those of `save_pretrained` do; of several
    processes all call it, and each verifies a share. Raises `FileNotFoundError` where a file is missing, and
    `ValueError` for a configuration that is none or that our models cannot compute, for tensors that are missing,
    unknown, misshapen, damaged or of another dtype, with the first of them listed, for pickles, and for files
    made to deceive (see `artifex.models.safetensors_io.open_tensors`).
    """
    cfg = read_config(folder)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))))
    abstract = nnx.to_pure_dict(state)
    if dtype is not None:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype if _floating(leaf) else leaf.dtype), abstract
        )
    where = shardings(state) if callable(shardings) else shardings
    return nnx.merge(graphdef, read_params(folder, abstract, cfg, where))


def read_params(folder: str | Path, abstract: Any, cfg: Any = None, shardings: Any = None) -> Any:
    """The parameters a folder holds, like the nested dicts `abstract` of shapes and dtypes, each straight into its
    shards. Floating-point ones become what `abstract` says; others must be stored as they are.

    `cfg` is the configuration that `abstract` was built from; None: that of the folder. Raises as `from_pretrained`.
    """
    expected = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    readers = _readers(Path(folder), expected, cfg)
    places = itertools.repeat(None) if shardings is None else jax.tree.leaves(shardings)
    leaves = [
        _placed(readers[path], tuple(leaf.shape), np.dtype(leaf.dtype), where)
        for (path, leaf), where in zip(expected.items(), places, strict=shardings is not None)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def described_params(folder: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters and buffers of the model that a folder's `config.json` describes, by their names in our layout,
    with shape and, for floating-point ones, float32. Reads no tensor."""
    cfg = read_config(folder)
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))))
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}


def read_some(folder: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some of the parameters that `described_params` names, each straight into the sharding that `wanted` states.

    All that the folder should hold must be there and fit; the rest of it is not read. Raises as `from_pretrained`.
    """
    readers = _readers(Path(folder), described_params(folder), None, wanted)
    return {
        name: _placed(readers[name], tuple(leaf.shape), np.dtype(leaf.dtype), leaf.sharding)
        for name, leaf in wanted.items()
    }


def _readers(
    folder: Path, expected: Mapping[str, Any], cfg: Any, wanted: Container[str] | None = None
) -> dict[str, Callable[[Slices, np.dtype], Any]]:
    """What reads slices of each of the `expected` parameters, once all that the folder holds was found to fit, and
    those that are `wanted` (None: all) to match their checksums."""
    there, layout = described(folder)
    entries = _own(expected) if layout is None else layout.entries(there if cfg is None else cfg)
    sources = _sources(entries, {path: tuple(leaf.shape) for path, leaf in expected.items()})
    stored = open_tensors(folder, TENSORS if layout is None else layout.tensors)
    stored = _check(folder, sources, expected, stored, layout)
    read = [source for source in sources if wanted is None or source.path in wanted]
    names = {name for source in read for name in _names(source) if name in stored}
    verify({name: stored[name] for name in sorted(names)})
    for source in sources:
        if source.entry.copies or source.entry.optional:
            _check_repeated(folder, source, sources, stored)
    return {source.path: functools.partial(_read, source, stored) for source in sources if not source.entry.optional}


def save_pretrained(
    folder: str | Path,
    model: nnx.Module | str,
    cfg: Any = None,
    params: Any = None,
    *,
    layout: str = "artifex",
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model to `folder`, one piece of one tensor in the host's memory at a time.

    `model` is a module, or the name of the preset that `cfg` was made from, with the nested dicts `params` of its
    parameters and buffers. `layout` is "artifex", our own, which holds every model; or an architecture of
    `artifex.models.LAYOUTS`, for the library that has it: of `transformers` LlamaForCausalLM, MistralForCausalLM,
    MixtralForCausalLM, Qwen3ForCausalLM, Gemma2ForCausalLM and GPT2LMHeadModel, of `diffusers` AutoencoderKL,
    UNet2DModel and DiTTransformer2DModel; or "huggingface", the first of these that has words for the model.
    `artifex.models.layouts_of(model.cfg)` lists those that do. `tokenizer` is what `artifex.data.tokenizers` makes, or
    the path of a `tokenizer.json`: it is written beside the weights, where sampling looks for it. Above
    `max_shard_bytes` there are several files and an index.

    Of several processes all call it, and the first one writes. Raises `ValueError` for a model that the layout has no
    words for, and for a tokenizer that is neither.
    """
    texts = {} if tokenizer is None else {TOKENIZER: _tokenizer_text(tokenizer)}
    name = model if isinstance(model, str) else None
    if isinstance(model, nnx.Module):
        cfg, params = getattr(model, "cfg"), nnx.to_pure_dict(nnx.state(model))  # noqa: B009
    values = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if layout == "artifex":
        config, entries, file = {"model": section_of(name or preset_like(cfg), cfg)}, _own(values), TENSORS
    else:
        chosen, config = chosen_layout(cfg, layout)
        entries, file = [entry for entry in chosen.entries(cfg) if not entry.optional], chosen.tensors
        if "dtype" in config:
            config["dtype"] = next(value.dtype.name for value in values.values() if _floating(value))
    sources = _sources(entries, {path: tuple(value.shape) for path, value in values.items()})
    tensors = [tensor for entry in entries for tensor in _to_write(entry, values)]
    assert {source.path for source in sources} == values.keys(), "a layout covers every parameter"
    texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    if processes.is_first():
        write_tensors(Path(folder), file, tensors, texts, max_shard_bytes)
    else:  # takes part in gathering what the first one writes
        for tensor in tensors:
            for _ in tensor.pieces():
                pass
    processes.all_say(None)  # the folder is there when this returns


def _tokenizer_text(tokenizer: Any) -> str:
    if isinstance(tokenizer, str | Path):
        if not Path(tokenizer).is_file():
            raise ValueError(f"tokenizer {tokenizer} is no file; give the path of a {TOKENIZER}")
        return Path(tokenizer).read_text(encoding="utf-8")
    if not hasattr(tokenizer, "to_json"):
        raise ValueError(
            f"tokenizer is of type {type(tokenizer).__name__}; give what artifex.data.tokenizers makes, or the path of "
            f"a {TOKENIZER}"
        )
    return tokenizer.to_json()


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a parameter comes from: the part `index` of the tensors of `entry`, one for each index of the dims `lead`;
    `shapes` are those of all the entry's parts without these dims."""

    path: str
    entry: Entry
    index: int
    lead: Shape
    shapes: tuple[Shape, ...]


def _own(paths: Iterable[str]) -> list[Entry]:
    return [Entry(path, path) for path in paths]


def _sources(entries: Iterable[Entry], shapes: Mapping[str, Shape]) -> list[_Source]:
    sources = []
    for entry in entries:
        if unknown := [path for path in entry.paths if path not in shapes]:
            raise ValueError(
                f"{CONFIG} describes {unknown[0]}, which the model does not have; build it as {CONFIG} says"
            )
        count, parts = len(entry.counted), [shapes[path] for path in entry.paths]
        rest = tuple(part[count:] for part in parts)
        sources += [_Source(path, entry, i, parts[i][:count], rest) for i, path in enumerate(entry.paths)]
    covered = [source.path for source in sources if not source.entry.optional]
    if without := sorted(shapes.keys() - set(covered)):
        raise ValueError(f"{CONFIG} describes no {without[0]}, which the model has; build it as {CONFIG} says")
    assert len(covered) == len(shapes), "a layout covers every parameter once"
    return sources


def _names(source: _Source) -> Iterator[str]:
    """The tensors that a parameter is read from."""
    for at in itertools.product(*map(range, source.lead)):
        yield from source.entry.names(at)


def _check(
    folder: Path, sources: list[_Source], leaves: Mapping[str, Any], stored: dict[str, Stored], layout: Layout | None
) -> dict[str, Stored]:
    """`stored` under the layout's names, without what it ignores. Raises `ValueError` where it does not fit."""
    first = [source for source in sources if source.index == 0]
    count = sum(math.prod(source.lead) * max(source.entry.copies, 1) for source in first)
    if count > MOST_TENSORS:
        raise ValueError(f"{folder / CONFIG} describes {count:,} tensors, {folder} holds {len(stored):,}")
    expected, optional = {}, set()
    for source in first:
        want = (source.entry.their_shape(source.shapes), np.dtype(leaves[source.path].dtype))
        for at in itertools.product(*map(range, source.lead)):
            names = dict.fromkeys(source.entry.names(at), want)
            expected |= names
            optional |= names.keys() if source.entry.optional else set()
    if layout is not None:
        ignored = [re.compile(pattern) for pattern in layout.ignored]
        stored = {name: tensor for name, tensor in stored.items() if not any(p.fullmatch(name) for p in ignored)}
        longer = {name: layout.prefix + name for name in stored if name not in expected}
        longer = {name: full for name, full in longer.items() if full in expected and full not in stored}
        stored = {longer.get(name, name): tensor for name, tensor in stored.items()}
    wrong = [f"missing {name}" for name in expected if name not in stored and name not in optional]
    wrong += [f"unknown {shown(name)}" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        (shape, dtype), have = expected[name], stored[name]
        fits = have.code in FLOATS if jnp.issubdtype(dtype, jnp.floating) else have.code == CODES[dtype]
        if shape != have.shape or not fits:
            got = have.dtype or have.code
            wrong.append(f"{name} is {got}{list(have.shape)}, expected {dtype}{list(shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        file = TENSORS if layout is None else layout.tensors
        raise ValueError(f"{folder / file} does not fit {folder / CONFIG}: {'; '.join(wrong[:5])}{more}")
    return stored


def _check_repeated(folder: Path, source: _Source, sources: list[_Source], stored: Mapping[str, Stored]) -> None:
    """Raise `ValueError` where tensors that hold the same numbers of ours differ."""
    main = next(one for one in sources if one.path == source.path and not one.entry.optional)
    shape, exact = source.shapes[source.index], np.dtype(np.float64)  # holds every value of the dtypes we read
    for at in itertools.product(*map(range, source.lead)):
        names = [name for name in source.entry.names(at) if name in stored]
        for name in names[0 if source.entry.optional else 1 :]:
            again = dataclasses.replace(source, entry=dataclasses.replace(source.entry, theirs=name, copies=0), lead=())
            for rows in _blocks(shape, exact.itemsize):
                index = (*rows, *(slice(None),) * (len(shape) - len(rows)))
                want = _read(main, stored, (*(slice(i, i + 1) for i in at), *index), exact)
                got = _read(again, stored, index, exact)
                # as bits: NaN is NaN
                if not np.array_equal(want.reshape(got.shape).view(np.int64), got.view(np.int64)):
                    first = main.entry.names(at)[0]
                    raise ValueError(f"{folder} holds {name} unlike {first}; our model has one tensor for both")


def _read(source: _Source, stored: Mapping[str, Stored], index: Slices, dtype: np.dtype) -> np.ndarray:
    """A slice of a parameter, and nothing else of the file."""
    shape = (*source.lead, *source.shapes[source.index])
    spans = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    lead, rest = spans[: len(source.lead)], index[len(source.lead) :]
    out = np.empty([len(span) for span in spans], dtype)
    for slot in itertools.product(*(range(len(span)) for span in lead)):
        name = source.entry.names(tuple(span[i] for span, i in zip(lead, slot, strict=True)))[0]
        out[slot] = source.entry.split(stored[name].array(), source.shapes)[source.index][rest]
    return out


def _placed(read: Callable[[Slices, np.dtype], np.ndarray], shape: Shape, dtype: np.dtype, where: Any) -> jax.Array:
    """The array that `read` reads slices of, by `where`; the host holds one device's slice at a time."""
    if where is None:
        return jnp.asarray(read((slice(None),) * len(shape), dtype))
    indices = where.addressable_devices_indices_map(shape)
    alike: dict[Any, list] = {}
    for device, index in indices.items():
        alike.setdefault(tuple(part.indices(size) for part, size in zip(index, shape, strict=True)), []).append(device)
    parts = {}
    for index, devices in alike.items():
        parts |= _put(read(tuple(slice(*part) for part in index), dtype), devices)
    return jax.make_array_from_single_device_arrays(shape, where, [parts[device] for device in indices])


def _put(values: np.ndarray, devices: list[Any]) -> dict[Any, jax.Array]:
    """`values` on each device. Waits, so that the host can let go of them."""
    parts = jax.block_until_ready([jax.device_put(values, device) for device in devices])
    return dict(zip(devices, parts, strict=True))


def _to_write(entry: Entry, values: Mapping[str, Any]) -> Iterator[Tensor]:
    arrays, count = [values[path] for path in entry.paths], len(entry.counted)
    shape = entry.their_shape([array.shape[count:] for array in arrays])
    for at in itertools.product(*map(range, arrays[0].shape[:count])):
        pieces = functools.partial(_pieces, entry, arrays, at)
        for name in entry.names(at):
            yield Tensor(name, np.dtype(arrays[0].dtype), shape, pieces)


def _pieces(entry: Entry, arrays: list[Any], at: Shape) -> Iterator[np.ndarray]:
    if at or entry.transpose is not None or entry.merge is not None or len(arrays) > 1:
        yield entry.join([_fetched(array, at) for array in arrays])
        return
    for rows in _blocks(arrays[0].shape, arrays[0].dtype.itemsize):
        yield _fetched(arrays[0], rows)


def _fetched(array: Any, at: tuple[Any, ...]) -> np.ndarray:
    """`array[at]` on the host. A copy: what is fetched of an array itself stays with it."""
    if isinstance(array, np.ndarray):
        return array[at]
    part = array[at]
    return processes.fetched(jnp.copy(array) if part is array else part)


def _blocks(shape: Shape, itemsize: int) -> Iterator[Slices]:
    """Slices of the first dim, each of at most `PIECE` bytes where a row is."""
    size = math.prod(shape) * itemsize
    if not shape or size <= PIECE:
        yield ()
        return
    rows = max(1, PIECE * shape[0] // size)
    for begin in range(0, shape[0], rows):
        yield (slice(begin, min(begin + rows, shape[0])),)


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _dotted(path: Any) -> str:
    return ".".join(str(key.key) for key in path)
