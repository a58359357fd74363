"""What the devices that are there really reach: products, memory and collectives, timed once and kept in a folder.

    measured = measure(folder=default_dir())
    measured.hardware(HARDWARE["gpu:h100"])           # its constants, with the measured ones in their place
    measured.seconds("all-reduce", 2**20, devices=8)  # between the sizes that were measured

A time is the median of several runs of a program that does one thing many times over, so that its start counts little.
What fails is kept as the error that it failed with, never as a number. Whole steps of training that a tune measured
(`artifex.tuning`) stand beside these rows: what they reach goes before what products alone reach.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from artifex.scaling.autodist.cluster import KINDS, RINGS, Hardware

SCHEMA = 1
FILE = "profile.json"
COLLECTIVES: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
"""Those that are timed -> bytes that one of n devices sends to each that it has, as `artifex.scaling.communication`."""

FAILURES = (jax.errors.JaxRuntimeError, ValueError, TypeError, NotImplementedError, MemoryError, OverflowError)
Key = tuple[str, str, int, int]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: n of [n, n] products and their dtypes, bytes that elementwise work reads and writes, bytes that
    a device sends in a collective, in float32. A program has `turns` of it, and is run `repeats` times."""

    products: tuple[int, ...] = (1_024, 4_096, 8_192)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    elementwise: tuple[int, ...] = (2**26, 2**30)
    collectives: tuple[int, ...] = (2**12, 2**17, 2**22, 2**27)
    turns: int = 10
    repeats: int = 5


