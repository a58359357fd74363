"""The planner's choice: within every limit, no slower than spreads by hand, and told in a line where nothing fits."""

import dataclasses
import functools
import importlib
import itertools
import math

import jax.numpy as jnp
import pytest
from flax import nnx
from planned import GIB, Remembered, config_of, every, number, one_line, options, predicted, spread_of, subject
from planned import planned as plan_of
from test_planner_config import EXAMPLES

from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.scaling.autodist import AutoDistConfig, plan
from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.axes import resolve
from artifex.scaling.placement import size_text

FREE = {"search_space": ["data", "fsdp"], "zero_stage": "auto", "update_freq": 1, "topk": 2}
LEAST = {**FREE, "recompute": "none"}


@functools.cache
def _planned(given):
    return plan_of(**dict(given))


def planned(**given):
    """The answer for the tiny decoder, one search for all tests that ask alike."""
    axes = given.get("search_space")
    given |= {"search_space": tuple(axes)} if isinstance(axes, list) else {}
    return _planned(tuple(sorted(given.items())))


def refused(error=ValueError, **given) -> str:
    """The line by which a search is refused."""
    with pytest.raises(error) as caught:
        planned(**given)
    return one_line(caught.value)


@pytest.fixture(scope="module")
def limits() -> list[float]:
    """Memory in GB: what the choice takes where there is enough, and less of it down to what hardly anything fits."""
    most = planned(**FREE).estimate.whole
    least = predicted(spread_of("fsdp 8", remat="full")).estimate.whole
    return [size / GIB for size in (most, (most + least) / 2, 1.05 * least)]


def test_tighter_memory_changes_the_plan_and_all_that_is_returned_fits_in_order_of_time(limits):
    chosen = []
    for memory in limits:
        found = every(planned(**FREE, memory_constraint=memory))
        assert all(one.estimate.whole <= memory * GIB for one in found)
        times = [one.estimate.seconds for one in found]
        assert times == sorted(times) and len({one.spread for one in found}) == len(found)
        chosen.append(found[0])
    times = [one.estimate.seconds for one in chosen]
    assert times == sorted(times)
    assert chosen[0].spread != chosen[-1].spread
    assert len({one.spread.remat for one in chosen}) > 1


@functools.cache
def by_hand():
    """Spreads that an engineer would write down, estimated."""
    meshes = ["data 8", "fsdp 8", "data 2 x fsdp 4", "data 2 x tensor 4", "fsdp 4 x tensor 2"]
    chosen = [spread_of(mesh, remat=remat) for mesh in meshes for remat in ("none", "full")]
    chosen.append(spread_of("data 8", zero=1))
    return [predicted(spread) for spread in chosen]


WITH_TENSOR = {**LEAST, "search_space": ["data", "fsdp", "tensor"]}


def test_no_spread_by_hand_that_fits_is_faster(limits):
    for memory, asked in ((32.0, WITH_TENSOR), (limits[1], FREE)):
        chosen = planned(**asked, memory_constraint=memory).estimate
        axes = set(asked["search_space"])
        fitting = [one for one in by_hand() if one.estimate.whole <= memory * GIB and axes >= set(one.spread.mesh)]
        fitting = [one for one in fitting if asked.get("recompute", one.spread.remat) == one.spread.remat]
        assert fitting
        fastest = min(fitting, key=lambda one: one.estimate.seconds)
        assert chosen.seconds <= fastest.estimate.seconds, str(fastest.spread)


def test_the_least_memory_is_chosen_where_that_is_asked_for():
    found = planned(**{**FREE, "search_space": "fsdp", "objective": "memory"})
    sizes = [one.estimate.whole for one in every(found)]
    assert sizes == sorted(sizes)
    assert sizes[0] <= min(one.estimate.whole for one in by_hand() if one.spread.of("fsdp") == 8)


def test_device_time_is_that_of_a_step_times_the_devices():
    time, cost = (planned(**{**LEAST, "objective": objective}) for objective in ("throughput", "cost"))
    assert cost.spread == time.spread  # every plan takes all devices


def test_where_nothing_fits_the_error_says_what_is_missing_by_part_and_what_would_do():
    little = 1e-5
    said = refused(**LEAST, memory_constraint=little)
    assert "nothing fits" in said and "'llama-nano' on 8 devices needs at least" in said
    assert all(part in said for part in ("parameters", "optimizer state", "the step besides", "more, as "))
    assert "16 devices would" in said or "devices would need about" in said
    enough = number(said, r"memory_constraint=([\d.e-]+) would do")
    assert planned(**LEAST, memory_constraint=enough).estimate.whole <= enough * GIB
    divided = refused(search_space="data", recompute="none", memory_constraint=little)
    assert "zero_stage='auto' would leave" in divided and "recompute='full' keeps less" in divided


