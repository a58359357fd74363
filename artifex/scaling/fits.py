"""What a mesh must divide: dims that would be left whole at the cost of a layer's work on every device are errors.

A vocabulary or key heads that do not divide are whole or repeated, which `explain` says. Query heads and hidden units
are most of what a layer computes.
"""

from __future__ import annotations

import math
from typing import Any

from artifex.scaling import placement
from artifex.scaling.plan import Plan

MUST_DIVIDE = {
    "heads": ("act_heads", "num_heads"),
    "mlp": ("act_mlp", "mlp_dim"),
    "expert_mlp": ("act_mlp", "expert_mlp_dim"),
}
"""Weight dim -> the activation dim that is split with it, and the setting of a model that gives its size."""


def check_fits(params: Any, names: Any, plan: Plan) -> None:
    """Raise `ValueError` where a parameter, an array or a `jax.ShapeDtypeStruct`, has a dim of `MUST_DIVIDE` that the
    plan splits and that does not divide. `names` is the same tree with a tuple of logical axes at each leaf."""
    split = {rule.name: rule.axes for rule in plan.rules.activations}
    for path, leaf, axes in placement.leaves_with_names(params, names):
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


def _divisors_near(size: int, ways: int) -> list[int]:
    """The nearest divisor of `size` on either side of `ways`."""
    divisors = [each for each in range(1, size + 1) if size % each == 0]
    below, above = max(each for each in divisors if each < ways), [each for each in divisors if each > ways]
    return [below, *above[:1]]


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
