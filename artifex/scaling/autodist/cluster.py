"""What the planner knows of a machine: how fast a device computes, reads its memory and reaches the others.

    Cluster.parse("gpu:h100:4x8")                # 4 hosts of 8 GPUs
    Cluster.parse("tpu:v5e:16x16", memory=14)    # a slice, of whose chips 14 GB each may be taken
    Cluster.of("gpu:a100", mesh_row=2, mesh_col=8)

Devices are numbered row-major over the axes of a mesh, the last axis fastest. A host has consecutive ones, a slice has
its chips row-major. GB are 2**30 bytes. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from artifex.scaling.targets import CHIPS, Chip, GiB, Target

FORMS = "gpu:CHIP:HOSTSxGPUS, tpu:CHIP:XxY[xZ] or cpu:N, such as gpu:a100:2x8, tpu:v5e:4x4, cpu:8"
DTYPES: tuple[str, ...] = ("bfloat16", "float32")
RINGS: Mapping[str, int] = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "collective-broadcast": 1}
"""Collectives that go round a ring of n devices: so many times its n - 1 steps."""

KINDS = (*RINGS, "all-to-all", "collective-permute")
TOGETHER = 8  # messages of an all-to-all under way at once: NCCL_MAX_DEV_WORK_P2P_PER_BATCH in NCCL's device.h


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device, and how it reaches others. `flops`: FLOP/s by compute dtype; `bandwidth`, `inside`, `between`: bytes/s,
    of its memory, and sent to others of its host and of other hosts, in one direction; `memory`: bytes; latencies:
    seconds of a step of a collective; `efficiency`: the share of `flops` that matrix products reach; `host`: devices of
    a host. `links` of a TPU: bytes/s one way along each axis of a slice; `wraps`: rings close in multiples of it."""

    name: str
    flops: Mapping[str, float] = dataclasses.field(hash=False)
    bandwidth: float
    memory: int
    inside: float
    between: float
    latency_inside: float
    latency_between: float
    efficiency: float
    source: str
    host: int = 8
    links: tuple[float, ...] = ()
    wraps: int = 0


_BOOK = "How to Scale Your Model, https://jax-ml.github.io/scaling-book"
_TPU = (
    "Google Cloud, https://docs.cloud.google.com/tpu/docs/{}; float32 in one bfloat16 pass, jax.lax.Precision.DEFAULT; "
    f"95 % of the peak and 1 us a hop: {_BOOK}/roofline and /sharding"
)
_GPU = (
    "NVIDIA, https://www.nvidia.com/en-us/data-center/{}, SXM, without sparsity; float32 is TF32, as of "
    "jax.lax.Precision.DEFAULT; memory as CUDA has it; {} NVLinks of {} GB/s, 25 by the data sheet, and latencies of "
    "LL128 rings: NCCL's src/graph/topo.h and tuning.cc, https://github.com/NVIDIA/nccl; {} Gb/s of network: {}; "
    f"80 to 85 % of the peak: {_BOOK}/roofline"
)
_CPU = (
    "measured: XLA multiplies float32 matrices at 419 GFLOP/s on two cores of an AMD EPYC, bfloat16 about as fast; "
    "typical and modest, of a core: 10 GB/s and 4 GB of memory, copies that read and write each byte, 10 Gb/s Ethernet"
)

# TFLOP/s, bytes/s and GiB of memory, bytes/s one way along each axis, rings, devices of a host. Of tpu7x JAX's devices
# are the two cores of a chip, which share its links and reach each other at six times the speed of one (its page).
_TPUS: Mapping[str, tuple[float, float, int, tuple[float, ...], int, int]] = {
    "v5e": (197, 819e9, 16, (50e9, 50e9), 16, 8),
    "v5p": (459, 2765e9, 95, (100e9, 100e9, 100e9), 4, 4),
    "v6e": (918, 1638e9, 32, (100e9, 100e9), 16, 8),
    "tpu7x": (2307 / 2, 7380e9 / 2, 96, (50e9, 50e9, 50e9, 600e9), 4, 8),
}
# TFLOP/s in bfloat16 and in float32, bytes/s and bytes of memory, NVLinks, GB/s of one, Gb/s of network, by what
_GPUS: Mapping[str, tuple[float, float, float, int, int, float, int, str]] = {
    "a100": (312, 156, 2039e9, int(79.15 * GiB), 12, 20, 200, "DGX A100 User Guide"),
    "h100": (1979 / 2, 989 / 2, 3350e9, CHIPS["h100"].memory, 18, 20.6, 400, "DGX H100 User Guide"),
    "h200": (1979 / 2, 989 / 2, 4800e9, int(139.81 * GiB), 18, 20.6, 400, "DGX H200 User Guide"),
}