def test_without_a_mesh_of_all_devices_the_error_names_the_sizes_that_go():
    with pytest.raises(ValueError) as caught:
        plan(Remembered(config_of("decoder", batch_size=3)), options(search_space="data"))
    assert one_line(caught.value).startswith(
        "no mesh of 8 devices fits 'llama-nano' with batches of 3 rows: axes may be of size 1 alone; take another"
    )
    with pytest.raises(ValueError) as caught:
        plan(Remembered(config_of("decoder", batch_size=12)), options(search_space="data"))
    assert "axes may be data 2, 4; take another number of devices, rows, or a wider search_space" in str(caught.value)


def test_the_search_space_bounds_the_axes():
    for space in ("data", ["data", "context"]):
        found = every(planned(search_space=space, recompute="none", topk=20))
        axes = {axis for one in found for axis in one.spread.mesh}
        assert axes == ({space} if space == "data" else set(space))
    # two blocks make no pipeline of eight
    assert "axes may be pipeline 2;" in refused(search_space="pipeline", recompute="none")


@pytest.mark.slow
def test_all_axes_are_searched_unless_it_is_said():
    found = every(planned(recompute="full", topk=30))
    assert {axis for one in found for axis in one.spread.mesh} == {"data", "tensor", "context", "pipeline"}


def test_as_many_plans_are_kept_as_are_asked_for():
    many, few = (every(planned(**{**LEAST, "topk": count})) for count in (20, 2))
    assert len(few) == 2 and len(many) > 5
    assert few[0].spread == many[0].spread


CONSTRAINTS = {
    "a module": "- {module: mlp, replicate: true}\n",
    "a parameter": '- {parameter: "head/*", allowed_axes: [tensor]}\n',
    "an axis": "- {axis: heads, allowed_axes: []}\n",
}


def axes_of(candidate, path: str) -> set[str]:
    """The mesh axes that divide a parameter at rest, by the rules of the plan."""
    (leaf,) = (leaf for leaf in subject().leaves if leaf.path == path)
    of = candidate.spread.plan()
    spec = resolve(leaf.names, leaf.shape, of.rules.of_path(path).params, of.sizes).spec
    return {axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}


@pytest.mark.parametrize("about", CONSTRAINTS)
def test_partition_constraints_are_kept(about, tmp_path):
    path = tmp_path / "constraints.yaml"
    path.write_text(CONSTRAINTS[about], encoding="utf-8")
    # the least memory divides all it may
    how = {**LEAST, "search_space": ("fsdp", "tensor", "data"), "objective": "memory", "zero_stage": 3, "topk": 4}
    found = every(plan_of(partition_constraints_path=path, **how))
    free = every(planned(**how))
    assert found
    paths = [leaf.path for leaf in subject().leaves]
    if about == "a module":
        mine = [each for each in paths if "/mlp/" in each]
        assert mine and not any(axes_of(one, each) for one in found for each in mine)
        assert any(axes_of(one, each) for one in free for each in mine)
    elif about == "a parameter":
        mine = [each for each in paths if each.startswith("head/")]
        assert mine and all(axes_of(one, each) <= {"tensor"} for one in found for each in mine)
        assert any("fsdp" in axes_of(one, each) for one in free for each in mine)
    else:
        assert not any("tensor" in one.spread.mesh for one in found)
        assert any("tensor" in one.spread.mesh for one in free)


def test_a_constraint_on_nothing_of_the_model_is_told(tmp_path):
    path = tmp_path / "constraints.yaml"
    path.write_text("- {module: encoder, replicate: true}\n", encoding="utf-8")
    found = plan_of(partition_constraints_path=path, search_space="data", recompute="none", topk=1)
    assert found.notes == ("constraint on module 'encoder' (line 1) is about nothing of this model",)
    assert found.constraints == (str(path),)


