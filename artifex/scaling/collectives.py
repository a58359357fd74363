"""Wishes about how devices talk: the settings of XLA and NCCL that grant them on a platform, and which have none.

    settings(CollectivesConfig(all_reduce="data=hierarchical,tensor=tree", fuse_mb="64", overlap="on"), "gpu", mesh)

What grants a wish here was seen to change the compiled program (jaxlib 0.10.2, libtpu 0.0.42), but for NCCL's choice
of an algorithm, which no program has. Importing this imports no JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from artifex.config import CollectivesConfig
    from artifex.scaling.execution import Platform

Overlap = Literal["auto", "on", "off"]
"""Whether devices compute while they send."""
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""The collectives that a wish about an algorithm may be about, each by mesh axis."""
ALGORITHMS: dict[str, str] = {
    "ring": "each device passes parts on to the next: the most throughput for large arrays",
    "tree": "sums go up a tree and results down: the fewest turns, for many hosts and small arrays",
    "hierarchical": "first within each host, then between hosts, of which each device has its part alone",
    "direct": "each device sends to every other at once",
}
FUSED = ("all_reduce", "all_gather", "reduce_scatter", "collective_permute")
"""The collectives that a threshold of fusion may be about."""
AXES = ("data", "fsdp", "tensor", "expert", "context", "pipeline", "model")
"""What the axes of a run's mesh may be called."""