ON_CPU = Sizes((256, 512, 1_024), elementwise=(2**23, 2**26), collectives=(2**12, 2**16, 2**20, 2**23), turns=4)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: `what` is "product", "elementwise" or a collective, `size` as in `Sizes`, `devices` how many did
    it at once; the `seconds` that it took, or else the `error`."""

    what: str
    dtype: str
    size: int
    devices: int
    seconds: float | None = None
    error: str = ""

    def __post_init__(self) -> None:
        named = self.what in ("product", "elementwise", *KINDS) and isinstance(self.dtype, str)
        counted = all(type(n) is int and n > 0 for n in (self.size, self.devices))
        timed = isinstance(self.seconds, float) and 0 < self.seconds < math.inf and self.error == ""
        failed = self.seconds is None and isinstance(self.error, str) and self.error != ""
        if not (named and counted and (timed or failed)):
            raise ValueError(f"row {dataclasses.astuple(self)} is no measurement")

    @property
    def key(self) -> Key:
        return self.what, self.dtype, self.size, self.devices

    @property
    def rate(self) -> float:
        """FLOP/s of a product, else bytes/s."""
        assert self.seconds is not None, self
        return (2 * self.size**3 if self.what == "product" else self.size) / self.seconds


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of training that was measured: `seconds` of it, of `predicted` ones by what was known then. Of a device,
    of so many `devices`: its `flops`, and by prediction the seconds of the `rest`, what it sends above all."""

    model: str
    spread: str
    batch: int
    dtype: str
    devices: int
    flops: float
    rest: float
    predicted: float
    seconds: float

    def __post_init__(self) -> None:
        named = all(isinstance(text, str) and text for text in (self.model, self.spread, self.dtype))
        counted = all(type(n) is int and n > 0 for n in (self.batch, self.devices))
        numbers = (self.flops, self.predicted, self.seconds)
        timed = all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers) and 0 <= self.rest < math.inf
        if not (named and counted and timed):
            raise ValueError(f"step {dataclasses.astuple(self)} is no measurement")

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        return self.model, self.spread, self.batch, self.dtype, self.devices

    @property
    def rate(self) -> float:
        """FLOP/s of a device while it computes; 0 where the rest alone is predicted to take longer."""
        return self.flops / (self.seconds - self.rest) if self.seconds > self.rest else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Measured:
    """What was measured on devices of a kind, by a version of JAX. Prints as a table."""

    device: str
    version: str
    rows: tuple[Row, ...]
    steps: tuple[Step, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> Measured:
        """What a folder has. Raises `FileNotFoundError`, and `ValueError` for a file that is no profile."""
        path = Path(folder) / FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != SCHEMA:
                raise ValueError(f"its schema is {found['schema']!r}, expected {SCHEMA}")
            rows = tuple(Row(**row) for row in found["rows"])
            steps = tuple(Step(**step) for step in found.get("steps", ()))  # which files of before have not
            return cls(str(found["device"]), str(found["jax"]), rows, steps)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no profile: {_said(error)}; give re_profile to measure again") from error

    @property
    def failed(self) -> tuple[Row, ...]:
        """What could not be measured."""
        return tuple(row for row in self.rows if row.error)

    def seconds(self, kind: str, bytes_sent: float, devices: int) -> float:
        """Of a collective among `devices` in which each sends `bytes_sent`: between measured sizes a line through
        (log bytes, log seconds), below the least the time of the least, above the greatest in proportion. Devices of
        a number that was not measured have the times of the nearest. Raises `ValueError` where there are none."""
        rows = [row for row in self.rows if row.what == kind and not row.error]
        if not rows:
            why = next((row.error for row in self.failed if row.what == kind), "it was not asked for")
            raise ValueError(f"no {kind} was measured on {self.device}: {why}; give re_profile to measure again")
        if devices < 2 or bytes_sent <= 0:
            return 0.0
        near = min({row.devices for row in rows}, key=lambda n: (abs(math.log(n / devices)), n))
        points = sorted((row.size, row.seconds or 0.0) for row in rows if row.devices == near)
        largest, longest = points[-1]
        if bytes_sent > largest:
            return longest * bytes_sent / largest
        logs = np.log(np.array(points))
        return float(np.exp(np.interp(math.log(bytes_sent), logs[:, 0], logs[:, 1])))

    def hardware(self, base: Hardware, devices: int | None = None) -> Hardware:
        """`base` with what was measured in its place: by dtype the fastest product, so that its efficiency is 1; the
        memory by the largest elementwise work; `inside` and its latency by the best of the rings. Of each the rows of
        most devices at once. Where whole steps were measured, the median of what these reach goes before products: of
        steps on as many `devices`, or nearly, by default on the most. What was not measured stays, `links` of a slice
        too."""
        new: dict[str, Any] = {"flops": {dtype: peak * base.efficiency for dtype, peak in base.flops.items()}}
        for row in sorted(self._widest("product"), key=lambda row: row.rate):
            new["flops"][row.dtype] = row.rate
        new["flops"] |= self._of_steps(devices)
        if rows := self._widest("elementwise"):
            new["bandwidth"] = max(rows, key=lambda row: row.size).rate
        if rows := self._widest(*RINGS):
            new["inside"] = max(row.rate for row in rows)
            new["latency_inside"] = min((row.seconds or 0.0) / (RINGS[row.what] * (row.devices - 1)) for row in rows)
        kinds = [row.what for row in self.rows if not row.error] + ["steps of training"] * bool(self.steps)
        what = ", ".join(dict.fromkeys(kinds)) or "nothing"
        new["source"] = f"measured on {self.device} with JAX {self.version}: {what}; the rest: {base.source}"
        return dataclasses.replace(base, efficiency=1.0, **new)

    def _of_steps(self, devices: int | None) -> dict[str, float]:
        """Dtype -> the median FLOP/s of steps in it, those of the nearest number of devices."""
        found: dict[str, float] = {}
        for dtype in {step.dtype for step in self.steps}:
            steps = [step for step in self.steps if step.dtype == dtype and step.rate > 0]
            counts = {step.devices for step in steps}
            wanted = max(counts, default=1) if devices is None else devices
            near = min(counts, key=lambda n: (abs(math.log(n / wanted)), n), default=None)
            if rates := [step.rate for step in steps if step.devices == near]:
                found[dtype] = statistics.median(rates)
        return found

    def _widest(self, *what: str) -> list[Row]:
        """Rows of `what`, those of most devices at once."""
        rows = [row for row in self.rows if row.what in what and not row.error]
        most = max((row.devices for row in rows), default=0)
        return [row for row in rows if row.devices == most]

    def __repr__(self) -> str:
        lines = [
            f"{self.device}, JAX {self.version}",
            f"{'':18} {'dtype':9} {'size':>12} {'devices':>7} {'seconds':>10}  rate",
        ]
        for row in self.rows:
            unit = "GFLOP/s" if row.what == "product" else "GB/s"
            result = f"failed: {row.error}" if row.error else f"{row.seconds:10.3g}  {row.rate / 1e9:,.4g} {unit}"
            lines.append(f"{row.what:18} {row.dtype:9} {row.size:12,} {row.devices:7} {result}")
        for step in self.steps:
            reached = f"{step.seconds:10.3g}  {step.rate / 1e9:,.4g} GFLOP/s, {step.predicted:.3g} s predicted"
            lines.append(f"{'step':18} {step.dtype:9} {'':12} {step.devices:7} {reached}: {step.model}, {step.spread}")
        return "\n".join(lines)


def default_dir(device: str | None = None) -> Path:
    """Where measurements of a kind of device lie; by default of the kind that is there."""
    kind = jax.local_devices()[0].device_kind if device is None else device
    return Path.home() / ".cache/artifex/autodist/1.0" / re.sub(r"[^\w.-]+", "-", kind)


def measure(
    devices: Sequence[Any] | None = None,
    *,
    folder: str | Path,
    parallel: bool = True,
    again: bool = False,
    sizes: Sizes | None = None,
) -> Measured:
    """Time what the folder does not have yet, or all of it `again`, and keep it there.

    Products and elementwise work run on all `devices` (by default those of this process) at once, as in a step of
    training; without `parallel` on the first alone. Collectives run in groups of 2, 4, 8 and so on, and in one of all.
    Raises `ValueError` where the folder is of another kind of device or version of JAX.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    device, sizes = devices[0].device_kind, sizes or (ON_CPU if devices[0].platform == "cpu" else Sizes())
    have: dict[Key, Row] = {}
    steps: tuple[Step, ...] = ()
    if not again and (Path(folder) / FILE).exists():
        found = _of_these(folder, device)
        have, steps = {row.key: row for row in found.rows}, found.steps
    wanted = list(dict.fromkeys(_wanted(len(devices) if parallel else 1, len(devices), sizes)))
    new = {key: _measure(key, devices, sizes) for key in wanted if key not in have}
    if new:
        _write(Path(folder), Measured(device, jax.__version__, tuple((have | new).values()), steps))
    return Measured(device, jax.__version__, tuple((have | new)[key] for key in wanted), steps)


def add_steps(folder: str | Path, device: str, steps: Sequence[Step]) -> Measured:
    """Keep measured steps on a kind of device beside what the folder has; of the same step the newest counts. Raises
    `ValueError` where the folder is of another kind of device or version of JAX."""
    have = Measured(device, jax.__version__, ())
    if (Path(folder) / FILE).exists():
        have = _of_these(folder, device)
    known = {step.key: step for step in (*have.steps, *steps)}
    found = dataclasses.replace(have, steps=tuple(known.values()))
    _write(Path(folder), found)
    return found


def _of_these(folder: str | Path, device: str) -> Measured:
    """What a folder has of this kind of device, by this JAX. Raises `ValueError` where it is of others."""
    found = Measured.load(folder)
    for what, is_, expected in (("device", found.device, device), ("JAX", found.version, jax.__version__)):
        if is_ != expected:
            raise ValueError(
                f"{Path(folder) / FILE} has measurements of {what} {is_}, but this is {expected}; give re_profile "
                "to measure again, or another profile_dir"
            )
    return found


def _write(folder: Path, measured: Measured) -> None:
    """Whole or not at all: other processes may read it."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.{os.getpid()}"
    rows = [dataclasses.asdict(row) for row in measured.rows]
    what: dict[str, Any] = {"schema": SCHEMA, "device": measured.device, "jax": measured.version, "rows": rows}
    if measured.steps:
        what["steps"] = [dataclasses.asdict(step) for step in measured.steps]
    part.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / FILE)