def test_constraints_that_no_mesh_keeps_to_are_why_there_is_no_plan(tmp_path):
    path = tmp_path / "constraints.yaml"
    path.write_text("- {module: mlp, replicate: false}\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        plan_of(partition_constraints_path=path, search_space="data", recompute="none")
    assert "the partition constraints do not allow it" in one_line(caught.value)


def largest_sum(candidate) -> float:
    """Bytes of the largest array that a step sums over devices."""
    ways = [(one, math.prod(candidate.spread.of(axis) for axis in one.axes)) for one in candidate.estimate.sends]
    return max(one.bytes / (2 * (n - 1) / n) for one, n in ways if one.kind == "all-reduce")


def test_no_all_reduce_is_larger_than_allowed():
    how = {"search_space": ("data", "tensor"), "recompute": "none", "topk": 4}
    free = every(planned(**how))
    most = max(map(largest_sum, free))
    found = every(planned(**how, max_all_reduce_size=0.99 * most / GIB))
    assert all(largest_sum(one) < most for one in found)
    assert {one.spread for one in found} != {one.spread for one in free}
    said = refused(**how, max_all_reduce_size=1e-8)
    assert "an all-reduce of " in said and "max_all_reduce_size is 10 B" in said


PIPES = {"search_space": ("data", "pipeline"), "recompute": "full", "topk": 20}


def test_a_pipeline_is_idle_no_longer_than_allowed():
    free = every(planned(**PIPES, max_pipeline_bubble_ratio=1.0))
    assert any(one.spread.of("pipeline") > 1 for one in free)
    for most in (0.0, 0.12, 0.34):
        for one in every(planned(**PIPES, max_pipeline_bubble_ratio=most)):
            stages, parts = one.spread.of("pipeline"), one.spread.microbatches
            assert stages == 1 or (stages - 1) / (parts + stages - 1) <= most


def test_a_pipeline_has_the_stages_and_the_schedule_that_are_asked_for():
    for stages in (1, 2):
        found = every(planned(**PIPES, pipeline_nstages=stages))
        assert {one.spread.of("pipeline") for one in found} == {stages}
    found = every(planned(**PIPES, pipeline_nstages=2, pipeline_scheduler="gpipe"))
    assert {one.spread.schedule for one in found} == {"gpipe"}
    assert "pipeline_nstages must divide the 8 devices, got 3; 1, 2, 4, 8 would" in refused(
        ConfigError, **PIPES, pipeline_nstages=3
    )


def test_gpus_are_planned_for_where_cudnn_is_not_installed(monkeypatch):
    """JAX refuses to trace its attention without, whatever the devices."""
    import jax

    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "cuda_versions", None)
    x = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        jax.eval_shape(attend, x, x, x)
    half = Remembered(config_of("decoder", compute_dtype="bfloat16"))
    found = plan(half, options(search_space="data", device="gpu:h100", recompute="full", topk=1))
    assert found.spread.of("data") == 8
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        jax.eval_shape(attend, x, x, x)


def test_nothing_fits_is_said_where_nothing_does():
    """The least of all spreads, by trying them all, is found where there is just so much memory, and named below."""
    how = {"search_space": ("data", "fsdp"), "zero_stage": "auto", "recompute": "full", "topk": 1}
    meshes = [spread_of(mesh) for mesh in ("data 8", "data 4 x fsdp 2", "data 2 x fsdp 4", "fsdp 8")]
    every_way = [
        dataclasses.replace(one, zero=zero, remat="full", accumulation=count)
        for one in meshes
        for zero in ((0, 1, 2) if one.of("data") > 1 else (0,))
        for count in (1, 2)
    ]
    least = min(predicted(one).estimate.whole for one in every_way)
    assert planned(**how, memory_constraint=1.001 * least / GIB).estimate.whole == least
    assert f"needs at least {size_text(least)}" in refused(**how, memory_constraint=0.99 * least / GIB)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "auto"])
def test_each_zero_stage_divides_what_it_says(stage):
    found = every(planned(search_space=("data", "fsdp"), zero_stage=stage, recompute="none", topk=20))
    zeros = {one.spread.zero for one in found}
    fsdp = {one.spread.of("fsdp") > 1 for one in found}
    expected = {0: ({0}, {False}), 1: ({1}, {False}), 2: ({2}, {False}), 3: ({0}, {True})}
    if stage == "auto":
        assert zeros == {0, 1, 2} and fsdp == {True, False}
    else:
        assert (zeros, fsdp) == expected[stage]


@pytest.mark.parametrize(("stage", "mesh"), [(1, "replica 4 x data 2"), (3, "data 4 x fsdp 2")])
def test_zero_groups_hold_copies_of_what_is_divided_in_each(stage, mesh):
    found = planned(search_space=("data", "fsdp"), zero_stage=stage, zero_ngroups=4, recompute="none")
    whole = planned(search_space=("data", "fsdp"), zero_stage=stage, recompute="none")
    assert str(found.spread).startswith(mesh)
    share = found.estimate.held["optimizer state"] / whole.estimate.held["optimizer state"]
    assert share == pytest.approx(4, rel=0.01)


