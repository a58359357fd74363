"""Device meshes: their shape chosen, checked and built, with every device used.

A *dim* belongs to a tensor, an *axis* to a mesh. All meshes here have Auto axes: models constrain activations by name
and XLA places the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental import mesh_utils as jax_mesh_utils
from jax.sharding import AxisType, Mesh

if TYPE_CHECKING:
    from artifex.config import DeviceConfig
    from artifex.scaling.sharding import ParallelismConfig

SIZE_AXES = ("pipeline", "replica", "data", "fsdp", "expert", "context", "tensor")
"""The mesh axes a configuration sizes one by one, in mesh order: the chattiest last, on the nearest devices."""

TWO_AXES = ("data", "model")
"""The mesh axes of a two-dimensional shape (batch, model)."""

NODE_DEVICES = 8  # devices joined by the fast links of one machine
DEVICE_BYTES = 80e9
BYTES_PER_PARAMETER = 16  # float32: the parameter, its gradient and Adam's two moments
ACTIVATION_BYTES = 34  # per position, channel and layer; Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1


def create_device_mesh(
    mesh_shape: Sequence[int], axis_names: Sequence[str], devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all of `devices` (default: all there are), laid out for their physical links.

    Where they are in several machines, or slices of a TPU, the first axes go across and the last stay inside one, as
    far as their sizes divide.

    Raises `TypeError` for a shape that is not a tuple or list of integers or names that are not strings, `ValueError`
    for sizes below 1, a product other than the device count, and names that repeat or do not match the shape.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _checked_shape(mesh_shape, len(devices))
    names = _checked_names(axis_names, shape)
    return Mesh(_grid(shape, devices), names, axis_types=(AxisType.Auto,) * len(shape))


def _grid(shape: tuple[int, ...], devices: Sequence[Any]) -> Any:
    """The devices in an array of `shape`, those with the fastest links nearest in the last dims."""
    by_slice = {getattr(device, "slice_index", 0) for device in devices}
    by_process = {device.process_index for device in devices}
    # the chips of a TPU slice have links of their own, whatever machines they are in
    islands = len(by_slice) if devices[0].platform == "tpu" or len(by_slice) > 1 else len(by_process)
    across, rest = [], islands
    for size in shape:
        across.append(math.gcd(size, rest))
        rest //= across[-1]
    # Splitting a physical axis is the last resort of these routines, and better than refusing a shape.
    if islands == 1 or rest > 1 or len(devices) % islands:
        return jax_mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax_mesh_utils.create_hybrid_device_mesh(
        tuple(size // outer for size, outer in zip(shape, across, strict=True)),
        tuple(across),
        devices,
        process_is_granule=len(by_slice) == 1,
        allow_split_physical_axes=True,
    )


def setup_mesh(mesh_shape: Sequence[int] | None = None, device_config: DeviceConfig | None = None) -> Mesh:
    """The mesh of a run over all devices: explicit shape, then configuration, then auto-detection.

    Raises as `mesh_layout` and `create_device_mesh` do.
    """
    return create_device_mesh(*mesh_layout(device_config, len(jax.devices()), mesh_shape))


def mesh_layout(
    device_config: DeviceConfig | None, device_count: int, mesh_shape: Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Mesh shape and axis names of a run on `device_count` devices; needs none of them.

    1. `mesh_shape`, or else `device_config.mesh_shape`: (batch, model) on the axes ("data", "model").
    2. `device_config.pipeline`, `.data` and the others of `SIZE_AXES`: an axis for each that is not 1, in this order;
       -1 takes the rest.
    3. Auto-detection, unless `device_config.auto_detect_mesh` is false: every device on the batch dim, (n, 1).

    Raises `TypeError` for a shape of anything but integers, `ValueError` for one that is not (batch, model), for sizes
    that do not multiply to the device count, and where nothing is given and nothing may be detected.
    """
    if mesh_shape is None and device_config is not None:
        mesh_shape = device_config.mesh_shape
    if mesh_shape is not None:
        shape = _checked_shape(mesh_shape)
        if len(shape) != 2:
            raise ValueError(
                f"mesh_shape {shape} has {len(shape)} entries; it is (batch, model), such as ({device_count}, 1); "
                "create_device_mesh takes other ranks"
            )
        return _checked_shape(shape, device_count), TWO_AXES
    if device_config is not None:
        sizes = {axis: getattr(device_config, axis) for axis in SIZE_AXES}
        sizes = {axis: size for axis, size in sizes.items() if size != 1}
        if sizes:
            return _fill(sizes, device_count), tuple(sizes)
        if not device_config.auto_detect_mesh:
            raise ValueError(
                f"auto_detect_mesh is false and no mesh is given for {device_count} devices; set mesh_shape "
                f"to (batch, model), such as ({device_count}, 1), or a size such as data, or auto_detect_mesh to true"
            )
    return _checked_shape((device_count, 1), device_count), TWO_AXES