def _wanted(computing: int, devices: int, sizes: Sizes) -> Iterator[Key]:
    """What there is to measure, with so many devices that compute at once, and that talk."""
    for dtype in sizes.dtypes:
        yield from (("product", dtype, size, computing) for size in sizes.products)
    yield from (("elementwise", "float32", size, computing) for size in sizes.elementwise)
    groups = [n for n in (2**power for power in range(1, devices.bit_length())) if devices % n == 0]
    for kind, sent in COLLECTIVES.items():
        for n in dict.fromkeys([*groups, *[devices] * (devices > 1)]):
            # each has a whole part for every other
            numbers = (max(1, round(size / 4 / sent(n) / n)) * n for size in sizes.collectives)
            yield from ((kind, "float32", round(4 * number * sent(n)), n) for number in numbers)


def _measure(key: Key, devices: Sequence[Any], sizes: Sizes) -> Row:
    try:
        return Row(*key, seconds=_time(*_program(key, devices, sizes.turns), sizes) / sizes.turns)
    except FAILURES as error:
        return Row(*key, error=_said(error))


def _program(key: Key, devices: Sequence[Any], turns: int) -> tuple[Callable[..., Any], Any]:
    """A program that does it `turns` times over, on devices in groups, and what it is given."""
    what, dtype, size, n = key
    mesh = Mesh(np.array(devices if what in COLLECTIVES else devices[:n]).reshape(-1, n), ("groups", "group"))
    if what == "product":
        shape, step = (size, size), lambda x, first: x @ first
    elif what == "elementwise":
        shape, step = (size // 2 // 4,), lambda x, first: x * 0.5 + 1.0
    else:
        shape, step = (round(size / 4 / COLLECTIVES[what](n)),), _step(what, n)

    def several(first: jax.Array) -> jax.Array:
        # the barrier: XLA would see through a gather of which one part is read
        return lax.fori_loop(0, turns, lambda _, x: lax.optimization_barrier(step(x, first)), first)

    def start() -> jax.Array:
        if what == "product":  # as large as it was after each turn; zeros need less power, and clocks rise
            return jax.random.normal(jax.random.key(0), shape, dtype) * jnp.array(size**-0.5, dtype)
        return jnp.zeros(shape, dtype)  # which no sum makes larger

    spec = PartitionSpec(("groups", "group"))
    program = jax.shard_map(several, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    given = jax.shard_map(start, mesh=mesh, in_specs=(), out_specs=spec, check_vma=False)
    return jax.jit(program), jax.jit(given)()


def _step(kind: str, n: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The collective, on an array that comes out as it went in."""
    if kind == "all-reduce":
        return lambda x, _: lax.psum(x, "group")
    if kind == "all-gather":
        return lambda x, _: lax.optimization_barrier(lax.all_gather(x, "group", tiled=True))[: len(x)]
    if kind == "reduce-scatter":
        return lambda x, _: lax.dynamic_update_slice(x, lax.psum_scatter(x, "group", tiled=True), (0,))
    if kind == "all-to-all":
        return lambda x, _: lax.all_to_all(x, "group", 0, 0, tiled=True)
    return lambda x, _: lax.ppermute(x, "group", [(i, (i + 1) % n) for i in range(n)])


def _time(program: Callable[[Any], Any], given: Any, sizes: Sizes) -> float:
    """Seconds of a run, the first left out."""
    jax.block_until_ready(program(given))
    times = []
    for _ in range(sizes.repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(given))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _said(error: Exception) -> str:
    """An error in a line."""
    text = next(iter(str(error).splitlines()), "")[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