_NCCL = {"all_reduce": "AllReduce", "all_gather": "AllGather", "reduce_scatter": "ReduceScatter"}
_THRESHOLDS = {
    "gpu": {kind: f"xla_gpu_{kind}_combine_threshold_bytes" for kind in FUSED},
    "tpu": {"all_reduce": "xla_jf_crs_combiner_threshold_in_bytes"},
    "cpu": {},
}
_NAMES = {"cpu": "XLA for CPUs", "gpu": "XLA for GPUs", "tpu": "a TPU's compiler"}
_BY_HOSTS = "xla_gpu_all_reduce_blueconnect_num_devices_per_host"
_OVERLAPPED: dict[tuple[str, str], dict[str, bool | str]] = {
    # over the turns of a loop: the next layer's weights come while this one computes, and are held besides
    ("gpu", "on"): {f"xla_gpu_enable_pipelined_{kind}": True for kind in _NCCL},
    ("gpu", "off"): {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"},
    ("tpu", "off"): {
        "xla_tpu_enable_async_collective_fusion": False,
        **{f"xla_enable_async_{kind}": False for kind in ("all_gather", "all_reduce", "collective_permute")},
    },
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a platform makes of wishes. `options` are of the compiler, `environment` of NCCL, which reads it when the
    devices first talk; `unmet`: the wishes that it cannot grant, or not for one axis alone, and why."""

    options: Mapping[str, bool | int | str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unmet: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What was set, and what was not, for the user."""
        pairs = {**self.options, **self.environment}
        words = {True: "true", False: "false"}
        is_set = ", ".join(f"{name}={words[v] if isinstance(v, bool) else v}" for name, v in pairs.items())
        return [*([f"collectives: sets {is_set}"] if is_set else []), *(f"collectives: {line}" for line in self.unmet)]


def by_axis(wish: str | Mapping[str, str] | None) -> str | None:
    """The one text of a wish, an algorithm by mesh axis, given as text or as a mapping.

    Raises `ValueError` for an axis or an algorithm that is unknown.
    """
    if wish is None:
        return None
    pairs = _checked(wish, AXES, "mesh axes", "data=ring,tensor=tree")
    for axis, algorithm in pairs.items():
        _known(algorithm, ALGORITHMS, f"{axis}=")
    return ",".join(f"{axis}={pairs[axis]}" for axis in AXES if axis in pairs)


def thresholds(wish: str | float | Mapping[str, float] | None) -> str | None:
    """The one text of thresholds in MB, a number for all of `FUSED` or one for each that is named.

    Raises `ValueError` for an unknown kind and for what is no size.
    """
    if wish is None:
        return None
    if isinstance(wish, int | float) or (isinstance(wish, str) and "=" not in wish):
        return _megabytes(wish)
    pairs = _checked(wish, FUSED, "collectives", "all_reduce=64,all_gather=256")
    return ",".join(f"{kind}={_megabytes(pairs[kind])}" for kind in FUSED if kind in pairs)


def settings(wishes: CollectivesConfig, platform: Platform, mesh: Mesh) -> Settings:
    """What `platform` makes of `wishes` on `mesh`, whose devices may not be there."""
    if wishes == type(wishes)():
        return Settings()
    if mesh.size == 1:
        return Settings(unmet=("one device sends nothing, so no wish changes anything",))
    parts = [_algorithms(wishes, platform, mesh), _fused(wishes, platform), _overlapped(wishes, platform)]
    return Settings(
        {name: value for part in parts for name, value in part.options.items()},
        {name: value for part in parts for name, value in part.environment.items()},
        tuple(line for part in parts for line in part.unmet),
    )


def _algorithms(wishes: CollectivesConfig, platform: Platform, mesh: Mesh) -> Settings:
    options: dict[str, bool | int | str] = {}
    nccl: dict[str, dict[str, str]] = {}  # collective -> axis -> NCCL's word
    unmet = []
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    for kind in KINDS:
        for axis, algorithm in _pairs(getattr(wishes, kind)).items():
            wish = f"{kind} {axis}={algorithm}"
            if axis not in axes:
                unmet.append(f"{wish} is about no axis of this mesh, which has {', '.join(axes)}")
            elif reason := _no_algorithm(platform, kind, algorithm):
                unmet.append(f"{wish} cannot be granted: {reason}")
            elif algorithm == "hierarchical":
                found = _devices_of_a_host(mesh, axis)
                if isinstance(found, str):
                    unmet.append(f"{wish} changes nothing: {found}")
                else:
                    options[_BY_HOSTS] = found
            elif algorithm != "direct":
                nccl.setdefault(kind, {})[axis] = algorithm.capitalize()
    environment, said = _of_nccl(nccl, axes)
    return Settings(options, environment, (*unmet, *said))


def _fused(wishes: CollectivesConfig, platform: Platform) -> Settings:
    there, asked = _THRESHOLDS[platform], _megabytes_of(wishes.fuse_mb)
    missing = [kind for kind in asked if kind not in there]
    said = f"fuse_mb of {', '.join(missing)} cannot be granted: {_NAMES[platform]} has no such threshold"
    options = {there[kind]: round(number * 1e6) for kind, number in asked.items() if kind in there}
    return Settings(options, unmet=(said,) if missing else ())


def _overlapped(wishes: CollectivesConfig, platform: Platform) -> Settings:
    if wishes.overlap == "auto":
        return Settings()
    if platform == "cpu":
        return Settings(unmet=(f"overlap={wishes.overlap} cannot be granted: {_NAMES[platform]} has no such setting",))
    if (options := _OVERLAPPED.get((platform, wishes.overlap))) is None:
        return Settings(unmet=(f"overlap={wishes.overlap} needs no setting: {_NAMES[platform]} does so by itself",))
    return Settings(options)


def _no_algorithm(platform: str, kind: str, algorithm: str) -> str:
    """Why a platform cannot do a collective that way; empty where it can."""
    if platform == "cpu":
        return "devices of a CPU share its memory, or talk by gloo, which has one way"
    if platform == "tpu":
        return "a TPU's compiler chooses by the slice's torus, and takes no wish"
    if kind == "all_to_all":
        return "" if algorithm == "direct" else "NCCL sends each part straight to its device"
    if algorithm == "direct":
        return "NCCL has no such algorithm"
    if algorithm == "tree" and kind != "all_reduce":
        return "NCCL has trees for sums that all devices get"
    if algorithm == "hierarchical" and kind != "all_reduce":
        return "XLA divides all-reduces alone by hosts; give hosts an axis of their own, as data x fsdp do"
    return ""


def _of_nccl(chosen: Mapping[str, Mapping[str, str]], axes: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """NCCL_ALGO, which holds for a process and so for every axis, and what the user should know of that."""
    parts, said = [], []
    for kind, by in chosen.items():
        words = list(dict.fromkeys(by.values()))
        parts.append(f"{_NCCL[kind]}:{','.join(words)}")
        others = [axis for axis in axes if axis not in by]
        if len(words) > 1:
            wish = ",".join(f"{axis}={word.lower()}" for axis, word in by.items())
            said.append(
                f"{kind} {wish}: NCCL cannot tell axes apart, and chooses between {' and '.join(words)} on each"
            )
        elif others:
            said.append(f"{kind} {words[0].lower()} holds for {', '.join(others)} as well: NCCL cannot tell axes apart")
    value, there = ";".join(parts), os.environ.get("NCCL_ALGO")
    if not parts or there in (None, value):
        return ({"NCCL_ALGO": value} if parts else {}), said
    return {}, [f"NCCL_ALGO={there} is set outside and stays; the wishes are NCCL_ALGO={value}"]


def _devices_of_a_host(mesh: Mesh, axis: str) -> int | str:
    """How many devices a host has, where `axis` has several on each of several hosts; else what keeps it from that."""
    import numpy as np

    hosts = np.vectorize(_host_of(mesh), otypes=[int])(mesh.devices)
    group = np.moveaxis(hosts, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])[0].tolist()
    each = set(Counter(group).values())
    if len(set(group)) == 1:
        return f"{axis} lies within a host"
    if each == {1}:
        return f"{axis} has one device of each host"
    sizes = Counter(flat := hosts.ravel().tolist())
    count = max(sizes.values())
    blocks = [set(flat[start : start + count]) for start in range(0, len(flat), count)]
    if len(set(sizes.values())) > 1 or len(each) > 1 or any(len(block) > 1 for block in blocks):
        return "XLA can do so only where hosts have equally many devices, next to each other in the mesh"
    return count


def _host_of(mesh: Mesh) -> Callable[[Any], int]:
    """What tells the host of a device: its slice, which JAX numbers by host where a process has one GPU of several, or
    else its process."""
    slices = {getattr(device, "slice_index", None) for device in mesh.devices.flat}
    return operator.attrgetter("slice_index" if len(slices) > 1 else "process_index")


def _checked(wish: Any, names: Collection[str], what: str, example: str) -> dict[str, Any]:
    """The pairs of a wish. Raises `ValueError` unless each name is one of `names`, once."""
    if isinstance(wish, Mapping):
        pairs = [(str(name), value) for name, value in wish.items()]
    else:
        parts = [part.strip().partition("=") for part in str(wish).split(",")]
        if any(not sign for _, sign, _ in parts):
            raise ValueError(f"must be pairs of {what} and values, as in '{example}', got {wish!r}")
        pairs = [(name.strip(), value.strip()) for name, _, value in parts]
    if not pairs:
        raise ValueError(f"must be pairs of {what} and values, as in '{example}', got {wish!r}")
    for name, _ in pairs:
        _known(name, names, "")
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"names {twice[0]!r} twice; name it once")
    return dict(pairs)


def _known(word: Any, words: Collection[str], before: str) -> None:
    if isinstance(word, str) and word in words:
        return
    near = difflib.get_close_matches(str(word), words, n=1)
    hint = f"did you mean {before}{near[0]}?" if near else f"choose of {', '.join(words)}"
    raise ValueError(f"has {before + str(word)!r}, which is unknown; {hint}")


def _megabytes(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= 1e6:
        raise ValueError(f"must be in MB, from 0 to 1000000, got {value!r}")
    return f"{number:g}"


def _megabytes_of(text: str | None) -> dict[str, float]:
    """The threshold of each kind that has one."""
    each = _pairs(text) if text is None or "=" in text else dict.fromkeys(FUSED, text)
    return {kind: float(number) for kind, number in each.items()}


def _pairs(text: str | None) -> dict[str, str]:
    split = [part.partition("=") for part in text.split(",")] if text else []
    return {name: value for name, _, value in split}
