"""How a model runs: one value, made of a plan, and entered in one place while a program is traced.

    with execution(Execution(rules=plan.rules, mesh=mesh, remat="full")):
        ...  # what is traced here is laid out, recomputed and computed as it says

A model never asks which machine it is on: it asks the execution at hand. So a program for a TPU slice can be traced and
compiled on a host that has none. It is a context and no argument, because every layer would have to pass it on and none
but the innermost read it; `compiled` makes it part of the key of what is compiled.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from artifex.scaling import axes, remat, xla_cpu
from artifex.scaling.program import Program

Platform = Literal["cpu", "gpu", "tpu"]
Attention = Literal["auto", "tiles", "blockwise", "splash", "cudnn"]
ContextAttention = Literal["ring", "ulysses"]

PLATFORMS: dict[str, Platform] = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
"""What JAX calls a device's platform -> ours."""


def platform_of(mesh: Mesh | AbstractMesh | None) -> Platform:
    """The platform of a mesh's devices, there or not; without a mesh, that of JAX's first device."""
    if isinstance(mesh, AbstractMesh):
        assert mesh.abstract_device is not None, "a mesh of no devices says what they would be"
        return PLATFORMS.get(mesh.abstract_device.platform, "gpu")
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return PLATFORMS.get(name, "gpu")


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a model needs beyond its parameters and its input. Changes time and memory, not values beyond rounding.

    `rules`, `mesh`: where activations live; None is one device. `platform`: that of the mesh's devices unless given.
    `compute_dtype`: what the blueprint casts parameters to. `reduce_dtype`: what products of 16-bit numbers are
    summed in across devices; None leaves it to XLA, which takes the 16 bits. `remat`: see `artifex.scaling.remat`.
    `unroll`: layers to an iteration of the scan; "auto" is 1 but on one CPU device (`artifex.models.cpu`). `attention`:
    see `artifex.models.attention`. `context_attention`: how positions see each other where the rules split the
    sequence, by keys that go round or by an exchange of positions for heads.

    Raises `ValueError` where `remat` offloads on a CPU.
    """

    remat: str = "none"
    unroll: int | Literal["auto"] = "auto"
    attention: Attention = "auto"
    context_attention: ContextAttention = "ring"
    compute_dtype: str = "float32"
    reduce_dtype: str | None = None
    rules: axes.Rules = dataclasses.field(default_factory=axes.Rules)
    mesh: Mesh | None = None
    platform: Platform | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "remat", remat.canonical(self.remat))
        if self.platform is None:
            object.__setattr__(self, "platform", platform_of(self.mesh))
        away = remat.offloaded(self.remat)
        if away and self.platform == "cpu":
            raise ValueError(
                f"remat offloads {away[0]!r} to the host, but the devices are CPUs, whose memory is the host's; keep "
                "or recompute it"
            )

    @property
    def on_one_cpu(self) -> bool:
        """Whether what was measured to be fastest on one CPU device holds: see `artifex.models.cpu`."""
        return self.platform == "cpu" and (self.mesh is None or self.mesh.size == 1)

    @property
    def compiler_options(self) -> dict[str, str]:
        """What the compiler is asked for; nothing but on one CPU device (`artifex.scaling.xla_cpu`)."""
        return dict(xla_cpu.options()) if self.on_one_cpu else {}


_EXECUTION: contextvars.ContextVar[Execution | None] = contextvars.ContextVar("artifex_execution", default=None)


@contextlib.contextmanager
def execution(how: Execution) -> Iterator[None]:
    """Run models as `how` says.

    Enter it inside a function that is jitted, or around one that is `compiled`: the cache of `jax.jit` knows no
    contexts and would hand the first program to the second.
    """
    token = _EXECUTION.set(how)
    try:
        with axes.activated(None) if how.mesh is None else axes.activation_rules(how.rules, how.mesh):
            yield
    finally:
        _EXECUTION.reset(token)


def current_execution() -> Execution:
    """How models run here: what the innermost `execution` says, or the defaults, by the rules that are active alone."""
    if (how := _EXECUTION.get()) is not None:
        return how
    rules, mesh = axes.active() or (axes.Rules(), None)
    return Execution(rules=rules, mesh=mesh)


@contextlib.contextmanager
def by_rows() -> Iterator[None]:
    """Within it, or in a function that it decorates, devices that divide positions divide rows: for a part of a model
    that has no positions, such as an autoencoder around a transformer, which each of them would else compute for all
    rows of its group."""
    how = current_execution()
    with execution(dataclasses.replace(how, rules=how.rules.by_rows())):
        yield


def held(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under the execution at hand now, whenever it is traced: the backward pass of a `jax.custom_vjp` is
    traced when the loss, and the `execution` entered in it, have returned."""
    how, layout = _EXECUTION.get(), axes.active()

    @functools.wraps(function)
    def under(*args: Any) -> Any:
        token = _EXECUTION.set(how)
        try:
            with axes.activated(layout):
                return function(*args)
        finally:
            _EXECUTION.reset(token)

    return under


def compiled(*static: str) -> Callable[[Callable], Callable]:
    """Decorates `function(model, *arrays, **static)`: one program for each execution that it is called under.

    `static` names the keyword arguments that are no arrays.
    """

    def decorate(function: Callable) -> Callable:
        def run(how: Execution, graphdef: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            with execution(how):
                return function(nnx.merge(graphdef, state), *args, **kwargs)

        @functools.cache
        def program(options: tuple[tuple[str, str], ...]) -> Program:
            return Program(run, dict(options), static_argnums=(0, 1), static_argnames=static)

        @functools.wraps(function)
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            graphdef, state = nnx.split(model)
            how = current_execution()
            return program(tuple(how.compiler_options.items()))(how, graphdef, nnx.to_pure_dict(state), *args, **kwargs)

        return call

    return decorate
