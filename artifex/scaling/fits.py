"""What a mesh must have something to divide: devices that would repeat each other's work are refused, by name.

A vocabulary or key heads that do not divide are whole or repeated, which `explain` says. Query heads and hidden units
are most of what a layer computes.
"""

from __future__ import annotations

import math
from typing import Any

from artifex.scaling import placement
from artifex.scaling.axes import resolve
from artifex.scaling.plan import Plan
from artifex.scaling.strategies import ContextParallelStrategy, ExpertParallelStrategy

MUST_DIVIDE = {
    "heads": ("act_heads", "num_heads"),
    "mlp": ("act_mlp", "mlp_dim"),
    "expert_mlp": ("act_mlp", "expert_mlp_dim"),
}
"""Weight dim -> the activation dim that is split with it, and the setting of a model that gives its size."""


def check_fits(model: str, plan: Plan, params: Any, names: Any, blocks: int | None) -> None:
    """Raise `ValueError` where a plan divides what the model has not, or not as often.

    `model` is its name, for messages, and `blocks` how many its stack repeats, None where it has no stack. Of `params`,
    arrays or `jax.ShapeDtypeStruct`s, `names` is the same tree with a tuple of logical axes at each leaf.
    """
    named = list(placement.leaves_with_names(params, names))
    _check_experts(model, plan, named)
    _check_stages(model, plan, blocks)
    _check_sequences(model, plan, blocks)
    _check_widths(plan, named)
    _check_no_axis_idle(model, plan, named)


def _check_stages(model: str, plan: Plan, blocks: int | None) -> None:
    if plan.pipeline is None:
        return
    sizes = f"device.pipeline {plan.pipeline.devices} x device.stages_per_device {plan.pipeline.stages_per_device}"
    if blocks is None:
        raise ValueError(
            f"{sizes}: {model!r} has no stack of repeated blocks that stages could divide; leave pipeline at 1 and use "
            "device.fsdp, device.tensor or device.data"
        )
    if blocks < plan.pipeline.stages:
        devices, each = plan.pipeline.devices, plan.pipeline.stages_per_device
        fit = max((n for n in range(1, blocks // each + 1) if devices % n == 0), default=1)
        other = f"device.pipeline={fit} and device.data={plan.sizes.get('data', 1) * devices // fit}"
        fewer = f"set {other}" if each == 1 or fit > 1 else f"make their product at most {blocks}"
        raise ValueError(
            f"{sizes} are {plan.pipeline.stages} stages, but {model!r} has {blocks} repeated blocks; {fewer}, or give "
            f"the model at least {plan.pipeline.stages}"
        )


def _check_sequences(model: str, plan: Plan, blocks: int | None) -> None:
    rules = [rule for rule in plan.rules.activations if rule.name == "sequence"]
    labels = [label for rule in rules for label in rule.strategy.split("+")]
    context = {axis: plan.sizes[axis] for rule in rules for axis in rule.axes if plan.sizes[axis] > 1}
    if ContextParallelStrategy.label in labels and context and blocks is None:
        axis, size = next(iter(context.items()))
        raise ValueError(
            f"mesh axis {axis!r} has {size} devices for parts of a sequence, but {model!r} is made of convolutions, "
            f"which have none; set device.context=1 and device.fsdp={size * plan.sizes.get('fsdp', 1)}"
        )


def _check_experts(model: str, plan: Plan, named: list) -> None:
    label = ExpertParallelStrategy.label
    rules = [rule for rule in plan.rules.params if rule.name == "experts" and rule.strategy == label]
    axes = dict.fromkeys(axis for rule in rules for axis in rule.axes)
    ways = math.prod(plan.sizes[axis] for axis in axes)
    counts = {leaf.shape[names.index("experts")] for _, leaf, names in named if "experts" in names}
    if ways == 1 or (counts and all(count % ways == 0 for count in counts)):
        return
    if not counts:
        raise ValueError(
            f"mesh axis {'+'.join(axes)!r} has {ways} devices for experts, but {model!r} has none; set device.expert=1 "
            f"and device.fsdp={ways * plan.sizes.get('fsdp', 1)}, or model.num_experts={ways}"
        )
    count = min(counts)
    fit = max(size for size in range(1, min(count, ways) + 1) if count % size == 0 and ways % size == 0)
    raise ValueError(
        f"mesh axis {'+'.join(axes)!r} has {ways} devices for the {count} experts of {model!r}, which do not divide "
        f"among them; set device.expert={fit} and device.fsdp={plan.sizes.get('fsdp', 1) * ways // fit}, or make "
        f"model.num_experts a multiple of {ways}, such as {-(-count // ways) * ways}"
    )


def _check_widths(plan: Plan, named: list) -> None:
    split = {rule.name: rule.axes for rule in plan.rules.activations}
    for path, leaf, axes in named:
        for name, size in zip(axes, leaf.shape, strict=True):
            of_activation, setting = MUST_DIVIDE.get(name, ("", ""))
            over = split.get(of_activation, ())
            ways = math.prod(plan.sizes[axis] for axis in over)
            if size % ways:
                raise ValueError(
                    f"{name} {size} of {path} do not divide over the {ways} devices of mesh axis {'+'.join(over)!r}; "
                    f"make {'+'.join(over)} {_either(_divisors_near(size, ways))}, or the model's {setting} "
                    f"{_either([each for each in (size // ways * ways, -(-size // ways) * ways) if each])}"
                )


def _check_no_axis_idle(model: str, plan: Plan, named: list) -> None:
    # without `Rules.whole`: axes that divide what nobody claims also divide rows, positions, experts or layers
    used = {axis for rule in plan.rules.activations if rule.name == "batch" for axis in rule.axes}
    for _, leaf, names in named:
        spec = resolve(names, leaf.shape, plan.rules.params, plan.sizes, plan.rules.min_weight_size).spec
        used |= {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
    for axis, size in plan.sizes.items():
        if size > 1 and axis not in used:
            there = sorted({name for _, _, names in named for name in names})
            wanted = sorted({rule.name for rule in plan.rules.params if axis in rule.axes})
            raise ValueError(
                f"mesh axis {axis!r} of {size} devices splits nothing of {model!r}: its rules are for "
                f"{', '.join(wanted)}, the model's dims are {', '.join(there)}, or do not divide by {size}; use "
                "device.data or device.fsdp instead"
            )


def _divisors_near(size: int, ways: int) -> list[int]:
    """The nearest divisor of `size` on either side of `ways`."""
    divisors = [each for each in range(1, size + 1) if size % each == 0]
    below, above = max(each for each in divisors if each < ways), [each for each in divisors if each > ways]
    return [below, *above[:1]]


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