def _tpu(name: str) -> Hardware:
    peak, bandwidth, memory, links, wraps, host = _TPUS[name]
    flops, ici = dict.fromkeys(DTYPES, peak * 1e12), 2 * sum(links[:3])  # both ways along each axis
    what = (flops, bandwidth, memory * GiB, ici, ici, 1e-6, 1e-6, 0.95, _TPU.format(name), host, links, wraps)
    return Hardware(f"tpu:{name}", *what)


def _gpu(name: str) -> Hardware:
    bfloat16, float32, bandwidth, memory, ways, way, net, network = _GPUS[name]
    flops = {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12}
    source = _GPU.format(name, ways, way, net, network)
    return Hardware(f"gpu:{name}", flops, bandwidth, memory, ways * way * 1e9, net / 8 * 1e9, 1.9e-6, 4e-6, 0.8, source)


_CORE = Hardware("cpu", dict.fromkeys(DTYPES, 209.5e9), 10e9, 4 * GiB, 5e9, 1.25e9, 1e-5, 5e-5, 1.0, _CPU)
HARDWARE: Mapping[str, Hardware] = {one.name: one for one in (*map(_tpu, _TPUS), *map(_gpu, _GPUS), _CORE)}
"""By name. What a machine really reaches, `artifex.scaling.autodist.profile` measures."""


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the `devices` of a group: bytes/s that one sends in all, and to a `single` other; seconds of a step.
    `neighbours`: how many of them a host has, at least; `hops`: links of a torus that a message of an all-to-all
    crosses, on average."""

    bandwidth: float
    single: float
    latency: float
    devices: int
    neighbours: int
    hops: float = 1.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`hosts` with `devices_per_host` each, of which a plan may take `memory` bytes. `shape` of a TPU slice; `target`:
    the name by which `artifex.scaling.targets` compiles for it, None where nothing does."""

    hardware: Hardware
    hosts: int
    devices_per_host: int
    memory: int
    shape: tuple[int, ...] = ()
    target: str | None = None

    @classmethod
    def parse(cls, text: str, memory: float | None = None) -> Cluster:
        """The cluster of a name; `memory`: GB of a device, by default what JAX takes. Raises `ValueError`."""
        name = text.strip().lower()
        platform, *rest = name.split(":")
        hardware = HARDWARE.get(platform if platform == "cpu" else ":".join([platform, *rest[:1]]))
        if hardware is None:
            raise ValueError(f"cluster {text!r} is of no hardware that is known; {_nearest(name)}")
        sizes = ":".join(rest if platform == "cpu" else rest[1:])
        dims = {"cpu": 1, "gpu": 2, "tpu": min(len(hardware.links), 3)}[platform]
        if not re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})*", sizes) or sizes.count("x") != dims - 1:
            what = {"cpu": "a number of devices", "gpu": "hosts and GPUs of each", "tpu": f"{dims} sizes of a slice"}
            example = hardware.name + ":" + {"cpu": "8", "gpu": "2x8", "tpu": "x".join("4" * dims)}[platform]
            raise ValueError(f"cluster {text!r} has the shape {sizes!r}; expected {what[platform]}, such as {example}")
        shape = tuple(int(size) for size in sizes.split("x"))
        if platform == "cpu" or rest[0] in CHIPS:
            target, compiled = Target.parse(name), name
        else:  # JAX takes the same part of any GPU
            target, compiled = Target(name, rest[0], Chip("gpu", hardware.memory, hardware.source, 2), shape), None
        each = math.gcd(target.device_count, hardware.host) if platform == "tpu" else shape[-1]
        torus = (*shape, *[2] * (len(hardware.links) - dims)) if platform == "tpu" else ()  # of tpu7x its cores too
        takes = _bytes(text, memory) or target.memory or hardware.memory
        return cls(hardware, target.device_count // each, each, takes, torus, compiled)

    @classmethod
    def of(cls, hardware: str, mesh_row: int = 1, mesh_col: int = 1, memory: float | None = None) -> Cluster:
        """`mesh_row` hosts of `mesh_col` devices of "gpu:h100", "tpu:v5e" or "cpu"; of a TPU the most even slice that
        has so many. Raises `ValueError`."""
        count, name = mesh_row * mesh_col, hardware.strip().lower()
        if name not in HARDWARE:
            raise ValueError(f"hardware {hardware!r} is not known; {_nearest(name)}")
        if min(mesh_row, mesh_col) < 1:
            raise ValueError(f"mesh_row x mesh_col is {mesh_row} x {mesh_col}; expected 1 or more of each")
        if name == "cpu":
            return dataclasses.replace(cls.parse(f"cpu:{count}", memory), hosts=mesh_row, devices_per_host=mesh_col)
        if name.startswith("gpu"):
            return cls.parse(f"{name}:{mesh_row}x{mesh_col}", memory)
        chip = CHIPS[name.removeprefix("tpu:")]
        if count % chip.devices:
            raise ValueError(f"{name} has {chip.devices} devices in a chip, got {count}; expected a multiple of them")
        return cls.parse(f"{name}:{'x'.join(map(str, _even(count // chip.devices, chip.dims)))}", memory)

    @property
    def device_count(self) -> int:
        return self.hosts * self.devices_per_host

    def link(self, sizes: Mapping[str, int], axis: str | Sequence[str]) -> Link:
        """What joins devices along `axis`, or along several together, of a mesh of `sizes`: `inside` where all are on
        one host, else the slower of `inside` and `between`. In a slice, the links of the torus that the group spans:
        both directions where they close to a ring, shared by groups whose devices alternate along them.

        Raises `ValueError` for an axis that is none, or a mesh of another size than the cluster."""
        axes = (axis,) if isinstance(axis, str) else tuple(axis)
        if missing := [name for name in axes if name not in sizes]:
            raise ValueError(f"axis {missing[0]!r} is none of the mesh; it has {', '.join(sizes)}")
        if (have := math.prod(sizes.values())) != self.device_count:
            raise ValueError(f"mesh {dict(sizes)} has {have} devices; expected {self.device_count}, as the cluster has")
        mesh, one = tuple(sizes.items()), self.hardware
        if self.shape:
            return self._in_torus(mesh, axes)
        devices, neighbours = _on_hosts(mesh, axes, self.devices_per_host)
        if devices == neighbours:
            return Link(one.inside, one.inside, one.latency_inside, devices, neighbours)
        slower = min(one.inside, one.between)
        return Link(slower, slower, max(one.latency_inside, one.latency_between), devices, neighbours)

    def _in_torus(self, mesh: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> Link:
        one, spans = self.hardware, _in_slice(mesh, axes, self.shape)
        found, single = [], []
        for index, (extent, stride) in enumerate(spans):
            if extent > 1:
                ring = self.shape[:3] if len(self.shape) > 2 else self.shape[index : index + 1]
                closed = index < 3 and extent * stride == self.shape[index] and not any(s % one.wraps for s in ring)
                single.append(one.links[index] / stride)
                found.append(single[-1] * (2 if closed else 1))
        devices = math.prod(size for name, size in mesh if name in axes)
        # several axes at once carry as much each; where one is slow it moves the little that is left last
        bandwidth = max(max(found), len(found) * min(found)) if found else one.inside
        hops = max(1.0, sum(extent for extent, _ in spans if extent > 1) / 4)
        return Link(bandwidth, min(single, default=one.inside), one.latency_inside, devices, devices, hops)

    def seconds(
        self, kind: str, bytes_sent: float, axes: str | Sequence[str], sizes: Mapping[str, int], times: int = 1
    ) -> float:
        """Of `times` collectives along `axes` in which a device sends `bytes_sent` in all, as
        `artifex.scaling.communication` counts them: bytes_sent / bandwidth + times * steps * latency.

        Steps among n devices: n - 1 of an all-gather, reduce-scatter and broadcast, 2 (n - 1) of an all-reduce, 1 of a
        permutation, min(n - 1, 8) of an all-to-all. Of a group with k devices on each host, others elsewhere, a ring
        leaves the host with 1 / k of the bytes (every device has its own network link) and in n / k - 1 steps of n - 1
        (NCCL's src/graph/tuning.cc), an all-to-all with (n - k) / (n - 1); the slower of what leaves and what stays
        counts. A permutation goes to a single device; in a torus a byte of an all-to-all crosses n / 4 links (_BOOK).
        """
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            raise ValueError(f"collective {kind!r} is unknown; did you mean {near[0] if near else ', '.join(KINDS)}?")
        link, one = self.link(sizes, axes), self.hardware
        n, k = link.devices, link.neighbours
        if n == 1:
            return 0.0
        if kind == "collective-permute":
            return bytes_sent / link.single + times * link.latency
        leaves = (n - k) / (n - 1) if kind == "all-to-all" else 1 / k
        if n == k:
            seconds = bytes_sent * (link.hops if kind == "all-to-all" else 1.0) / link.bandwidth
        else:
            seconds = max(leaves * bytes_sent / one.between, (1 - leaves) * bytes_sent / one.inside)
        if kind == "all-to-all":
            return seconds + times * min(n - 1, TOGETHER) * link.latency
        far = 0 if n == k else math.ceil(n / k) - 1
        return seconds + times * RINGS[kind] * (far * one.latency_between + (n - 1 - far) * one.latency_inside)

    def compute_seconds(self, flops: float, bytes: float, dtype: str) -> float:
        """Of a device that computes `flops` in `dtype` and moves `bytes` of its memory: whichever takes longer."""
        one = self.hardware
        if dtype not in one.flops:
            raise ValueError(f"{one.name} has no FLOP/s of {dtype!r}; expected one of {', '.join(one.flops)}")
        return max(flops / (one.flops[dtype] * one.efficiency), bytes / one.bandwidth)


def _nearest(name: str) -> str:
    """The remedy for a name that is none."""
    head, _, sizes = name.rpartition(":") if re.search(r":[0-9x]+$", name) else (name, "", "")
    near = difflib.get_close_matches(head, HARDWARE, n=1, cutoff=0.5)
    known = f"did you mean {near[0]}{':' * bool(sizes)}{sizes}?" if near else f"known are {', '.join(HARDWARE)}."
    return f"{known} A cluster is {FORMS}"


def _bytes(text: str, memory: float | None) -> int | None:
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"cluster {text!r} with a memory of {memory} GB of each device; expected a number above 0")
    return None if memory is None else int(memory * GiB)


def _even(count: int, dims: int) -> tuple[int, ...]:
    """The most even shape of so many chips, 1s last: 2x4x4."""
    shape, left = [], count
    for dim in range(dims, 0, -1):
        most = int(left ** (1 / dim) + 1e-9)
        shape.append(left if dim == 1 else max(size for size in range(1, most + 1) if left % size == 0))
        left //= shape[-1]
    return tuple(sorted(shape, key=lambda size: (size == 1, size)))


@functools.lru_cache(maxsize=4096)
def _groups(mesh: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> np.ndarray:
    """[groups, devices of each]: numbers of the devices that differ along `axes` alone."""
    ids = np.arange(math.prod(size for _, size in mesh)).reshape([size for _, size in mesh])
    order = sorted(range(len(mesh)), key=lambda dim: mesh[dim][0] in axes)
    return ids.transpose(order).reshape(-1, math.prod(size for name, size in mesh if name in axes))


@functools.lru_cache(maxsize=4096)
def _on_hosts(mesh: tuple[tuple[str, int], ...], axes: tuple[str, ...], host: int) -> tuple[int, int]:
    """Devices of a group, and the fewest of one that are on one host."""
    groups = _groups(mesh, axes)
    marks = groups // host + np.arange(len(groups))[:, None] * (groups.size // host + 1)
    return groups.shape[1], int(np.unique(marks, return_counts=True)[1].min())


@functools.lru_cache(maxsize=4096)
def _in_slice(
    mesh: tuple[tuple[str, int], ...], axes: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(extent, stride) of the first group along each axis of a slice: how many places, and how far apart."""
    places = [np.unique(axis) for axis in np.unravel_index(_groups(mesh, axes)[0], shape)]
    return tuple((len(one), int(np.diff(one).min()) if len(one) > 1 else 1) for one in places)
