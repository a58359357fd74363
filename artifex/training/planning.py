"""A run as the planner sees it: its step under any way to spread it, traced on devices that need not exist."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh

from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.scaling.autodist.config import GB, AutoDistConfig
from artifex.scaling.autodist.estimate import Traced
from artifex.scaling.autodist.planned import Planned, Proof
from artifex.scaling.autodist.sketch import Leaf
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.execution import Platform
from artifex.scaling.fits import check_fits
from artifex.scaling.placement import bytes_on_device, leaves_with_names, size_text
from artifex.scaling.targets import Target
from artifex.training.for_target import ask
from artifex.training.memory import device_bytes, placed_batch
from artifex.training.state import Blueprint, blueprint, planned
from artifex.training.step import make_step
from artifex.training.task import attention_of, batch_shapes


class RunSubject:
    """The run of a `Config`, whose `device` section, remat and microbatches the planner chooses."""

    def __init__(self, config: Config, *, trains: bool = True) -> None:
        self.config, self.trains = config, trains
        self.name = config.model.name
        self.rows = config.training.batch_size
        self.dtype = config.training.compute_dtype

    def __reduce__(self) -> Any:
        """What a process that searches for another is told."""
        return _subject, (self.config, self.trains)

    def inferring(self) -> RunSubject:
        """The run's loss alone, as validation computes it, without gradients and optimizer."""
        return RunSubject(self.config, trains=False)

    def config_of(self, spread: Spread) -> Config:
        """The run spread so. Raises `ValueError` where its sections contradict each other."""
        values = self.config.to_dict()
        values["device"] = spread.device
        values["training"] = {**values["training"], **spread.training}
        return Config.from_dict(values)

    @functools.cached_property
    def whole(self) -> Blueprint:
        """On one device: shapes, names and the stack of the model."""
        return self._blueprint(Spread(()), "cpu")

    @property
    def blocks(self) -> int | None:
        """How many blocks its stack repeats, None where it has none."""
        return None if self.whole.stack is None else self.whole.stack.count

    unnamed: tuple[str, ...] = ()  # every parameter of the zoo has names

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Its parameters, as the planner's guesses take them."""
        blue, how = self.whole, self.config.training
        numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(blue.state.params))
        optimizer = bytes_on_device((blue.state.optimizer, blue.state.ema)) / max(numbers, 1) if self.trains else 0.0
        gradient, computed = (float(np.dtype(name).itemsize) for name in (how.gradient_dtype, how.compute_dtype))
        named = leaves_with_names(blue.state.params, blue.names)
        return tuple(
            Leaf(path, leaf.shape, names, float(leaf.dtype.itemsize), optimizer, gradient, computed)
            for path, leaf, names in named
        )

    def about(self) -> dict[str, Any]:
        """What a plan file says it is for."""
        return {"model": self.name, "fingerprint": self.fingerprint, "rows": self.rows, "dtype": self.dtype}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what a plan is made for: model, optimizer, batch, precision."""
        values = self.config.to_dict()
        about = {key: values[key] for key in ("model", "optimizer")}
        about["training"] = {
            key: values["training"][key] for key in ("param_dtype", "compute_dtype", "gradient_dtype", "ema_decay")
        }
        text = json.dumps(about, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, spread: Spread) -> None:
        """Raise `ValueError` where the spread does not fit model, batch or sequence; traces nothing."""
        plan = spread.plan(self.rows)
        plan.check_batch(self.rows)
        if (attends := attention_of(self.config)) is not None:
            plan.check_sequence(**attends)
        blue = self.whole
        check_fits(self.name, plan, blue.state.params, blue.names, self.blocks)

    def traced(self, spread: Spread, platform: Platform) -> Traced:
        """Its step, traced for devices of a platform. Raises `ValueError` where the spread does not fit."""
        blue = self._blueprint(spread, platform)
        batch = placed_batch(blue, batch_shapes(self.config))
        if not self.trains:
            return self._loss_traced(blue, batch, platform)
        jaxpr = make_step(blue).trace(blue.state, batch).jaxpr
        where = tuple(leaf.sharding for leaf in jax.tree.leaves((blue.state, batch)))
        out = tuple(leaf.sharding for leaf in jax.tree.leaves(blue.state))
        return Traced(jaxpr, where, out, blue.plan, platform, held(blue, batch), self.dtype)

    def _loss_traced(self, blue: Blueprint, batch: Any, platform: Platform) -> Traced:
        weights, buffers = blue.state.params, blue.state.buffers
        jaxpr = (
            jax.jit(lambda weights, buffers, batch: blue.loss(weights, buffers, batch, None)[0])
            .trace(weights, buffers, batch)
            .jaxpr
        )
        where = tuple(leaf.sharding for leaf in jax.tree.leaves((weights, buffers, batch)))
        kept = {name: size for name, size in held(blue, batch).items() if name in ("parameters", "buffers", "batch")}
        return Traced(jaxpr, where, (), blue.plan, platform, kept, self.dtype)

    def _blueprint(self, spread: Spread, platform: Platform) -> Blueprint:
        config = self.config_of(spread)
        plan = planned(config, spread.devices)
        device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
        return blueprint(config, plan, AbstractMesh(plan.mesh_shape, plan.axis_names, abstract_device=device))  # pyright: ignore


def _subject(config: Config, trains: bool) -> RunSubject:
    return RunSubject(config, trains=trains)


def held(blue: Blueprint, batch: Any) -> dict[str, int]:
    """Bytes of a device, by part, that are there before a step begins."""
    state = blue.state
    parts = {
        "parameters": state.params,
        "optimizer state": state.optimizer,
        "buffers": state.buffers,
        "average": (state.ema, state.ema_buffers),
        "batch": batch,
        "counters": (state.step, state.key),
    }
    return {name: bytes_on_device(tree) for name, tree in parts.items() if jax.tree.leaves(tree)}


def partitioned(config: Config, say: Callable[[str], None]) -> Config:
    """The configuration with the planner's choice for the devices present in place of `device.auto_partition`; `say` is
    told the plan. Raises `ValueError` where nothing fits."""
    how = config.device
    if not how.auto_partition:
        return config
    from artifex.scaling.autodist.planner import plan  # with SciPy, which no other run needs

    devices = jax.devices()
    have = device_bytes()
    local = jax.local_device_count()
    pairs = [part.partition("=") for part in (how.partition_constraints or "").split(",") if part]
    space = tuple(part.strip() for part in how.partition_search_space.split(","))
    options: dict[str, Any] = {"mesh_row": len(devices) // local, "mesh_col": local, "zero_stage": "auto", "topk": 3}
    given = {name.strip(): size.strip() for name, _, size in pairs}
    if have is not None and "max_memory_per_device" not in given:
        options["memory_constraint"] = have / GB
    try:
        asked = AutoDistConfig.from_partition(
            how.partition_objective, space if len(space) > 1 else how.partition_search_space.strip(), given, **options
        )
    except ConfigError as error:
        raise error.within("device", "partition") from None
    subject = RunSubject(config)
    found = plan(subject, asked)
    for line in str(found).splitlines():
        say(line)
    return subject.config_of(found.spread)


def prove(
    subject: RunSubject, spreads: Sequence[Spread], target: Target, seconds: float, nproc: int = 1
) -> dict[Spread, Proof]:
    """Compile the step of each spread for `target`, in processes of their own, `nproc` at a time, each for at most so
    many seconds. That one finds no room, or comes to no answer, is an answer."""

    def one(spread: Spread) -> Proof:
        start = time.perf_counter()
        answer = ask(subject.config_of(spread), target, seconds, remedy=False)
        took, found = time.perf_counter() - start, answer.figures
        if "bytes" not in found:
            return Proof(None, {}, target.compiler(), took, answer.verdict or "no answer")
        return Proof(int(found["bytes"]), found["sent"], found["compiler"], took)

    with concurrent.futures.ThreadPoolExecutor(nproc) as pool:
        return dict(zip(spreads, pool.map(one, spreads), strict=True))


def proved(found: Planned, subject: RunSubject, *, count: int, seconds: float, nproc: int = 1) -> Planned:
    """The plan whose compiled step fits, of the first `count` candidates and, while none does, of the others: what is
    predicted to fit and does not is never the answer. Raises `ValueError` where no candidate fits."""
    assert found.cluster.target is not None
    target = Target.parse(found.cluster.target)
    waiting, proofs = [found.best, *found.runners], dict(found.proofs)
    limit = found.limit
    while waiting:
        now, waiting = waiting[:count], waiting[count:]
        proofs |= prove(subject, [one.spread for one in now], target, seconds, nproc)
        for one in now:
            have = proofs[one.spread].bytes
            if have is not None and (limit is None or have <= limit):
                others = tuple(other for other in (found.best, *found.runners) if other is not one)
                return dataclasses.replace(found, best=one, runners=others, proofs=proofs)
    said = "; ".join(f"{spread}: {_needs(proof)}" for spread, proof in proofs.items())
    raise ValueError(
        f"no candidate fits when it is compiled for {target.name}: {said}; give less memory, or a larger topk"
    )


def _needs(proof: Proof) -> str:
    return proof.error if proof.bytes is None else f"needs {size_text(proof.bytes)}"
