"""Placement and `explain`: what they say is where JAX really puts the arrays, in bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from artifex import models
from artifex.models.layers import Linear
from artifex.scaling import placement
from artifex.scaling.axes import Rules
from artifex.scaling.plan import Plan
from artifex.scaling.strategies import FSDPStrategy, TensorParallelStrategy, combine

SMALL = {"embed_dim": 32, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 64}
RULES = combine({"fsdp": FSDPStrategy("fsdp", min_weight_size=0), "tensor": TensorParallelStrategy("tensor")})
PLAN = Plan((2, 4), ("fsdp", "tensor"), RULES)


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(lambda: models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL))


def test_bytes_per_device_are_those_jax_allocates(model):
    mesh = PLAN.make_mesh()
    explained = placement.explain(model, PLAN, mesh)
    on_first = 0
    for row in explained.rows:
        array = jax.device_put(np.zeros(row.shape, np.float32), NamedSharding(mesh, row.resolution.spec))
        held = [piece.data.nbytes for piece in array.addressable_shards if piece.device == jax.devices()[0]]
        assert row.bytes_per_device == sum(held), row.path
        on_first += sum(held)
    assert explained.bytes_per_device == on_first
    assert explained.total_bytes == 4 * explained.parameters


def test_explain_needs_no_devices_and_takes_rules_strategies_and_plans(model):
    sizes = {"fsdp": 64, "tensor": 8}
    large = nnx.eval_shape(lambda: models.create("llama3-70b", rngs=nnx.Rngs(0)))
    explained = placement.explain(large, RULES, sizes)
    assert explained.parameters == 70_553_706_496
    assert explained.bytes_per_device < 1.001 * explained.total_bytes / (64 * 8)
    tensor = TensorParallelStrategy("tensor")
    assert placement.explain(model, tensor, {"tensor": 4}) == placement.explain(model, tensor.rules, {"tensor": 4})
    assert placement.explain(model, PLAN, PLAN.sizes).rows == placement.explain(model, RULES, PLAN.sizes).rows


def test_the_table_says_which_rule_won_and_why_a_dim_stayed_whole(model):
    text = str(placement.explain(model, PLAN, PLAN.sizes))
    key = next(line for line in text.splitlines() if line.startswith("layers/attention/key/kernel"))
    assert "embed -> fsdp" in key and "(-, fsdp, -, -)" in key and "kv_heads 2 does not divide by 4 (tensor)" in key
    up = next(line for line in text.splitlines() if line.startswith("layers/mlp/up/kernel"))
    assert "embed -> fsdp, mlp -> tensor" in up and up.rstrip().endswith("2 KiB")
    assert "mesh fsdp=2 x tensor=4: 8 devices" in text
    html = placement.explain(model, PLAN, PLAN.sizes)._repr_html_()
    assert html.count("<tr>") == 12 + 7 and "-&gt;" in html


def test_the_table_has_a_row_for_each_activation_name_that_is_split(model):
    rows = [line.split("  ") for line in str(placement.explain(model, PLAN, PLAN.sizes)).splitlines()]
    of = {cells[0].strip(): [cell.strip() for cell in cells if cell][-2:] for cells in rows}
    assert of["batch"] == ["fsdp", "2"] and of["act_heads"] == of["act_vocab"] == ["tensor", "4"]
    assert "sequence" not in of
    alone = placement.explain(model, PLAN, {"fsdp": 1, "tensor": 1})
    assert alone.activations == () and "split over" not in str(alone)


def test_a_weight_without_names_is_refused():
    class Forgetful(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((2, 3)))

    with pytest.raises(ValueError, match=r"parameter kernel of shape \(2, 3\) names no logical axes"):
        placement.names_of(Forgetful())
    with pytest.raises(ValueError, match="did you mean 'embed'"):
        Linear((2, 3), ("embedd", "mlp"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="2 dims but 1 logical axes"):
        Linear((2, 3), ("embed",), rngs=nnx.Rngs(0))


def test_a_users_own_layers_are_explained_by_their_names():
    linear = Linear((64, 128), ("in_features", "out_features"), bias=True, rngs=nnx.Rngs(0))
    rows = {row.path: row for row in placement.explain(linear, TensorParallelStrategy("model"), {"model": 4}).rows}
    assert rows["kernel"].bytes_per_device == 64 * 128 and rows["bias"].bytes_per_device == 128


def test_factored_moments_keep_the_names_of_the_dims_they_kept():
    names = ("layers", "embed", "mlp")
    assert placement.kept_names((3, 8, 24), (3, 8, 24), names) == names
    assert placement.kept_names((3, 24), (3, 8, 24), names) == ("layers", "mlp")
    assert placement.kept_names((8,), (3, 8, 24), names) == ("embed",)
    assert placement.kept_names((1,), (3, 8, 24), names) is None


def test_a_plan_refuses_parts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"mesh shape .* but axis names"):
        Plan((2, 4), ("fsdp",), Rules())
    with pytest.raises(ValueError, match="0 microbatches"):
        Plan((8,), ("fsdp",), Rules(), microbatches=0)
    with pytest.raises(ValueError, match="names mesh axis 'tensor'"):
        Plan((8,), ("fsdp",), RULES)


def test_sizes_read_as_a_person_would_write_them():
    assert [placement.size_text(n) for n in (0, 384, 1536, 3 * 2**20, 5 * 2**40)] == [
        "0 B",
        "384 B",
        "1.5 KiB",
        "3 MiB",
        "5 TiB",
    ]
