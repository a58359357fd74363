"""Machines that are not there: their names, what a chip of theirs holds, and the devices that a compiler makes of them.

    Target.parse("tpu:v5e:4x4")    # 16 chips of a TPU slice, by libtpu
    Target.parse("gpu:h100:2x8")   # 2 hosts of 8 GPUs, by XLA's plugin for CUDA; no driver
    Target.parse("cpu:8")          # 8 devices that a CPU simulates

A process compiles for one target: what `environment` says must be set before JAX is imported. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

MiB, GiB = 2**20, 2**30
FORMS = "tpu:CHIP:XxY[xZ], gpu:CHIP:HOSTSxGPUS or cpu:N, such as tpu:v5e:4x4, gpu:h100:2x8, cpu:8"
SIMULATED = 4_096  # each device of a CPU takes memory and threads of this machine
GPU_FRACTION = 0.75
"""What JAX takes of a GPU's memory where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing else, by its page on that."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a target is. `memory`: bytes that a program may take, and `source` of that number; `dims` of
    the shapes that such machines come in; `devices`: how many JAX sees in a chip."""

    platform: Literal["tpu", "gpu"]
    memory: int
    source: str
    dims: int
    devices: int = 1
    text: bool = True  # whether the compiler can write its program down
    described: str = ""  # what a compiler without the device must be told


_LIBTPU = "what libtpu 0.0.42 leaves a program of {} GB of HBM"

CHIPS: Mapping[str, Chip] = {
    "v5e": Chip("tpu", 16_128 * MiB, _LIBTPU.format(16), 2),
    "v5p": Chip("tpu", 98_038 * MiB, _LIBTPU.format(95), 3, text=False),
    "v6e": Chip("tpu", 32_000 * MiB, _LIBTPU.format(32), 2, text=False),
    "tpu7x": Chip("tpu", 97_024 * MiB, _LIBTPU.format("a core's 96"), 3, devices=2, text=False),
    "h100": Chip(
        "gpu",
        84_942_979_072,
        "an H100 SXM's 80 GB, as XLA describes it",
        2,
        described=(
            "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
            "shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 "
            "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: "
            "3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 "
            "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: "
            '65536 registers_per_block_limit: 65536 } platform_name: "CUDA" dnn_version_info { major: 9 } '
            'device_description_str: "NVIDIA H100 80GB HBM3"'
        ),
    ),
}
"""The memory of a TPU is what its compiler names when it refuses a program that is too large."""

_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # whatever the slice: without one libtpu asks the network
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """So many chips of a kind, in a shape. `chip` is None where a CPU simulates them."""

    name: str
    kind: str
    chip: Chip | None
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target of a name. Raises `ValueError` that says what is wrong with it, and a name that is right."""
        platform, *rest = text.strip().lower().split(":")
        name, kind = ":".join([platform, *rest]), rest[0] if rest else ""
        if platform in CHIPS:
            raise ValueError(f"target {text!r} names no platform; did you mean {CHIPS[platform].platform}:{name}?")
        if platform not in ("tpu", "gpu", "cpu"):
            raise ValueError(f"target {text!r} is of no platform that is known; a target is {FORMS}")
        if platform == "cpu":
            if len(rest) != 1 or not re.fullmatch(r"[1-9][0-9]{0,3}", kind) or int(kind) > SIMULATED:
                raise ValueError(
                    f"target {text!r} of a CPU has {':'.join(rest)!r} simulated devices; expected a number from 1 to "
                    f"{SIMULATED:,}, such as cpu:8"
                )
            return cls(name, "cpu", None, (int(kind),))
        known = [chip for chip, what in CHIPS.items() if what.platform == platform]
        if kind not in known:
            what = f"is of {kind!r}, no {platform.upper()} that is known" if kind else "names no chip"
            raise ValueError(f"target {text!r} {what}; expected one of {', '.join(known)}, as in {FORMS}")
        chip = CHIPS[kind]
        example = f"{platform}:{kind}:" + ("2x8" if platform == "gpu" else "x".join("4" * chip.dims))
        sizes = ":".join(rest[1:])
        if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", sizes) or sizes.count("x") != chip.dims - 1:
            what = "hosts and GPUs of each" if platform == "gpu" else f"{chip.dims} sizes of the slice"
            raise ValueError(f"target {text!r} has the shape {sizes!r}; expected the {what}, such as {example}")
        return cls(name, kind, chip, tuple(map(int, sizes.split("x"))))

    @property
    def platform(self) -> Literal["cpu", "gpu", "tpu"]:
        """That of its devices."""
        return "cpu" if self.chip is None else self.chip.platform

    @property
    def device_count(self) -> int:
        """How many devices JAX sees there."""
        return math.prod(self.shape) * (1 if self.chip is None else self.chip.devices)

    @property
    def memory(self) -> int | None:
        """Bytes of a device that a program may take; None where a CPU simulates it. Of a GPU what JAX takes by default,
        or what XLA_PYTHON_CLIENT_MEM_FRACTION says."""
        if self.chip is None or self.platform == "tpu":
            return None if self.chip is None else self.chip.memory
        fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        with contextlib.suppress(ValueError):  # JAX's to refuse
            return int(self.chip.memory * (GPU_FRACTION if fraction is None else float(fraction)))
        return int(self.chip.memory * GPU_FRACTION)

    @property
    def memory_source(self) -> str:
        """Where the number comes from."""
        assert self.chip is not None and self.memory is not None
        if self.platform == "tpu":
            return self.chip.source
        return f"{self.memory / self.chip.memory:.0%} of {self.chip.source}: XLA_PYTHON_CLIENT_MEM_FRACTION"

    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for it, before JAX is imported. No accelerator of this machine is
        touched, and no compiled program taken from a cache: how long it takes to compile is part of the answer."""
        own = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        if self.chip is None:
            return own | {"JAX_NUM_CPU_DEVICES": str(self.device_count)}
        return own | (_TPU if self.platform == "tpu" else {})

    def check_compiler(self) -> None:
        """Raise `ImportError`, with the extra to install, where its compiler is missing."""
        if self.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
            raise ImportError(f"target {self.name} needs libtpu, which compiles for TPUs: pip install 'artifex[tpu]'")
        if self.platform == "gpu" and _plugin() is None:
            raise ImportError(
                f"target {self.name} needs JAX's plugin for CUDA, which compiles without a driver: "
                "pip install 'artifex[gpu-targets]'"
            )

    def compiler(self) -> str:
        """What compiles for it, with versions."""
        names = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13")}
        found = []
        for name in ("jax", *names.get(self.platform, ())):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{name} {importlib.metadata.version(name)}")
        return ", ".join(found)

    def devices(self) -> list[Any]:
        """Its devices, which can be compiled for and nothing else. Raises `ValueError` for a slice that is none."""
        import jax
        from jax.experimental import topologies

        if self.chip is None:
            return jax.devices("cpu")[: self.device_count]
        try:
            if self.platform == "tpu":
                shape = self.name.removeprefix("tpu:")
                topology = topologies.get_topology_desc(platform="tpu", topology_name=shape)
            else:
                _load_cuda()
                hosts = "x".join(map(str, self.shape))
                how = {"target_config": self.chip.described, "topology": f"1x{hosts}"}
                topology = topologies.get_topology_desc(platform="cuda", topology_name=self.kind, **how)
        except jax.errors.JaxRuntimeError as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"target {self.name} is no machine that its compiler knows: {said}") from error
        return list(topology.devices)


def _plugin() -> str | None:
    """The module of JAX's plugin for CUDA that is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


def _load_cuda() -> None:
    """Register the compiler for CUDA, which needs no driver though the plugin's own start does."""
    import jax

    name = _plugin()
    assert name is not None
    plugin = importlib.import_module(name)
    # by name: it is no part of JAX's interface
    xla_client = importlib.import_module("jax._src.lib").xla_client
    library = str(pathlib.Path(plugin.__file__ or "").parent / "xla_cuda_plugin.so")
    # without a driver the first raises, and is loaded all the same; with one, the second has nothing left to do
    with contextlib.suppress(RuntimeError, jax.errors.JaxRuntimeError):
        plugin.initialize()
    with contextlib.suppress(RuntimeError, jax.errors.JaxRuntimeError):
        xla_client.load_pjrt_plugin_dynamically("cuda", library)