def _fill(sizes: dict[str, int], device_count: int) -> tuple[int, ...]:
    """The sizes with -1 replaced by what the others leave of the devices."""
    written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"sizes {written}: each is at least 1, or -1 to take the rest of the {device_count} devices")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"sizes {written}: only one axis can take the rest; give {' or '.join(open_axes)} a size")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and device_count % known == 0:
        return tuple(device_count // known if size == -1 else size for size in sizes.values())
    if known == device_count:
        return tuple(sizes.values())
    have = f"have the product {known}, which does not divide" if open_axes else f"multiply to {known}, not to"
    raise ValueError(f"sizes {written} {have} the {device_count} devices; {_remedy(sizes, device_count)}")


@contextlib.contextmanager
def simulation_hint(device_config: DeviceConfig, device_count: int) -> Iterator[None]:
    """Within it, a `ValueError` about a mesh of more devices than a CPU shows says how a CPU simulates them."""
    try:
        yield
    except ValueError as error:
        sizes = device_config.mesh_shape or [getattr(device_config, axis) for axis in SIZE_AXES]
        wanted = math.prod(size for size in sizes if size > 0)
        if wanted <= device_count or jax.default_backend() != "cpu":
            raise
        raise ValueError(f"{error}; or simulate {wanted} on a CPU: JAX_NUM_CPU_DEVICES={wanted}") from None


def _remedy(sizes: dict[str, int], device_count: int) -> str:
    """The first axis whose size alone can be changed to use every device; for a single size in which these have no
    part, the next smaller one that they have."""
    (axis, size), *more = sizes.items()
    smaller = [n for n in range(2, size) if device_count % n == 0]
    if not more and smaller and size < device_count and device_count % size:
        return f"set {axis}={smaller[-1]} and {'data' if axis != 'data' else 'fsdp'}=-1, or {axis}=-1"
    for axis in dict.fromkeys(("data", "fsdp", "tensor", *sizes)):
        others = math.prod(size for other, size in sizes.items() if other != axis and size != -1)
        if device_count % others == 0:
            return f"set {axis}={device_count // others}" + (f" or {axis}=-1" if -1 not in sizes.values() else "")
    return f"choose sizes whose product is {device_count}"


def get_optimal_mesh_shape(device_count: int, dimensions: int = 2) -> tuple[int, ...]:
    """The most balanced shape that uses all devices: the smallest largest axis, then the largest smallest axis, and so
    on inwards; ascending. 8 is (2, 4), in four dimensions (1, 2, 2, 2).

    Raises `TypeError` for anything but integers and `ValueError` below 1.
    """
    count, rank = check_count("device_count", device_count), check_count("dimensions", dimensions)
    below = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    divisors = sorted({*below, *(count // n for n in below)})

    @functools.cache
    def balanced(n: int, rank: int, low: int, high: int) -> tuple[int, ...] | None:
        """`n` as `rank` ascending factors from `low` to `high`, or None."""
        if rank < 2:
            factors = (n,) * rank
            return factors if math.prod(factors) == n and all(low <= f <= high for f in factors) else None
        for largest in divisors:
            if n % largest or not low <= largest <= high or largest**rank < n:
                continue
            rest = n // largest
            for smallest in reversed(divisors):
                if rest % smallest or smallest < low or smallest ** (rank - 1) > rest:
                    continue
                inner = balanced(rest // smallest, rank - 2, smallest, largest)
                if inner is not None:
                    return (smallest, *inner, largest)
        return None

    shape = balanced(count, rank, 1, count)
    assert shape is not None  # (1, ..., 1, count) always fits
    return shape


@dataclasses.dataclass(frozen=True)
class DeviceMeshManager:
    """Chooses, checks and creates meshes, over `devices` or over all there are.

    A `mesh_shape` with its `axis_names` fixes the mesh: `create_mesh` builds it and `create_mesh_from_config` refuses a
    configuration of another. Without them the manager only advises, and takes any configuration.
    """

    mesh_shape: Sequence[int] | None = None
    axis_names: Sequence[str] | None = None
    devices: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if (self.mesh_shape is None) != (self.axis_names is None):
            raise ValueError(
                f"mesh_shape {self.mesh_shape} and axis_names {self.axis_names} belong together; give both or neither"
            )
        if self.mesh_shape is not None and self.axis_names is not None:
            shape = _checked_shape(self.mesh_shape)
            object.__setattr__(self, "mesh_shape", shape)
            object.__setattr__(self, "axis_names", _checked_names(self.axis_names, shape))

    def create_mesh(self) -> Mesh:
        """The mesh of the manager's own shape. Raises `ValueError` where it has none or the devices do not fit it."""
        if self.mesh_shape is None or self.axis_names is None:
            raise ValueError(
                "this DeviceMeshManager has no mesh_shape; give it one with axis_names, or use create_mesh_from_config"
            )
        return create_device_mesh(self.mesh_shape, self.axis_names, self.devices)

    def create_mesh_from_config(self, parallel_config: ParallelismConfig) -> Mesh:
        """The mesh of a `ParallelismConfig`.

        Raises `ValueError` where the configuration is not valid, the devices do not fit it, or the manager has
        another shape.
        """
        parallel_config.check()
        own = (self.mesh_shape, self.axis_names)
        asked = (tuple(parallel_config.mesh_shape), tuple(parallel_config.mesh_axis_names))
        if self.mesh_shape is not None and own != asked:
            raise ValueError(
                f"the configuration's mesh is {asked[0]} on {asked[1]}, this manager's {own[0]} on {own[1]}; "
                "make the manager without a shape to take any configuration"
            )
        return create_device_mesh(*asked, self.devices)

    def get_optimal_mesh_shape(self, device_count: int, dimensions: int = 2) -> tuple[int, ...]:
        """The most balanced shape that uses all devices; see the function of this name."""
        return get_optimal_mesh_shape(device_count, dimensions)

    def optimize_for_transformer(
        self,
        device_count: int,
        model_size: str | int = "7B",
        sequence_length: int = 2048,
        *,
        max_tensor_parallel: int = NODE_DEVICES,
    ) -> tuple[int, int]:
        """(data, model) over all devices: the least tensor parallelism with which one replica fits its devices.

        With N parameters (`model_size`: "125M", "1.5B", "70b" or a number) and S positions, a replica holds

            16 N + 34 S width layers bytes,    where layers = width / 128 and 12 layers width^2 = N

        (float32 parameters, gradients and Adam moments; the activations of one sequence, Korthikanti et al. 2022,
        arXiv:2205.05198), on devices of 80 GB. The model axis is the smallest divisor of `device_count` that covers
        the need and is at most `max_tensor_parallel` (a node of 8), or else the largest such divisor.
        Raises `TypeError` and `ValueError` for sizes it cannot read.
        """
        count = check_count("device_count", device_count)
        length = check_count("sequence_length", sequence_length)
        cap = check_count("max_tensor_parallel", max_tensor_parallel)
        parameters = _parameters(model_size)
        width = (parameters * 128 / 12) ** (1 / 3)
        replica = BYTES_PER_PARAMETER * parameters + ACTIVATION_BYTES * length * width * (width / 128)
        divisors = [n for n in range(1, min(cap, count) + 1) if count % n == 0]
        tensor = next((n for n in divisors if n * DEVICE_BYTES >= replica), divisors[-1])
        return count // tensor, tensor

    def validate_mesh_config(self, mesh_shape: Sequence[int], device_count: int) -> bool:
        """Whether `mesh_shape` is a tuple or list of positive integers whose product is `device_count`."""
        try:
            _checked_shape(mesh_shape, check_count("device_count", device_count))
        except (TypeError, ValueError):
            return False
        return True


def _checked_shape(mesh_shape: Any, device_count: int | None = None) -> tuple[int, ...]:
    """`mesh_shape` as a tuple of positive integers whose product is `device_count`, where that is given."""
    if not isinstance(mesh_shape, list | tuple) or not all(map(_is_integer, mesh_shape)):
        raise TypeError("mesh_shape must be a tuple of integers")
    shape = tuple(int(size) for size in mesh_shape)
    if not shape or min(shape) < 1:
        raise ValueError(
            f"mesh_shape {shape} is not a mesh: it has at least one axis, and each axis at least one device"
        )
    if device_count is not None and math.prod(shape) != device_count:
        raise ValueError(f"Number of devices {device_count} must equal the product of mesh_shape {shape}")
    return shape


def _checked_names(axis_names: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    if isinstance(axis_names, str) or not isinstance(axis_names, Iterable):
        raise TypeError(f"axis_names must be a tuple of strings, got {axis_names!r}")
    names = tuple(axis_names)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"axis_names must be a tuple of strings, got {names!r}")
    if len(names) != len(shape):
        raise ValueError(
            f"mesh_shape {shape} has {len(shape)} axes but axis_names {names} {len(names)}; name each axis"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"axis_names {names} repeat a name; give each axis a name of its own")
    return names


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value`, or `TypeError` where it is no integer and `ValueError` where it is below `least`."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    return int(value)


_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _parameters(model_size: Any) -> int:
    """The number of parameters that "125M", "1.5B", "70b" or an integer stands for."""
    if not isinstance(model_size, str):
        return check_count("model_size", model_size)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT])", model_size.strip().upper())
    if not match or not float(match[1]):
        raise ValueError(
            f"model_size {model_size!r} is not a number of parameters; write it like '125M', '7B' or '1.5B', "
            "or give an integer"
        )
    return round(float(match[1]) * _UNITS[match[2]])
