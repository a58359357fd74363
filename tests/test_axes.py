"""Logical axes: names are checked, rules resolve strictly, and a constraint is what the rules say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from artifex.scaling import axes
from artifex.scaling.axes import Rules, activation_rules, check_mesh, resolve, shard
from artifex.scaling.execution import held
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.names import VOCABULARY
from artifex.scaling.strategies import ContextParallelStrategy, FSDPStrategy, combine

FSDP = Rules.of({"embed": "fsdp"}, {"batch": "fsdp"}, strategy="fsdp")
TENSOR = Rules.of({"mlp": "tensor", "heads": "tensor"}, {"act_mlp": "tensor"}, strategy="tensor")
DATA = Rules.of({}, {"batch": "data"}, strategy="data")


def test_weights_and_activations_share_no_name():
    assert not axes.WEIGHT_AXES.keys() & axes.ACTIVATION_AXES.keys()
    assert all(sentence for sentence in VOCABULARY.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: axes.check_name("emebd"), "unknown logical axis 'emebd': did you mean 'embed'"),
        (lambda: axes.check_names(("embed",), (3, 4)), "2 dims but 1 logical axes"),
        (lambda: Rules.of({"mlpp": "tensor"}), "did you mean 'mlp'"),
        (lambda: Rules.of({"batch": "data"}), "unknown logical axis 'batch'"),
        (lambda: Rules.of({}, {"mlp": "data"}), "unknown logical axis 'mlp': did you mean 'act_mlp'"),
        (lambda: Rules.of({"mlp": ("x", "x")}), "names a mesh axis twice"),
        (lambda: shard(jnp.ones((2, 2)), "batch"), "2 dims but 1 logical axes"),
        (lambda: shard(jnp.ones((2, 2)), "batch", "hiden"), "did you mean 'hidden'"),
        (
            lambda: check_mesh(FSDP, {"data": 2}),
            r"rule embed -> fsdp names mesh axis 'fsdp', but the mesh has \('data',\)",
        ),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_union_keeps_every_rule_and_batch_is_split_by_both():
    both = DATA.union(FSDP).union(TENSOR)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert resolve(("embed", "mlp"), (8, 8), both.params, sizes).spec == P("fsdp", "tensor")
    assert resolve(("batch", "sequence"), (8, 8), both.activations, sizes).spec == P(("data", "fsdp"), None)


def test_a_name_sent_to_two_places_names_both_strategies():
    other = Rules.of({"embed": "tensor"}, strategy="mine")
    with pytest.raises(
        ValueError, match=r"'embed' is sent to two places: fsdp maps it to \('fsdp',\), mine to \('tensor',\)"
    ):
        FSDP.union(other)


def test_what_does_not_divide_stays_whole_and_says_so():
    got = resolve(("vocab", "embed"), (50_257, 64), Rules.of({"vocab": "model"}).params, {"model": 4})
    assert got.spec == P(None, None) and got.won == ()
    assert got.notes == ("vocab 50257 does not divide by 4 (model)",)


def test_the_longest_leading_run_of_axes_that_divides_is_taken():
    table = Rules.of({}, {"batch": ("data", "fsdp")}).activations
    got = resolve(("batch",), (4,), table, {"data": 2, "fsdp": 4})
    assert got.spec == P("data") and got.notes == ("batch 4 does not divide by 8 (data+fsdp)",)


def test_one_mesh_axis_splits_one_dim_and_the_earlier_rule_gets_it():
    first = Rules.of({"mlp": "x"}, strategy="one").union(Rules.of({"embed": "x"}, strategy="two"))
    got = resolve(("embed", "mlp"), (8, 8), first.params, {"x": 2})
    assert got.spec == P(None, "x") and got.notes == ("embed whole: x already splits mlp",)


def test_a_dim_that_several_strategies_left_because_they_have_another_is_no_note():
    rules = combine({"fsdp": FSDPStrategy("fsdp", min_weight_size=0), "context": ContextParallelStrategy("context")})
    got = resolve(("embed", "mlp"), (8, 8), rules.params, {"fsdp": 2, "context": 2})
    assert got.spec == P(("fsdp", "context"), None) and got.notes == ()


def test_small_weights_stay_whole_below_the_minimum():
    rules = Rules.of({"embed": "fsdp"}, min_weight_size={"fsdp": 1024})
    sizes = {"fsdp": 2}
    assert resolve(("embed", "mlp"), (256, 4096), rules.params, sizes, rules.min_weight_size).spec == P("fsdp", None)
    small = resolve(("embed",), (512,), rules.params, sizes, rules.min_weight_size)
    assert small.spec == P(None) and small.notes == ("no dim reaches the 1024 that fsdp asks for",)
    stacked = resolve(("layers", "embed"), (4096, 512), rules.params, sizes, rules.min_weight_size)
    assert stacked.spec == P(None, None)  # depth is not the size of a weight


def test_resolution_never_uses_a_mesh_axis_twice_and_always_divides():
    rng = np.random.default_rng(0)
    names = list(axes.WEIGHT_AXES)
    sizes = {"a": 2, "b": 3, "c": 4}
    for _ in range(500):
        table = {
            str(n): tuple(rng.permutation(list(sizes))[: rng.integers(1, 4)].tolist())
            for n in rng.permutation(names)[:6]
        }
        picked = [str(n) for n in rng.choice(names, rng.integers(1, 5))]
        shape = tuple(int(s) for s in rng.integers(1, 49, len(picked)))
        spec = resolve(picked, shape, Rules.of(table).params, sizes).spec
        used = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        assert len(used) == len(set(used))
        for entry, size in zip(spec, shape, strict=True):
            ways = np.prod([sizes[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ())], dtype=int)
            assert size % ways == 0


def test_shard_changes_layouts_by_the_active_rules_and_never_values():
    mesh = create_device_mesh((2, 4), ("data", "tensor"))
    rules = DATA.union(TENSOR)

    @jax.jit
    def laid_out(x):
        with activation_rules(rules, mesh):
            return shard(x * 2, "batch", "sequence", "act_mlp")

    x = jnp.arange(4 * 3 * 8.0).reshape(4, 3, 8)
    y = laid_out(x)
    assert y.sharding.spec == P("data", None, "tensor")
    np.testing.assert_array_equal(y, np.asarray(x) * 2)
    assert shard(x, "batch", "sequence", "act_mlp") is x  # outside active rules


def test_activation_axes_are_those_of_the_active_rules():
    mesh = create_device_mesh((2, 4), ("data", "tensor"))
    with activation_rules(DATA.union(TENSOR), mesh):
        assert axes.activation_axes("act_mlp", 8) == ("tensor",)
        assert axes.activation_axes("act_mlp", 6) == axes.activation_axes("hidden", 8) == ()
    assert axes.activation_axes("act_mlp", 8) == ()


def test_a_part_of_a_parameter_lies_as_the_whole_does():
    mesh = create_device_mesh((2, 4), ("fsdp", "tensor"))
    rules = Rules.of({"embed": "fsdp", "mlp": "tensor"}, {"batch": "fsdp"}, min_weight_size={"fsdp": 64})

    @jax.jit
    def laid_out(whole, part):
        with activation_rules(rules, mesh):
            assert axes.ways(("embed", "mlp"), whole.shape) == (2, 4) and axes.ways(("batch",), (8,)) == (2,)
            placed = axes.shard_parameter(part, None, "embed", "mlp", whole=whole.shape)
            return axes.shard_parameter(whole, "embed", "mlp"), placed, axes.shard_parameter(part[0], "embed", "mlp")

    shapes = laid_out(jnp.ones((8, 64)), jnp.ones((4, 8, 16)))
    assert [each.sharding.spec for each in shapes] == [
        P("fsdp", "tensor"),
        P(None, "fsdp", "tensor"),
        P(None, "tensor"),
    ]
    assert axes.ways(("embed", "mlp"), (8, 64)) == (1, 1)  # outside active rules


def test_held_rules_reach_a_backward_pass_that_is_traced_after_them():
    mesh, seen = create_device_mesh((8,), ("data",)), []

    def loss(x):
        with activation_rules(DATA, mesh):
            backward = lambda _, ct: (seen.append(axes.active() is not None), (ct,))[1]  # noqa: E731
            for rule in (backward, held(backward)):
                same = jax.custom_vjp(lambda x: x)
                same.defvjp(lambda x: (x, None), rule)
                x = same(x)
            return x

    jax.grad(loss)(1.0)
    assert seen == [True, False]  # the last is traced first


def test_every_resolution_of_a_known_table_equals_a_brute_force_reading():
    table = {"embed": "x", "mlp": "y", "heads": "y"}
    sizes = {"x": 2, "y": 3}
    for names in itertools.product(["embed", "mlp", "heads", "head_dim"], repeat=2):
        for shape in itertools.product([2, 3, 6], repeat=2):
            expected, free = [None, None], {"x", "y"}
            for name, axis in table.items():
                if name in names and axis in free and shape[names.index(name)] % sizes[axis] == 0:
                    expected[names.index(name)] = axis
                    free.remove(axis)
            assert resolve(names, shape, Rules.of(table).params, sizes).spec == P(*expected)


def test_rules_print_as_a_reader_would_say_them():
    assert [str(rule) for rule in FSDP.params] == ["embed -> fsdp"]
    assert str(Rules.of({}, {"batch": ("data", "fsdp")}, strategy="mine").activations[0]) == "batch -> data+fsdp (mine)"
