"""FLOPs by a program's text are those of the closed form, of XLA where nothing is a loop, and of the traced step."""

import math

import cells
import hlo
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from artifex.train import plan_of
from artifex.training.state import blueprint
from artifex.training.step import make_step


def text_of(function, *shapes):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return compiled.as_text(), compiled.cost_analysis()["flops"]


def test_a_loops_body_counts_as_often_as_it_runs():
    def nested(x, kernels):
        inner = lambda x, kernel: (x @ kernel, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, kernels)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=7)[0]

    text, once = text_of(nested, (4, 8), (5, 8, 8))
    each = 2 * 4 * 8 * 8
    assert hlo.flops(text) == 7 * 5 * each
    assert once < 2 * each, "XLA's own count takes it once"


def test_gradients_of_convolutions_are_counted_as_xla_counts_them():
    def both(x, kernel, g):
        conv = lambda x, kernel: jax.lax.conv_general_dilated(  # noqa: E731
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y, pull = jax.vjp(conv, x, kernel)
        return y, pull(g)

    text, by_xla = text_of(both, (2, 8, 8, 3), (3, 3, 3, 5), (2, 4, 4, 5))
    assert hlo.flops(text) == by_xla > 0


def test_a_conditional_counts_its_dearest_branch_in_the_turns_that_take_it():
    def some(x, kernel, table):
        turn = lambda x, row: (jax.lax.cond(row[0] > 0, lambda x: x @ kernel, lambda x: x, x), None)  # noqa: E731
        return jax.lax.scan(turn, x, table)[0]

    text, _ = text_of(some, (4, 8), (8, 8), (6, 1))
    assert hlo.flops(text) == 6 * 2 * 4 * 8 * 8
    assert hlo.flops(text, {6: (2,)}) == 2 * 2 * 4 * 8 * 8


def traced(jaxpr) -> float:
    """FLOPs of a program as it was traced."""
    total = 0.0
    for equation in jaxpr.eqns:
        (out,) = equation.outvars[:1] or (None,)
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * out.aval.size * math.prod(left[dim] for dim in summed)
        inner = [traced(each) for each in jaxprs_in_params(equation.params)]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


@pytest.mark.parametrize("family", ["llama", "DiT"])
def test_one_devices_step_is_counted_as_it_was_traced(family):
    with cells.presets():
        config = cells.config_of(family, {}, 4)
        config.training.attention = "tiles"  # the scores that blockwise attention computes again, XLA merges
        plan = plan_of(config, 1)
        blue = blueprint(config, plan, plan.make_mesh(jax.devices()[:1]))
        shapes = cells.shapes_of(blue, cells.batches(blue.config)[0])
        step = make_step(blue).trace(blue.state, shapes)
    found = hlo.flops(step.lower().compile().as_text())
    assert found == pytest.approx(traced(step.jaxpr), rel=0.02)  # XLA leaves out what nothing reads