def test_zero_of_the_planners_choice_has_the_groups_that_are_asked_for():
    found = every(planned(search_space=("data", "fsdp"), zero_stage="auto", zero_ngroups=4, recompute="none", topk=20))
    meshes = {(str(one.spread).split(",")[0], one.spread.zero) for one in found}
    assert meshes == {("data 8", 0), ("replica 4 x data 2", 1), ("replica 4 x data 2", 2), ("data 4 x fsdp 2", 0)}


def test_groups_that_do_not_divide_the_devices_are_refused_with_those_that_do():
    said = refused(ConfigError, zero_stage=1, zero_ngroups=3)
    assert said == "zero_ngroups must divide the 8 devices dividing the batch, got 3; 1, 2, 4, 8 would"
    assert "zero_ngroups is 4, but zero_stage is 0; give zero_stage 1, 2, 3" in refused(ConfigError, zero_ngroups=4)


@pytest.mark.parametrize(
    ("modules", "remat"),
    [
        ("ROOT", "full"),
        ("layers", "full"),
        ("attention", "hidden=keep"),
        ("layers.mlp", "qkv=keep,attention=keep"),
        ("attention,mlp", "full"),
        ("transformer.layer", "full"),
    ],
)
def test_modules_that_are_named_are_computed_again(modules, remat):
    found = planned(search_space="data", recompute_modules=modules, topk=2)
    assert {one.spread.remat for one in every(found)} == {remat}
    unknown = "recompute_modules 'transformer.layer' names no module of this model: all its blocks are computed again"
    assert found.notes == ((unknown,) if "transformer" in modules else ())


def test_recomputation_is_as_asked():
    assert {one.spread.remat for one in every(planned(search_space="data", recompute="dots"))} == {"dots"}


def test_an_update_has_the_microbatches_that_are_asked_for():
    found = every(planned(**PIPES, update_freq=4, max_pipeline_bubble_ratio=1.0))
    counts = {(one.spread.of("pipeline") > 1, one.spread.accumulation, one.spread.microbatches) for one in found}
    # 16 rows have no 4 microbatches over 8 devices; those of a pipeline are the update's
    assert counts == {(True, 1, 4)}
    (four,) = {
        one.spread.accumulation for one in every(planned(search_space="tensor", update_freq=4, recompute="full"))
    }
    assert four == 4
    said = refused(micro_batch_size=2, update_freq=4)
    assert said.startswith("micro_batch_size 2 x update_freq 4 are batches of 8 rows, but the batch has 16; make both")


@functools.cache
def four_blocks() -> Remembered:
    """A decoder of four blocks and a batch of eight rows."""
    values = config_of("decoder", batch_size=8).to_dict()
    values["model"]["num_layers"] = 4
    return Remembered(Config.from_dict(values))


def example(name: str, **given):
    """The answer to an example of the document."""
    return plan(four_blocks(), AutoDistConfig(**{**EXAMPLES[name], "device": "cpu", **given}))


def test_the_documents_example_of_high_memory_plans_where_there_are_groups():
    found = example("high memory", mesh_col=8)
    assert str(found.spread) == "replica 4 x data 2, zero 1, remat full"
    assert found.task == "large_model_training" and found.limit == 80 * GIB
    assert found.estimate.held["optimizer state"] == 6 * found.estimate.held["parameters"]  # as it says
    with pytest.raises(ConfigError) as caught:
        example("high memory")
    assert one_line(caught.value) == "zero_ngroups must divide the 1 device dividing the batch, got 4; 1 would"


def test_the_documents_example_of_a_pipeline_plans_where_its_bubble_is_possible():
    fewer = {"search_space": ("pipeline", "data"), "recompute": "full"}
    with pytest.raises(ValueError) as caught:  # four stages of four microbatches are idle for 3 / 7
        example("pipeline", **fewer)
    said = one_line(caught.value)
    assert "devices would be idle for 0.429 of the time, more than" in said and "27 microbatches would do" in said
    found = example("pipeline", **fewer, max_pipeline_bubble_ratio=0.43)
    assert found.spread.of("pipeline") == 4 and found.spread.microbatches == 4
    assert found.plan.sizes["pipeline"] * 2 == found.spread.devices
    assert [note for note in found.notes if "pivot" in note] == [
        f"pivot {name!r} names no block of this model, and limits nothing" for name in ("encoder", "decoder")
    ]


def test_the_documents_example_of_little_memory_plans_on_one_device():
    found = example("memory-efficient")
    assert str(found.spread) == "one device, remat full"
    assert found.estimate.whole < 24 * GIB


class Mixed(nnx.Module):
    """A map with names and a scale without."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.zeros((64, 128)), out_sharding=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones((128,)))

    def loss(self, batch, rngs):
        return jnp.mean((batch["x"] @ self.kernel[...] * self.scale[...][None]) ** 2), {}


SHAPES = {"x": ((32, 64), "float32")}


def test_a_module_of_a_users_own_is_planned_and_what_has_no_names_stays_whole_and_is_listed():
    found = plan(Mixed, options(zero_stage="auto", topk=20), batch=SHAPES)
    assert "without names, so whole on every device: scale" in found.notes
    for one in every(found):
        ways = one.spread.of("fsdp") * one.spread.of("tensor")
        assert one.estimate.held["parameters"] == 4 * (64 * 128 / ways + 128), str(one.spread)
    assert {one.spread.of("fsdp") for one in every(found)} >= {2, 4}
    assert found.about["model"] == "Mixed"


def test_a_loss_may_be_given_beside_a_module():
    half = lambda model, batch: jnp.sum((batch["x"] @ model.kernel[...]) ** 2)  # noqa: E731
    found = plan(Mixed, options(search_space="data"), batch=SHAPES, loss=half)
    assert found.estimate.flops == 4 * 32 * 64 * 128 / 8


def test_a_loss_that_cannot_be_traced_is_told_by_the_last_line_of_its_traceback():
    def wrong(model, batch):
        return jnp.sum(batch["x"] @ model.kernel[...].T)

    with pytest.raises(ValueError) as caught:
        plan(Mixed, options(search_space="data"), batch=SHAPES, loss=wrong)
    said = one_line(caught.value)
    assert "the loss of 'Mixed' cannot be traced" in said and "TypeError: dot_general requires contracting dim" in said


def test_a_module_needs_a_batch_of_equally_many_rows():
    with pytest.raises(ValueError, match="a module is planned for a batch: give batch="):
        plan(Mixed, options())
    with pytest.raises(ValueError, match=r"equally many rows in front, got \[16, 32\]"):
        plan(Mixed, options(), batch={**SHAPES, "y": ((16,), "int32")})


@pytest.mark.parametrize("what", ["a run", "a module"])
def test_without_training_there_is_a_forward_pass_alone(what):
    how = {"search_space": "data", "recompute": "none"}
    if what == "a run":
        trained, alone = (plan_of(**how, is_train=trains) for trains in (True, False))
    else:
        trained, alone = (plan(Mixed, options(**how, is_train=trains), batch=SHAPES) for trains in (True, False))
    assert "optimizer state" in trained.estimate.held and "optimizer state" not in alone.estimate.held
    assert alone.estimate.held["parameters"] == trained.estimate.held["parameters"]
    ratio = trained.estimate.flops / alone.estimate.flops
    assert ratio == pytest.approx(3, rel=0.15) if what == "a run" else ratio == 2  # of x there is no gradient
    assert alone.estimate.sent() < 0.01 * trained.estimate.sent()


def test_both_solvers_choose_alike():
    memory = predicted(spread_of("data 4 x fsdp 2")).estimate.whole / GIB
    dp, ilp = (planned(**LEAST, memory_constraint=memory, solver=solver) for solver in ("dp", "ilp"))
    assert dp.spread == ilp.spread


def test_a_cluster_that_is_not_there_is_planned_by_its_own_links():
    times = {}
    for name in ("gpu:h100:1x8", "gpu:h100:8x1"):
        found = plan(subject(), options(search_space="data", recompute="none"), cluster=Cluster.parse(name))
        assert found.cluster_name == name
        times[name] = found.estimate.seconds
    assert times["gpu:h100:1x8"] < times["gpu:h100:8x1"]  # NVLink before the network


def test_the_answer_says_what_it_is_and_what_lost():
    text = str(planned(**LEAST))
    lines = text.splitlines()
    assert lines[0] == "plan 'default' for llama-nano on cpu:8, 8 devices of 32 GiB each"
    assert max(map(len, lines)) < 240
    for word in ("mesh", "remat", "memory of a device:", "time of a step", "runners-up:", "checked:", "state: exact"):
        assert word in text


def test_every_pair_of_axes_that_fits_is_found():
    """Of two axes alone, all products of sizes that make eight devices."""
    found = {
        tuple(one.spread.sizes) for one in every(planned(search_space=("data", "tensor"), recompute="none", topk=20))
    }
    pairs = itertools.product((1, 2, 4, 8), (1, 2, 4, 8))
    expected = [{"data": data, "tensor": tensor} for data, tensor in pairs if data * tensor == 8]
    assert found == {tuple((axis, size) for axis, size in sizes.items() if size > 1) for sizes in expected}
